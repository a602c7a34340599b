"""Finished runs as records: read from run folders or from the archives that are kept, and put into such archives."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxynorm.errors import DataError
from proxynorm.files import write_atomic
from proxynorm.reproduce.runs import Run, read_summary
from proxynorm.train.run_folder import read_metrics

KEPT = ("config.yaml", "environment.json", "metrics.jsonl", "summary.json")


@dataclass(frozen=True)
class Record:
    """What a finished run leaves: its cell's name, seed, summary, environment and the rows of metrics.jsonl."""

    cell: str
    seed: int
    summary: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]


def archive_path(run: Run, results: str | Path) -> Path:
    """Where the run is kept: a tar archive that unpacks to its folder."""
    return Path(results) / run.table / "runs" / f"{run.name}.tar.xz"


def read_record(run: Run, results: str | Path) -> Record | None:
    """The finished run from its folder, else from its archive; None if there is neither. Raises DataError."""
    if read_summary(run.folder) is not None:
        contents = {name: (run.folder / name).read_bytes() for name in KEPT}
        rows = read_metrics(run.folder / "metrics.jsonl")
    elif archive_path(run, results).is_file():
        contents = read_archive(archive_path(run, results))
        rows = [json.loads(line) for line in contents["metrics.jsonl"].splitlines()]
    else:
        return None
    return Record(run.cell.name, run.seed, json.loads(contents["summary.json"]), json.loads(contents["environment.json"]), rows)


def read_archive(path: Path) -> dict[str, bytes]:
    """The kept files of an archive by name. Raises DataError if it is damaged or incomplete."""
    try:
        with tarfile.open(path, "r:xz") as archive:
            contents = {Path(member.name).name: archive.extractfile(member).read() for member in archive if member.isfile()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); collect the run again") from error
    missing = [name for name in KEPT if name not in contents]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; collect the run again")
    return contents


def collect(run: Run, results: str | Path) -> bool:
    """Keep a finished run as an archive; False if it is not finished or kept already, equal in content."""
    if read_summary(run.folder) is None:
        return False
    contents = {name: (run.folder / name).read_bytes() for name in KEPT}
    path = archive_path(run, results)
    if path.is_file() and read_archive(path) == contents:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda stream: write_archive(stream, run.name, contents))
    return True


def write_archive(stream: io.BufferedIOBase, folder: str, contents: dict[str, bytes]) -> None:
    """A tar of folder/name for each of `contents`, without dates and owners, so that equal runs give equal archives."""
    with tarfile.open(fileobj=stream, mode="w:xz", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
