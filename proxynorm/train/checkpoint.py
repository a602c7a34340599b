"""Checkpoints: written atomically, verified when loaded, and the previous one is kept."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from proxynorm.cli import first_line
from proxynorm.errors import CheckpointError, FileError
from proxynorm.files import write_atomic

FORMAT = 1
NOT_PLAIN = "not a file of torch.save, or with objects besides tensors (save model.state_dict())"


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write `content` to `path`, after moving the former file to `previous`.

    Raises CheckpointError if the file cannot be written.
    """

    def write(stream: BinaryIO) -> None:
        try:
            torch.save({"format": FORMAT, **content}, stream)
        except RuntimeError as error:  # torch's archive writer wraps the OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def keep() -> None:
        if previous is not None and path.exists():
            os.replace(path, previous)

    try:
        write_atomic(path, write, keep)
    except FileError as error:
        kept = "; the last good checkpoint is untouched" if path.exists() else ""
        raise CheckpointError(f"{error}{kept}") from error


def read(path: Path) -> dict[str, Any]:
    """Return a file's content, on the CPU. Raises CheckpointError if it is not a readable mapping.

    Only tensors and plain values are read, so no code in the file is executed.
    """
    try:
        if zipfile.is_zipfile(path):  # torch.load does not verify the archive's checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"damaged, by the checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message advises loading with weights_only=False, which executes code.
        unpickling = isinstance(error, pickle.UnpicklingError)
        reason = NOT_PLAIN if unpickling else first_line(error)
        raise CheckpointError(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no weights by name")
    return content


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content, on the CPU.

    Raises CheckpointError if it is missing, damaged or not a checkpoint of this project.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    content = read(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of proxynorm (format {FORMAT})")
    return content


def load_latest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return a run's newest readable checkpoint (None if there is none), and warnings."""
    faults: list[str] = []
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            try:
                return load(path), [*faults, f"falling back to {path}"] if faults else []
            except CheckpointError as error:
                faults.append(str(error))
    if faults:
        raise CheckpointError(
            f"no readable checkpoint: {'; '.join(faults)}; resume=never starts over"
        )
    return None, []
