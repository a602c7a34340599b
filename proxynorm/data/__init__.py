"""Data sets behind one interface, read by FFCV or torchvision with the same results."""

from proxynorm.data.loaders import Data, TrainLoader
from proxynorm.data.opening import open_data
from proxynorm.data.spec import Batch, DataInfo, DataSpec, LoaderSpec

__all__ = ["Batch", "Data", "DataInfo", "DataSpec", "LoaderSpec", "TrainLoader", "open_data"]
