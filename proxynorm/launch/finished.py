"""Read and check the files of a finished run."""

from __future__ import annotations

import json
import lzma
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from proxynorm.errors import DataError, ProxynormError

# The files that are kept of a run, with the keys that readers rely on.
KEPT = {
    "config.yaml": {"seed", "epochs"},
    "environment.json": {"python", "processor", "cores", "threads", "gpus", "packages", "git"},
    "metrics.jsonl": {"event", "step", "epoch"},
    "summary.json": {"completed", "steps", "total_steps", "top1", "loss", "train_seconds"},
}
READ_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError)
READ_ERRORS += (EOFError, yaml.YAMLError, tarfile.TarError, lzma.LZMAError, ProxynormError)


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Raise DataError, in one line, if the block finds `place`, a file or folder, damaged."""
    try:
        yield
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{place} is damaged ({reason}); remove it and run again") from error


def finished_files(folder: Path) -> dict[str, bytes] | None:
    """Read the files KEPT of a completed run; None if it is not completed. Raises DataError."""
    files = {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}
    if "summary.json" not in files:
        return None
    with reading(folder / "summary.json"):  # without it, the run continues from its checkpoint
        (summary,) = parse(files, "summary.json")
    if not summary["completed"]:
        return None
    with reading(folder):
        check_files(files)
    return files


def check_files(files: Mapping[str, bytes]) -> None:
    """Raise ValueError unless the files KEPT of a finished run are there, parse and agree."""
    parsed = {name: parse(files, name) for name in KEPT}
    (summary,) = parsed["summary.json"]
    evaluations = [row for row in parsed["metrics.jsonl"] if row["event"] == "eval"]
    last = evaluations[-1] if evaluations else {}
    # Metrics cut between two lines still parse, but lack the evaluation of the summary.
    if [last.get(key) for key in ("step", "top1", "loss")] != [
        summary[key] for key in ("steps", "top1", "loss")
    ]:
        raise ValueError("metrics.jsonl: its last evaluation is not that of summary.json")


def parse(files: Mapping[str, bytes], name: str) -> list[dict[str, Any]]:
    """Parse a file: its rows or its one mapping, with the keys of KEPT. Raises ValueError."""
    if name not in files:
        raise ValueError(f"{name} is missing")
    parts = files[name].splitlines() if name == "metrics.jsonl" else [files[name]]
    try:
        values = [(yaml.safe_load if name == "config.yaml" else json.loads)(part) for part in parts]
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    for value in values:
        if not isinstance(value, dict) or KEPT[name] - value.keys():
            raise ValueError(f"{name}: not an object with {', '.join(sorted(KEPT[name]))}")
    return values
