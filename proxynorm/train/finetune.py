"""Fine-tuning: start from weights, freeze parts, scale the learning rate by part."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import huggingface_hub.constants as hub
import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv, clean_state_dict, group_parameters
from torch import Tensor, nn

from proxynorm.cli import first_line
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.models import create_model
from proxynorm.nn import NormAct2d
from proxynorm.train import checkpoint
from proxynorm.train.settings import OptimSettings, Settings

PUBLISHED = "timm"
BODY = "body"  # in freeze=: everything but the classifier
# Arguments of timm's networks that load weights. A run keeps them in its configuration, but its
# network is built without them: the checkpoint has the weights.
LOADING = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
# Where weights lie in a file: ours, timm's, and the common wrappers; averaged ones first.
WRAPPERS = ("ema", "state_dict_ema", "model_ema", "state_dict", "model")
ONLINE_SECONDS = 5.0
NORM_PARTS = {  # of a norm's tensors, in words
    "weight": "scale",
    "bias": "shift",
    "running_mean": "running statistics",
    "proxy_weight": "the proxy's parameters",
}
LAYER_PARAMETERS = 12  # in a layer of a network that does not tell its layers; timm's number


@dataclass(frozen=True)
class Weights:
    """Weights to start from.

    tensors: by name; classes: what the classifier's rows stand for, if known; norm: its name, if
    known; eps: the norms' ε, if known and one for all.
    """

    tensors: dict[str, Tensor]
    classes: list[str] | None = None
    norm: str | None = None
    eps: float | None = None


def source_of(settings: Settings) -> str | None:
    """Return what the run starts from, if not from random weights."""
    model = settings.model
    published = PUBLISHED if model.get("pretrained") else None
    return settings.weights or model.get("checkpoint_path") or published


def read_weights(source: str, settings: Settings, classes: int, channels: int) -> Weights:
    """Read a run folder, an exported folder, a file, or timm's published weights.

    Raises ConfigError or CheckpointError.
    """
    if source == PUBLISHED:
        return published_weights(settings, classes, channels)
    path = Path(source).expanduser()
    if path.is_dir():
        inside = (path / "checkpoints" / "last.pt", path / "model.safetensors")
        path = next((file for file in inside if file.is_file()), inside[0])
    if not path.is_file():
        raise CheckpointError(
            f"weights={source}: no file {path}; valid: a run folder, FILE.pt, FILE.safetensors, or "
            f"{PUBLISHED} (published weights)"
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else checkpoint.read(path)
    except Exception as error:
        raise CheckpointError(f"weights={source}: {first_line(error)}") from error
    wrapped = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
    tensors = (wrapped or [content])[0]
    tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    recorded, start = content.get("identity") or {}, content.get("start") or {}
    return Weights(
        clean_state_dict(tensors),
        (content.get("inputs") or {}).get("classes"),
        recorded.get("norm.name"),
        start.get("eps") or recorded.get("norm.eps"),
    )


def published_weights(settings: Settings, classes: int, channels: int) -> Weights:
    """Fetch timm's weights for the model. Raises ConfigError if there are none, or no network."""
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
    config = getattr(model, "pretrained_cfg", {})
    tensors = model.state_dict()
    if config.get("num_classes") != classes:  # timm has drawn a new classifier
        tensors = {k: v for k, v in tensors.items() if not under(k, classifier_names(model))}
    return Weights(tensors, norm="bn", eps=common_eps(model))


