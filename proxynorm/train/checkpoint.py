"""Checkpoints that survive: written beside and renamed, verified, with the previous one kept."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from proxynorm.errors import CheckpointError, FileError
from proxynorm.files import write_atomic

FORMAT = 1


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write `content` to `path`; what stood there is kept as `previous`. Raises CheckpointError when the disk is full.

    The archive holds a CRC-32 of every record, which `load` verifies.
    """

    def keep() -> None:
        if previous is not None and path.exists():
            os.replace(path, previous)

    try:
        write_atomic(path, lambda stream: _write({"format": FORMAT, **content}, stream), keep)
    except FileError as error:
        kept = "; the last good checkpoint is untouched" if path.exists() else ""
        raise CheckpointError(f"{error}{kept}") from error


def _write(content: dict[str, Any], stream: BinaryIO) -> None:
    """torch.save; the fault of a full disk, which its archive writer replaces by one of its own, as it was."""
    try:
        torch.save(content, stream)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Raises CheckpointError if it is missing, damaged or not one of ours."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged (checksum of {damaged})")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of proxynorm (format {FORMAT})")
    return content


def load_latest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest readable checkpoint of a run's folder (None if there is none), and what had to be said on the way."""
    messages, faults = [], []
    for name in ("last.pt", "previous.pt"):
        if not (folder / name).exists():
            continue
        try:
            content = load(folder / name)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if name == "previous.pt":
            messages = [*faults, f"falling back: going on from {folder / name}"]
        return content, messages
    if faults:
        raise CheckpointError(
            f"no readable checkpoint: {'; '.join(faults)}; resume=never starts anew"
        )
    return None, []
