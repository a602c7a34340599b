"""Names of files and classes, as they can be printed and told apart."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def printable(name: str | bytes | os.PathLike) -> str:
    """Return a file name as one line of text: bytes that are not UTF-8 become escapes (caf\\xe9).

    Python keeps such bytes as lone surrogates, which neither a terminal nor a JSON file takes.
    Control characters are escaped too, as a name with a line feed would break a line in two.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda character: ascii(character[0])[1:-1], text)


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
