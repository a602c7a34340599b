"""A trained network from its run folder alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from torch import nn

from proxynorm.cli import first_line
from proxynorm.data import Data, DataSpec, LoaderSpec, open_data
from proxynorm.data.opening import Validation, open_validation
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.train import checkpoint
from proxynorm.train.build import build_model
from proxynorm.train.config import settings_from
from proxynorm.train.finetune import restore_eps
from proxynorm.train.settings import Settings


@dataclass(frozen=True)
class Restored:
    """A run's settings, the network with the evaluated weights, and the checkpoint's content."""

    settings: Settings
    model: nn.Module
    content: dict[str, Any]


def checkpoint_path(run: str | None, file: str | None, weights: str = "last") -> Path:
    """Return the checkpoint that run= (a run folder) or checkpoint= (a file) names.

    Raises ConfigError or CheckpointError.
    """
    if (run is None) == (file is None):
        raise ConfigError("give either run=FOLDER or checkpoint=FILE")
    if weights not in ("last", "best"):
        raise ConfigError(f"weights={weights}: valid: last, best")
    if run is not None and not Path(run).is_dir():
        raise CheckpointError(f"no run folder {run}")
    return Path(file) if file is not None else Path(run) / "checkpoints" / f"{weights}.pt"


def restore(path: Path) -> Restored:
    """Rebuild the network of a run's checkpoint file. Raises CheckpointError."""
    try:
        content = checkpoint.load(path)
    except CheckpointError as error:
        previous = path.with_name("previous.pt")
        if path.name != "last.pt" or not previous.is_file():
            raise
        raise CheckpointError(f"{error}; the one before it: checkpoint={previous}") from error
    if "settings" in content:
        settings = settings_from(OmegaConf.create(content["settings"]))
    else:  # of version 0.1
        settings = stored_settings(path.resolve().parents[1] / "config.yaml")
    inputs = content["inputs"]
    model = build_model(settings, len(inputs["classes"]), inputs["channels"])
    model.load_state_dict(content["ema"] or content["model"])
    restore_eps(model, content.get("start"))
    return Restored(settings, model.eval(), content)


def stored_settings(path: Path) -> Settings:
    """Read a run's config.yaml. Raises CheckpointError if it is missing or damaged."""
    try:
        settings = settings_from(OmegaConf.create(path.read_text()))
        settings.model["name"]  # an empty file lacks it
    except Exception as error:  # whatever damage makes YAML, OmegaConf or a check raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{path}, the run's configuration, cannot be read ({reason}); put the run's own back"
        ) from error
    return settings


def different_classes(stored: list[str], present: list[str]) -> str:
    """Describe how two lists of classes differ: their lengths and the first difference."""
    pairs = (f"first difference: {was} → {now}" for was, now in zip(stored, present) if was != now)
    return f"{len(stored)} → {len(present)}, {next(pairs, 'one list is longer')}"


@dataclass(frozen=True)
class Source:
    """Where evaluation images come from, and how they are cut; None: as in training.

    classes: see open_validation.
    """

    root: str | None = None
    classes: str = "all"
    size: int | None = None
    ratio: float | None = None
    on_bad: str | None = None
    cache: str | None = None
    loader: str | None = None
    workers: int | None = None


def open_evaluation_data(restored: Restored, source: Source = Source()) -> Validation:
    """Open the run's data set, or the images of source.root alone.

    Raises ConfigError or DataError, and CheckpointError if the data set's classes are others.
    """
    data, loader = evaluation_specs(restored, source)
    classes = restored.content["inputs"]["classes"]
    if source.root is None and source.classes != "all":
        raise ConfigError(f"classes={source.classes} needs root=FOLDER of validation images")
    if source.root is not None and (source.classes != "all" or not is_whole(data)):
        return open_validation(data, loader, classes, source.classes)
    opened = open_data(data, loader)
    if classes != (present := list(opened.info.classes)):
        raise CheckpointError(
            "the checkpoint was trained on another data set "
            f"(classes: {different_classes(classes, present)})"
        )
    return Validation(opened, np.arange(len(classes)))


def evaluation_specs(restored: Restored, source: Source) -> tuple[DataSpec, LoaderSpec]:
    """Return the run's data and loader settings with what `source` gives in their place."""
    settings, inputs = restored.settings, restored.content["inputs"]
    data = {"root": source.root, "eval_size": source.size, "eval_ratio": source.ratio}
    data |= {"on_bad": source.on_bad, "cache": source.cache}
    data |= {"mean": tuple(inputs["mean"]), "std": tuple(inputs["std"])}
    loader = {"name": source.loader, "workers": source.workers}
    return (
        replace(settings.data, **{k: v for k, v in data.items() if v is not None}),
        replace(settings.loader, **{k: v for k, v in loader.items() if v is not None}),
    )


def is_whole(data: DataSpec) -> bool:
    """Return whether a data set is all there, as training takes it, with its training images."""
    root, training = Path(data.root or "").expanduser(), {"folder": "train", "beton": "train.beton"}
    if data.name in training:
        return (root / training[data.name]).exists()
    return not any(path.is_dir() for path in root.glob("*"))  # no class folders


def other_images(restored: Restored, data: Data) -> list[str]:
    """Return a warning if the evaluation images are not those of the run."""
    replaced = data.replaced(restored.content["inputs"].get("images", {}))
    words = "holds other images than those that the run was evaluated on"
    return [f"{replaced['eval']} {words}"] if "eval" in replaced else []
