"""Load trained networks from runs, exports and the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.train.build import build_model
from proxynorm.train.config import settings_from
from proxynorm.train.restore import Restored, checkpoint_path, restore

HUB = "hf-hub:"  # timm's prefix
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Trained(nn.Module):
    """The result of `load`, for type checkers: a network with a description of its inputs."""

    pretrained_cfg: dict[str, Any]


def load(path: str | Path) -> Trained:
    """Load a trained network, in evaluation mode. Raises CheckpointError.

    path: a run folder (its last checkpoint) or one of its checkpoints, an export folder or its
    .safetensors file, or hf-hub:OWNER/NAME.

    The attribute `pretrained_cfg` of the network describes its inputs and outputs with timm's keys:
    input_size, mean, std, crop_pct, interpolation, num_classes, label_names.
    """
    if str(path).startswith(HUB):
        from huggingface_hub import snapshot_download

        try:
            repository = str(path).removeprefix(HUB)
            path = snapshot_download(repository, allow_patterns=[CONFIG, WEIGHTS])
        except (OSError, ValueError) as error:  # no such repository, or no connection
            raise CheckpointError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    path = Path(path).expanduser()
    if path.suffix == ".safetensors" or (path / CONFIG).is_file():
        return _described(load_export(path))
    if not path.exists():
        raise CheckpointError(f"{path}: no such run folder, export or checkpoint")
    return _described(restore(path if path.is_file() else checkpoint_path(str(path), None)))


def load_export(path: str | Path) -> Restored:
    """Load an export folder, or its .safetensors file. Raises CheckpointError."""
    path = Path(path).expanduser()
    weights = path if path.suffix == ".safetensors" else path / WEIGHTS
    config = weights.with_name(CONFIG)
    for file in (config, weights):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; export the run with scripts/export.py")
    try:
        content = json.loads(config.read_text())
        settings, inputs = settings_from(OmegaConf.create(content["config"])), content["inputs"]
        model = build_model(settings, len(inputs["classes"]), inputs["channels"])
        content["metrics"]  # raises KeyError if it is missing
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{config} is not a proxynorm export's ({error})") from error
    try:
        model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{weights} is damaged or of another network: {reason}") from error
    return Restored(settings, model.eval(), content)


def _described(restored: Restored) -> Trained:
    """Attach timm's description of the inputs, which timm's create_transform reads."""
    inputs, data = restored.inputs, restored.settings.data
    size = data.eval_size or data.image_size
    trained = cast(Trained, restored.model)
    trained.pretrained_cfg = {
        "architecture": restored.settings.model["name"],
        "input_size": (inputs["channels"], size, size),
        "mean": tuple(inputs["mean"]),
        "std": tuple(inputs["std"]),
        "crop_pct": data.eval_ratio,
        "interpolation": "bilinear",
        "num_classes": len(inputs["classes"]),
        "label_names": tuple(inputs["classes"]),
    }
    return trained
