"""Fine-tuning: weights to start from, and how they fit another classifier, norm or input."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub.constants as hub
from safetensors.torch import load_file
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn

from proxynorm.cli import first_line
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.models import create_model
from proxynorm.nn import NormAct2d
from proxynorm.train import checkpoint
from proxynorm.train.parts import classifier_names, under
from proxynorm.train.settings import Settings

PUBLISHED = "timm"  # in weights=: the weights that timm publishes for the model
# Arguments with which timm's networks load weights. They stay in a run's configuration, but its
# network is built without them, because its checkpoints have the weights.
LOADING = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
# Keys of a file (ours, timm's, others') that hold its weights; averaged weights come first.
WRAPPERS = ("ema", "state_dict_ema", "model_ema", "state_dict", "model")
ONLINE_SECONDS = 5.0  # for a first connection to the hub


@dataclass(frozen=True)
class Weights:
    """Weights to start from.

    tensors: by name; classes: what the classifier's rows stand for, if known; norm: its name, if
    known; eps: the norms' ε, if known and the same for all.
    """

    tensors: dict[str, Tensor]
    classes: list[str] | None = None
    norm: str | None = None
    eps: float | None = None


def source_of(settings: Settings) -> str | None:
    """Return what the run starts from, or None for random weights."""
    model = settings.model
    published = PUBLISHED if model.get("pretrained") else None
    return settings.weights or model.get("checkpoint_path") or published


def read_weights(source: str, settings: Settings, classes: int, channels: int) -> Weights:
    """Read weights from a run folder, an exported folder, a file, or timm's published ones.

    Raises ConfigError or CheckpointError.
    """
    if source == PUBLISHED:
        return published_weights(settings, classes, channels)
    path = Path(source).expanduser()
    if path.is_dir():
        last, exported = path / "checkpoints" / "last.pt", path / "model.safetensors"
        path = exported if exported.is_file() and not last.is_file() else last
    if not path.is_file():
        raise CheckpointError(
            f"weights={source}: no file {path}; valid: a run folder, FILE.pt, FILE.safetensors, or "
            f"{PUBLISHED} (published weights)"
        )
    try:
        if path.suffix == ".safetensors":
            content = {"model": load_file(path), **exported_record(path.with_name("config.json"))}
        else:
            content = checkpoint.read(path)
    except Exception as error:
        raise CheckpointError(f"weights={source}: {first_line(error)}") from error
    wrapped = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
    tensors = (wrapped or [content])[0]
    recorded, start = content.get("identity") or {}, content.get("start") or {}
    return Weights(
        clean_state_dict({k: value for k, value in tensors.items() if isinstance(value, Tensor)}),
        (content.get("inputs") or {}).get("classes"),
        recorded.get("norm.name"),
        start.get("eps") or recorded.get("norm.eps"),
    )


def exported_record(path: Path) -> dict[str, Any]:
    """Return what an export's config.json says of its weights; {} if there is none of ours."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    if not {"config", "inputs"} <= content.keys():
        return {}
    norm = content["config"]["norm"]
    identity = {"norm.name": norm["name"], "norm.eps": norm["eps"]}
    return {"inputs": content["inputs"], "identity": identity}


def published_weights(settings: Settings, classes: int, channels: int) -> Weights:
    """Fetch timm's weights for the model. Raises ConfigError if it cannot."""
    arguments = {key: value for key, value in settings.model.items() if key != "pretrained"}
    name = arguments.pop("name")
    set_offline_if_unreachable()
    try:
        model = create_model(name, "bn", classes, in_chans=channels, pretrained=True, **arguments)
    except ConfigError as error:
        raise ConfigError(f"weights={PUBLISHED}: {error}") from error
    except Exception as error:
        reason = "no network" if hub.HF_HUB_OFFLINE else first_line(error)
        raise ConfigError(
            f"weights={PUBLISHED}: cannot fetch the weights of {name}: {reason}; copy them here "
            "and give weights=FILE"
        ) from error
    tensors = model.state_dict()
    if getattr(model, "pretrained_cfg", {}).get("num_classes") != classes:
        head = classifier_names(model)  # a new one, with random weights
        tensors = {key: value for key, value in tensors.items() if not under(key, head)}
    found = {module.eps for module in model.modules() if isinstance(module, NormAct2d)}
    return Weights(tensors, norm="bn", eps=found.pop() if len(found) == 1 else None)


def set_offline_if_unreachable() -> None:
    """Restrict huggingface_hub to its cache when offline: it would retry for a minute."""
    if getproxies():  # only the proxy can reach the hub
        return
    url = urlsplit(hub.ENDPOINT)
    try:
        address = (url.hostname, url.port or (80 if url.scheme == "http" else 443))
        socket.create_connection(address, timeout=ONLINE_SECONDS).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True


def plain_name(key: str) -> str:
    """Return a tensor's name without the wrapper that weight standardization adds."""
    return key.replace(".parametrizations.weight.original", ".weight")


def carry_over(
    model: nn.Module, weights: Weights, settings: Settings, classes: list[str]
) -> dict[str, Any]:
    """Copy the weights that fit into `model`; return a record of them for checkpoints.

    The record's keys are weights (their source), eps (the norms' ε; None: the model's own) and
    notes (a line for the user). Raises ConfigError if more than the classifier and norms differ.
    """
    target, head = model.state_dict(), classifier_names(model)
    norms = {name for name, module in model.named_modules() if isinstance(module, NormAct2d)}
    given = {plain_name(key): value for key, value in weights.tensors.items()}
    if weights.classes not in (None, classes):
        given = {key: value for key, value in given.items() if not under(key, head)}
    carried, notes = {}, []
    for key, own in target.items():
        found = given.get(plain_name(key))
        if found is None:
            continue
        are_kernels = own.ndim == found.ndim == 4
        if are_kernels and found.shape[1] == 3 and own.shape[1] != 3:
            found = adapt_input_conv(own.shape[1], found)
            notes.append(f"first convolution adapted from 3 to {own.shape[1]} channel(s)")
        if found.shape == own.shape:
            carried[key] = found
    name, norm = source_of(settings), settings.norm
    differing = [key for key in target if key not in carried and not under(key, norms | head)]
    if differing:
        raise ConfigError(
            f"weights={name}: another network: {len(differing)} of {len(target)} tensors differ "
            f"(first: {differing[0]}); only the classifier and the norms may"
        )
    model.load_state_dict({**target, **carried})
    kept = any(under(key, head) for key in carried)
    notes.append("classifier kept" if kept else f"new classifier for {len(classes)} classes")
    if weights.norm not in (None, norm.name):
        notes.append(f"norm {weights.norm} → {norm.name}")
    new, unused = target.keys() - carried, given.keys() - set(map(plain_name, carried))
    for what, keys in (("new", new), ("left out", unused)):
        kinds = [key.rpartition(".")[2] for key in sorted(keys) if not under(key, head)]
        if kinds:
            names = ", ".join(sorted(set(kinds)))
            notes.append(f"{what}: {len(kinds)} tensors ({names})")
    line = f"started from {name}: {len(carried)} of {len(target)} tensors; {'; '.join(notes)}"
    eps = weights.eps if norm.eps is None else None
    start = {"weights": name, "notes": [line], "eps": eps}
    restore_eps(model, start)
    return start


def restore_eps(model: nn.Module, start: dict[str, Any] | None) -> None:
    """Give the norms the ε of the weights that the run began with; start: see `carry_over`."""
    if start is not None and start["eps"] is not None:
        for module in model.modules():
            if isinstance(module, NormAct2d):
                module.eps = start["eps"]
