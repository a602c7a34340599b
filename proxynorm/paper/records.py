"""Runs that have ended, from their folders or from the archives in results/TABLE/runs."""

from __future__ import annotations

import io
import json
import lzma
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxynorm.errors import DataError
from proxynorm.files import write_atomic
from proxynorm.launch.finished import KEPT, Damaged, check_files, finished_files
from proxynorm.launch.status import Status, done_status, run_status
from proxynorm.paper.table import TableRun

FAILURE = "failure.txt"  # replaces the summary of a failed run: the reason


@dataclass(frozen=True)
class Record:
    """A finished run: cell, seed, summary, environment and the rows of metrics.jsonl."""

    cell: str
    seed: int
    summary: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]


def archive_path(run: TableRun, results: str | Path) -> Path:
    """Where the run is kept: a tar archive that unpacks to its folder."""
    return Path(results) / run.table / "runs" / f"{run.name}.tar.xz"


def run_files(run: TableRun) -> dict[str, bytes] | None:
    """The files to keep of a finished or failed run; None for any other. Raises DataError."""
    files = finished_files(run.folder)
    if files is None:
        now = run_status(run)
        if now.state == "damaged":
            raise DataError(now.error)
        if now.state != "failed":
            return None
        paths = [run.folder / name for name in KEPT if name != "summary.json"]
        files = {path.name: path.read_bytes() for path in paths if path.is_file()}
        files[FAILURE] = f"{now.error}\n".encode()
    if "config.yaml" in files:  # the path of the runs on this machine is nobody else's
        line = f"runs_dir: runs/{run.table}".encode()
        files["config.yaml"] = re.sub(rb"(?m)^runs_dir: .*$", line, files["config.yaml"])
    return files


def kept_files(run: TableRun, results: str | Path) -> dict[str, bytes] | None:
    """The run's files from its folder, else from its archive; None if it has not ended.

    Raises DataError for damaged files.
    """
    path, files = archive_path(run, results), run_files(run)
    return read_archive(path) if files is None and path.exists() else files


def kept_status(run: TableRun, results: str | Path) -> Status | None:
    """The status of a run kept as an archive alone; None for any other. Raises DataError."""
    path = archive_path(run, results)
    if run.folder.exists() or not path.exists():
        return None
    files, note = read_archive(path), f"kept in {results}"
    if FAILURE in files:
        return Status("failed", error=f"{files[FAILURE].decode().strip()} ({note})")
    return done_status(json.loads(files["summary.json"]), note)


def as_record(run: TableRun, files: dict[str, bytes]) -> Record:
    """The record of a finished run's files."""
    rows = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    summary, environment = (json.loads(files[f"{key}.json"]) for key in ("summary", "environment"))
    return Record(run.cell.name, run.seed, summary, environment, rows)


def read_archive(path: Path) -> dict[str, bytes]:
    """The files of an archive by name. Raises DataError if it is damaged or incomplete."""
    try:
        with tarfile.open(path, "r:xz") as archive:
            members = [member for member in archive if member.isfile()]
            files = {Path(item.name).name: archive.extractfile(item).read() for item in members}
        if FAILURE not in files:
            check_files(files)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, Damaged) as error:
        raise DataError(
            f"{path} is damaged ({error}); remove it, and collect the run again"
        ) from error
    return files


def collect(run: TableRun, results: str | Path) -> bool:
    """Keep a finished or failed run as an archive; False if there is nothing new to keep."""
    files, path = run_files(run), archive_path(run, results)
    if files is None or (path.exists() and read_archive(path) == files):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda stream: write_archive(stream, run.name, files))
    return True


def write_archive(stream: io.BufferedIOBase, folder: str, files: dict[str, bytes]) -> None:
    """Write a tar of folder/name, without dates and owners: equal runs give equal archives."""
    with tarfile.open(fileobj=stream, mode="w:xz", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
