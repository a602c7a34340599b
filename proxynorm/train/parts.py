"""Parts of a network, found by name: the classifier, frozen parts, patterns such as layer1*."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from proxynorm.errors import ConfigError

BODY = "body"  # in freeze=: everything but the classifier


def prefixes(name: str) -> Iterator[str]:
    """Yield a dotted name and those of the modules around it: a.b.c, a.b, a."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def under(key: str, names: set[str]) -> bool:
    """Return whether a tensor belongs to one of the modules."""
    return any(prefix in names for prefix in prefixes(key))


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern such as stem or layer1* matches a name or a module around it."""
    return any(fnmatchcase(prefix, pattern) for prefix in prefixes(name))


def check_pattern(model: nn.Module, key: str, pattern: str) -> None:
    """Raise ConfigError if a pattern matches no parameter."""
    if not any(matches(name, pattern) for name, _ in model.named_parameters()):
        parts = dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters())
        raise ConfigError(f"{key}: nothing is called {pattern}; the parts: {', '.join(parts)}")


def classifier_names(model: nn.Module) -> set[str]:
    """Return the names of the classifier's modules: timm's answer, else the last linear layer."""
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
        heads = list(found) if isinstance(found, (tuple, list)) else [found]
    else:
        heads = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return {name for name, module in model.named_modules() if any(module is h for h in heads)}


def freeze_parts(model: nn.Module, patterns: list[str] | None) -> list[nn.Module]:
    """Freeze the parameters of matching modules; return the modules, for `train_mode`.

    Raises ConfigError if a pattern matches nothing, or if everything is frozen.
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
    """Put the network in training mode and its frozen modules in evaluation mode.

    A frozen Batch Norm uses its running statistics and does not change them; dropout is off.
    """
    network.train()
    for module in frozen:
        module.training = False  # eval() would also set submodules that are not frozen
