"""Finished runs as records: read from run folders or from the archives that are kept, and put into such archives."""

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
from proxynorm.launch.damage import KEPT, Damaged, check_finished
from proxynorm.launch.runs import Run, Standing, check_folder, read_summary, standing

FAILURE = "failure.txt"  # of a run that failed, in place of its summary: why
REMEDY = "remove it, and collect the run again"  # of a damaged archive


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


def run_files(run: Run) -> dict[str, bytes] | None:
    """The files to keep of a finished or failed run; None of any other. Raises DataError if it is damaged."""
    if read_summary(run.folder) is None:
        now = standing(run)
        if now.state == "damaged":
            raise DataError(now.error)
        if now.state != "failed":
            return None
        kept = {name: _content(run, name) for name in KEPT[:3] if (run.folder / name).is_file()}
        return {**kept, FAILURE: f"{now.error}\n".encode()}
    check_folder(run.folder)
    return {name: _content(run, name) for name in KEPT}


def _content(run: Run, name: str) -> bytes:
    """A file of the run's folder; config.yaml without the path under which this machine has it."""
    content = (run.folder / name).read_bytes()
    if name != "config.yaml":
        return content
    return re.sub(
        rb"^runs_dir: .*$", f"runs_dir: runs/{run.table}".encode(), content, flags=re.MULTILINE
    )


def kept_files(run: Run, results: str | Path) -> dict[str, bytes] | None:
    """The run's files from its folder, else from its archive; None if neither tells an end. Raises DataError."""
    path, files = archive_path(run, results), run_files(run)
    return read_archive(path) if files is None and path.exists() else files


def kept_standing(run: Run, results: str | Path) -> Standing | None:
    """How the run ended that is kept as an archive alone, without a folder; None for any other. Raises DataError."""
    path = archive_path(run, results)
    if run.folder.exists() or not path.exists():
        return None
    files = read_archive(path)
    if FAILURE in files:
        return Standing("failed", error=f"{files[FAILURE].decode().strip()} (kept in {results})")
    summary = json.loads(files["summary.json"])
    return Standing(
        "done", summary["steps"], summary["steps"], summary["loss"], note=f"kept in {results}"
    )


def as_record(run: Run, files: dict[str, bytes]) -> Record:
    """The record of a finished run's files."""
    rows = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    return Record(
        run.cell.name,
        run.seed,
        json.loads(files["summary.json"]),
        json.loads(files["environment.json"]),
        rows,
    )


def read_archive(path: Path) -> dict[str, bytes]:
    """The kept files of an archive by name. Raises DataError if it is damaged or incomplete."""
    try:
        with tarfile.open(path, "r:xz") as archive:
            contents = {
                Path(member.name).name: archive.extractfile(member).read()
                for member in archive
                if member.isfile()
            }
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); {REMEDY}") from error
    try:
        if FAILURE not in contents:
            check_finished(contents.get)
    except Damaged as damage:
        raise DataError(f"{path} is damaged ({damage}); {REMEDY}") from None
    return contents


def collect(run: Run, results: str | Path) -> bool:
    """Keep a finished or failed run as an archive; False if it is neither, or kept already, equal in content."""
    contents, path = run_files(run), archive_path(run, results)
    if contents is None or (path.exists() and read_archive(path) == contents):
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
