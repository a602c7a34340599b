"""A trained network from its run folder alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from proxynorm.cli import first_line
from proxynorm.data import Data, open_data
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.train import checkpoint
from proxynorm.train.build import build_model
from proxynorm.train.config import settings_from
from proxynorm.train.settings import Settings


@dataclass(frozen=True)
class Restored:
    """A run's settings, the network with the weights that were evaluated, and the checkpoint's content."""

    settings: Settings
    model: nn.Module
    content: dict[str, Any]


def checkpoint_path(run: str | None, file: str | None, weights: str = "last") -> Path:
    """The checkpoint that run= (a run folder) or checkpoint= (a file) means. Raises ConfigError or CheckpointError."""
    if (run is None) == (file is None):
        raise ConfigError("give either run=FOLDER or checkpoint=FILE")
    if weights not in ("last", "best"):
        raise ConfigError(f"weights={weights}: valid: last, best")
    path = Path(file) if file is not None else Path(run) / "checkpoints" / f"{weights}.pt"
    if run is not None and not Path(run).is_dir():
        raise CheckpointError(f"no run folder {run}")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    return path


def restore(path: Path) -> Restored:
    """Rebuild the network of a run's checkpoint file. Raises CheckpointError."""
    try:
        content = checkpoint.load(path)
    except CheckpointError as error:
        previous = path.with_name("previous.pt")
        hint = (
            f"; the one before it: checkpoint={previous}"
            if previous.is_file() and path.name == "last.pt"
            else ""
        )
        raise CheckpointError(f"{error}{hint}") from error
    config = path.resolve().parents[1] / "config.yaml"
    if not config.is_file():
        raise CheckpointError(
            f"{path} is not in a run folder (RUN/checkpoints/, beside RUN/config.yaml): its configuration is missing"
        )
    settings = stored_settings(config)
    inputs = content["inputs"]
    model = build_model(settings, len(inputs["classes"]), inputs["channels"])
    model.load_state_dict(content["ema"] or content["model"])
    return Restored(settings, model.eval(), content)


def stored_settings(path: Path) -> Settings:
    """The settings in a run's config.yaml. Raises CheckpointError if it is missing, damaged or of another version."""
    try:
        config = OmegaConf.create(path.read_text())
        if not isinstance(config, DictConfig):
            raise ConfigError("it is a list")
        settings = settings_from(config)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; put it back") from error
    except (ConfigError, YAMLError, OmegaConfBaseException, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"{path} is damaged, or of another version ({first_line(error)}); put the run's own back"
        ) from error
    if "name" not in settings.model:
        raise CheckpointError(
            f"{path} names no model: it is empty or damaged; put the run's own back"
        )
    return settings


def different_classes(stored: list[str], present: list[str]) -> str:
    """How two lists of classes differ, as 'how many → how many, the first that is not the same'."""
    pairs = (f"first difference: {was} → {now}" for was, now in zip(stored, present) if was != now)
    return f"{len(stored)} → {len(present)}, {next(pairs, 'one list goes on')}"


def open_evaluation_data(
    restored: Restored, root: str | None, cache: str | None, loader: str | None, workers: int | None
) -> Data:
    """The run's data set, elsewhere if asked for. Raises DataError, or CheckpointError if its classes are others."""
    settings = restored.settings
    changes = {key: value for key, value in (("root", root), ("cache", cache)) if value is not None}
    loader_changes = {
        key: value for key, value in (("name", loader), ("workers", workers)) if value is not None
    }
    data = open_data(replace(settings.data, **changes), replace(settings.loader, **loader_changes))
    trained, present = restored.content["inputs"]["classes"], list(data.info.classes)
    if trained != present:
        raise CheckpointError(
            f"the checkpoint was trained on another data set (classes: {different_classes(trained, present)})"
        )
    return data


def other_images(restored: Restored, data: Data) -> list[str]:
    """What to tell, in a line, of an evaluation on other images than the run's own."""
    replaced = data.replaced(restored.content["inputs"].get("images", {}))
    return (
        [f"{replaced['eval']} holds other images than those that the run was evaluated on"]
        if "eval" in replaced
        else []
    )
