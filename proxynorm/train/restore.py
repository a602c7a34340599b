"""A trained network, from its run folder or checkpoint, and the images to evaluate it on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from proxynorm.cli import first_line, option
from proxynorm.data import Batch, Data, DataSpec, LoaderSpec, open_data
from proxynorm.data.opening import open_validation
from proxynorm.data.spec import SHARE, SIDE
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.train import checkpoint
from proxynorm.train.build import build_model, choose_dtype, choose_memory_format
from proxynorm.train.config import settings_from
from proxynorm.train.distributed import Process
from proxynorm.train.evaluate import forward
from proxynorm.train.finetune import restore_eps
from proxynorm.train.settings import Settings, check

RATIO = "the crop's share of the shorter side; default: as trained"
COUNT = "at least 0 and finite"


@dataclass
class RunOptions:
    """Options of the commands that use a trained network."""

    run: str | None = option(None, "run folder")
    checkpoint: str | None = option(None, "or a checkpoint file")
    weights: str = option("last", "with run=: last or best")
    size: int | None = option(None, "side of the images in pixels; default: as in training", SIDE)
    ratio: float | None = option(None, RATIO, SHARE)
    batch: int = option(0, "images per process and forward; 0: as in training", COUNT)
    device: str = option("auto", "auto, cpu, cuda, cuda:N")
    precision: str | None = option(None, "fp32, bf16, fp16, auto; default: as in training")
    workers: int | None = option(None, "loader workers", COUNT)


@dataclass(frozen=True)
class Restored:
    """A run restored from a file: its settings, its network, and the file's content."""

    settings: Settings
    model: nn.Module
    content: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Any]:
        """The input data: classes, channels, and mean and std per channel, on the scale 0 to 1."""
        return self.content["inputs"]

    @property
    def metrics(self) -> dict[str, Any]:
        """The result of an exported run."""
        return self.content["metrics"]

    def with_options(self, options: RunOptions, loader: str | None = None, **data: Any) -> Restored:
        """Return the run with its settings replaced by the options that are not None."""
        settings = _replaced(
            self.settings,
            data=_replaced(
                self.settings.data, eval_size=options.size, eval_ratio=options.ratio, **data
            ),
            loader=_replaced(self.settings.loader, name=loader, workers=options.workers),
            precision=options.precision,
            eval_batch=options.batch or None,
        )
        return replace(self, settings=check(settings))

    def outputs(self, data: Data, process: Process) -> Iterator[tuple[Batch, Tensor]]:
        """Yield this process's evaluation batches and their logits (N, K)."""
        device, batch_size = process.device, self.settings.eval_batch
        memory_format = choose_memory_format(self.settings, device)
        return forward(
            self.model.to(device, memory_format=memory_format),
            data.eval_loader(batch_size, process.rank, process.world_size),
            lambda batch: data.prepare(batch, device, memory_format=memory_format),
            device,
            choose_dtype(self.settings, device),
        )


def _replaced(record: Any, **values: Any) -> Any:
    return replace(record, **{key: value for key, value in values.items() if value is not None})


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
    content = checkpoint.load(path)
    if "settings" in content:
        settings = settings_from(OmegaConf.create(content["settings"]))
    else:  # a checkpoint of version 0.1
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
        settings.model["name"]  # missing in an empty file
    except Exception as error:  # a damaged file may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{path}, the run's configuration, cannot be read ({reason}); put the run's own back"
        ) from error
    return settings


def different_classes(stored: list[str], present: list[str]) -> str:
    """Describe how two lists of classes differ: by their lengths and the first difference."""
    pairs = (f"first difference: {was} → {now}" for was, now in zip(stored, present) if was != now)
    return f"{len(stored)} → {len(present)}, {next(pairs, 'one list is longer')}"


def evaluation_specs(restored: Restored) -> tuple[DataSpec, LoaderSpec]:
    """Return the data and loader settings, with the mean and std used in training."""
    inputs, settings = restored.inputs, restored.settings
    stored = {key: tuple(inputs[key]) for key in ("mean", "std")}
    return replace(settings.data, **stored), settings.loader


def open_evaluation_data(restored: Restored, root: str | None = None, classes: str = "all") -> Data:
    """Open the run's data set, or the images of `root`; classes: see open_validation.

    Raises ConfigError or DataError, or CheckpointError if the data set has other classes.
    """
    data, loader = evaluation_specs(restored)
    trained = restored.inputs["classes"]
    if root is None and classes != "all":
        raise ConfigError(f"classes={classes} needs root=FOLDER of validation images")
    if root is not None:
        data = replace(data, root=root)
        if classes != "all" or not has_training_images(data):
            return open_validation(data, loader, trained, classes)
    opened = open_data(data, loader)
    if trained != (present := list(opened.info.classes)):
        raise CheckpointError(
            "the checkpoint was trained on another data set "
            f"(classes: {different_classes(trained, present)})"
        )
    return opened


def has_training_images(data: DataSpec) -> bool:
    """Return whether data.root holds a data set to train on, not validation images alone."""
    root, training = Path(data.root or "").expanduser(), {"folder": "train", "beton": "train.beton"}
    if data.name in training:
        return (root / training[data.name]).exists()
    return not any(path.is_dir() for path in root.glob("*"))  # no class folders


def other_images(restored: Restored, data: Data) -> list[str]:
    """Return a warning if the evaluation images are not those of the run."""
    replaced = data.replaced(restored.inputs.get("images", {}))
    words = "holds other images than those that the run was evaluated on"
    return [f"{replaced['eval']} {words}"] if "eval" in replaced else []
