"""Checks of single values. Their error messages give the name, the value and the valid range."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Sequence
from typing import TypeGuard


def unknown_name(subject: str, name: object, legal: Sequence[str], also: Sequence[str] = ()) -> str:
    """The error message for an unknown name, with the closest legal name and the list of them.

    also: further legal names, which are not listed.
    """
    near = difflib.get_close_matches(str(name), [*legal, *also], n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {subject} {name!r}.{guess} Choose one of: {', '.join(legal)}"


def check_whole(name: str, value: object, least: int, hint: str = "") -> None:
    """Raise ValueError unless value is a whole number of at least `least`."""
    if not (_is_number(value) and isinstance(value, numbers.Integral) and value >= least):
        raise ValueError(f"{name}={value!r}: it must be a whole number from {least} up{hint}")


def check_number(name: str, value: object, below: float = math.inf) -> None:
    """Raise ValueError unless 0 ≤ value < below."""
    if not (_is_number(value) and 0 <= value < below):
        end = "" if below == math.inf else f" to, but not including, {below}"
        raise ValueError(f"{name}={value!r}: it must be a finite number from 0 up{end}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
