"""Names of files and classes, as they can be printed and told apart."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable


def printable(name: str | bytes | os.PathLike) -> str:
    """Return a file name as text; bytes that are not UTF-8 become escapes, such as caf\\xe9.

    Python keeps such bytes as lone surrogates, which neither a terminal nor a JSON file takes.
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def look_alike(name: str, others: Iterable[str]) -> str | None:
    """Return the first of `others` that looks like `name` but is another string, or None.

    é is one code point (NFC) or e and an accent (NFD); macOS and Linux tools write different ones.
    """
    form = unicodedata.normalize("NFC", name)
    return next(
        (
            other
            for other in others
            if other != name and unicodedata.normalize("NFC", other) == form
        ),
        None,
    )


def code_points(name: str) -> str:
    """Return a name with its characters beyond ASCII spelled out: café is caf\\xe9."""
    return ascii(name)[1:-1]
