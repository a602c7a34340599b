"""Makes NormAct2d one of timm's norm+act layers, so that its constructors take it as norm_layer=.

timm hands its act_layer on, and says which norms get no activation, only to classes that it knows. NormAct2d enters
timm's list as soon as both are loaded, in whichever order; timm is not imported for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

from .norm_act import NormAct2d

_FACTORY = "timm.layers.create_norm_act"


def register_with_timm() -> None:
    """Enters NormAct2d into timm's list, now or when timm is imported."""
    if _FACTORY in sys.modules:
        _enter(sys.modules[_FACTORY])
    elif not any(isinstance(finder, _FactoryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FactoryFinder())


def _enter(factory: ModuleType) -> None:
    """Adds NormAct2d to the norm+act layers of timm, and to those that take act_layer."""
    for registry in ("_NORM_ACT_TYPES", "_NORM_ACT_REQUIRES_ARG"):
        getattr(factory, registry, set()).add(NormAct2d)


class _FactoryFinder(importlib.abc.MetaPathFinder):
    """Finds timm's factory as Python does, and registers when it was executed; steps aside afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _FACTORY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            spec.loader.exec_module = execute_and_enter
        return spec
