"""Checks of single values; a failure is a one-line ValueError: name, value, what is allowed."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Sequence
from typing import TypeGuard


def unknown_name(subject: str, name: object, legal: Sequence[str]) -> str:
    """The message for an unknown name: the name, the nearest legal one if any is near, the list."""
    near = difflib.get_close_matches(str(name), legal, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {subject} {name!r}.{guess} Choose one of: {', '.join(legal)}"


def check_whole(name: str, value: object, least: int, hint: str = "") -> None:
    """Raise ValueError unless value is a whole number of at least `least`."""
    if not (_is_number(value) and isinstance(value, numbers.Integral) and value >= least):
        raise ValueError(f"{name}={value!r}: it must be a whole number from {least} up{hint}")


def check_rate(name: str, value: object) -> None:
    """Raise ValueError unless 0 ≤ value < 1, as a drop rate must be."""
    if not (_is_number(value) and 0 <= value < 1):
        raise ValueError(
            f"{name}={value!r}: it must be a number from 0 up to, but not including, 1"
        )


def check_epsilon(name: str, value: object) -> None:
    """Raise ValueError unless value is a finite number of at least 0."""
    if not (_is_number(value) and 0 <= value < math.inf):
        raise ValueError(
            f"{name}={value!r}: it is added to a variance and must be a finite number from 0 up"
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
