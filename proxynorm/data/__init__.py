"""Data sets behind one interface and two backends, FFCV and torchvision, with the same
semantics."""

from proxynorm.data.loaders import Data, EvalLoader, TrainLoader
from proxynorm.data.opening import open_data
from proxynorm.data.spec import Batch, DataInfo, DataSpec, LoaderSpec

__all__ = [
    "Batch",
    "Data",
    "DataInfo",
    "DataSpec",
    "EvalLoader",
    "LoaderSpec",
    "TrainLoader",
    "open_data",
]