def set_offline_if_unreachable() -> None:
    """Let huggingface_hub look in its cache alone if there is no network: it retries a minute."""
    if getproxies():  # only the proxy reaches the hub
        return
    host = hub.ENDPOINT.partition("://")[2].partition("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=ONLINE_SECONDS).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True


def carry(
    model: nn.Module, weights: Weights, settings: Settings, classes: list[str]
) -> dict[str, Any]:
    """Copy into `model` what fits; return the record of it for checkpoints.

    The record: weights (their name), eps (the norms', if it came with them), notes (lines on what
    was carried and what was not). Raises ConfigError if more than classifier and norms differ.
    """
    target, head = model.state_dict(), classifier_names(model)
    given = {plain_name(key): value for key, value in weights.tensors.items()}
    norms = {name for name, module in model.named_modules() if isinstance(module, NormAct2d)}
    if weights.classes not in (None, classes):
        given = {key: value for key, value in given.items() if not under(key, head)}
    carried, notes = {}, []
    for key, own in target.items():
        found = given.get(plain_name(key))
        if found is not None and own.ndim == 4 and own.shape[1] != 3 == found.shape[1]:
            found = adapt_input_conv(own.shape[1], found)
            notes.append(f"first convolution adapted from 3 to {own.shape[1]} channel(s)")
        if found is not None and found.shape == own.shape:
            carried[key] = found
    name = source_of(settings)
    differing = [key for key in target if key not in carried and not under(key, norms | head)]
    if differing:
        raise ConfigError(
            f"weights={name}: another network: {len(differing)} of {len(target)} tensors differ "
            f"(first: {differing[0]}); only the classifier and the norms may"
        )
    model.load_state_dict({**target, **carried})
    used = {plain_name(key) for key in carried}
    unused = [key for key in given if key not in used and not under(key, norms | head)]
    if unused:
        notes.append(f"{len(unused)} tensors of the file have no place here (first: {unused[0]})")
    kept = any(under(key, head) for key in carried)
    notes.append("classifier kept" if kept else f"new classifier for {len(classes)} classes")
    lines = [f"started from {name}: {len(carried)} of {len(target)} tensors; {'; '.join(notes)}"]
    if words := norm_changes(target, given, used, norms):
        lines.append(f"norm {weights.norm or 'of the file'} → {settings.norm.name}: {words}")
    elif weights.norm not in (None, settings.norm.name):
        lines.append(f"norm {weights.norm} → {settings.norm.name}: all its tensors kept")
    record = {"weights": name, "notes": lines}
    record["eps"] = weights.eps if settings.norm.eps is None else None
    restore_eps(model, record)
    return record


def norm_changes(
    target: Iterable[str], given: Iterable[str], used: set[str], norms: set[str]
) -> str:
    """Return what of the norms starts anew and what was left out, in words."""

    def words(keys: Iterable[str]) -> str:
        others = {plain_name(key) for key in keys if under(key, norms)} - used
        found = {key.rpartition(".")[2] for key in others}
        return ", ".join(word for key, word in NORM_PARTS.items() if key in found)

    parts = (("starts anew", words(target)), ("left out", words(given)))
    return "; ".join(f"{text}: {found}" for text, found in parts if found)


def plain_name(key: str) -> str:
    """Return a tensor's name without weight standardization's wrapping."""
    return key.replace(".parametrizations.weight.original", ".weight")


def under(key: str, names: set[str]) -> bool:
    """Return whether a tensor belongs to one of the modules."""
    return any(prefix in names for prefix in prefixes(key))


def prefixes(name: str) -> Iterator[str]:
    """Yield the dotted name and those of the modules around it: a.b.c, a.b, a."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def classifier_names(model: nn.Module) -> set[str]:
    """Return the names of the classifier's modules: what timm says, else the last linear layer."""
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
        heads = list(found) if isinstance(found, (tuple, list)) else [found]
    else:
        heads = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return {name for name, module in model.named_modules() if any(module is h for h in heads)}


def common_eps(model: nn.Module) -> float | None:
    """Return the norms' ε if they share one."""
    found = {module.eps for module in model.modules() if isinstance(module, NormAct2d)}
    return found.pop() if len(found) == 1 else None


def restore_eps(model: nn.Module, record: dict[str, Any] | None) -> None:
    """Give the norms the ε of the weights that the run began with; record: see `carry`."""
    if record is not None and record["eps"] is not None:
        for module in model.modules():
            if isinstance(module, NormAct2d):
                module.eps = record["eps"]


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern, as stem or layer1*, matches a name or a module around it."""
    return any(fnmatchcase(prefix, pattern) for prefix in prefixes(name))


def check_pattern(model: nn.Module, key: str, pattern: str) -> None:
    """Raise ConfigError if a pattern matches no parameter."""
    if not any(matches(name, pattern) for name, _ in model.named_parameters()):
        parts = dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters())
        raise ConfigError(f"{key}: nothing is called {pattern}; the parts: {', '.join(parts)}")


def freeze_parts(model: nn.Module, patterns: list[str] | None) -> list[nn.Module]:
    """Freeze the parameters of matching modules; return the modules, for `train_mode`.

    Raises ConfigError if a pattern matches nothing, or if all is frozen.
    """
    if not patterns:
        return []
    head = classifier_names(model)
    for pattern in patterns:
        if pattern != BODY:
            check_pattern(model, "freeze", pattern)

    def is_frozen(name: str) -> bool:
        body = BODY in patterns and not under(name, head)
        return body or any(matches(name, pattern) for pattern in patterns)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"freeze=[{','.join(patterns)}]: nothing is left to train")
    return [module for name, module in model.named_modules() if name and is_frozen(name)]


def train_mode(network: nn.Module, frozen: list[nn.Module]) -> None:
    """Put the network in training mode, its frozen modules in evaluation mode.

    There Batch Norm uses its running statistics and leaves them as they are; dropout is off.
    """
    network.train()
    for module in frozen:
        module.training = False  # eval() would reach into parts that are not frozen


def scale_rates(
    model: nn.Module, groups: list[dict[str, Any]], optim: OptimSettings
) -> list[dict[str, Any]]:
    """Split optimizer groups by the factor on each parameter's rate, timm's key lr_scale.

    A parameter under several patterns takes the product. Raises ConfigError.
    """
    if not optim.lr_scale and optim.layer_decay is None:
        return groups
    names = dict(model.named_parameters())
    layers = layers_of(model)
    decay, top = optim.layer_decay or 1.0, max(layers.values())
    scales = {id(names[name]): decay ** (top - layer) for name, layer in layers.items()}
    for pattern, scale in (optim.lr_scale or {}).items():
        check_pattern(model, "optim.lr_scale", pattern)
        for name, parameter in names.items():
            if matches(name, pattern):
                scales[id(parameter)] *= scale
    split = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(scales[id(parameter)], []).append(parameter)
        split += [{**group, "params": part, "lr_scale": scale} for scale, part in parts.items()]
    return split


def layers_of(model: nn.Module) -> dict[str, int]:
    """Return each parameter's layer, from the stem up, as timm counts them for layer decay."""
    if hasattr(model, "group_matcher"):
        return group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    head, names = classifier_names(model), [name for name, _ in model.named_parameters()]
    trunk = [name for name in names if not under(name, head)]
    top = len(trunk) // LAYER_PARAMETERS + 1
    return dict.fromkeys(names, top) | {n: i // LAYER_PARAMETERS for i, n in enumerate(trunk)}


def base_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of a factor of 1, by the group of the largest factor."""
    group = max(optimizer.param_groups, key=lambda group: group.get("lr_scale", 1.0))
    return group["lr"] / group.get("lr_scale", 1.0)
