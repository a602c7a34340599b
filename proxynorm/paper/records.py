"""Records of finished and failed runs: reading, archives, and the check of their recipe."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from proxynorm.errors import ConfigError, DataError
from proxynorm.files import write_atomic
from proxynorm.launch.status import RUN_FILES, finished_files, reading, run_status
from proxynorm.paper.table import TableRun
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.settings import differences, identity

FAILURE = "failure.txt"  # why a run failed; takes the place of its summary


@dataclass(frozen=True)
class Record:
    """The files, by name, of a finished or failed run. path: its folder or archive."""

    run: TableRun
    path: Path
    files: dict[str, bytes]

    @property
    def cell(self) -> str:
        return self.run.cell.name

    @property
    def failure(self) -> str:
        """Why the run failed; "" if it finished."""
        return self.files.get(FAILURE, b"").decode().strip()

    @cached_property
    def summary(self) -> dict[str, Any]:
        with reading(self.path, "summary.json"):
            return json.loads(self.files["summary.json"])

    @cached_property
    def environment(self) -> dict[str, Any]:
        with reading(self.path, "environment.json"):
            return json.loads(self.files["environment.json"])

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        with reading(self.path, "metrics.jsonl"):
            return [json.loads(line) for line in self.files["metrics.jsonl"].splitlines()]

    def check(self) -> None:
        """Raise DataError unless the metrics hold the evaluation that the summary names."""
        rows, steps = self.rows, self.summary["steps"]
        with reading(self.path, "metrics.jsonl"):
            if not any(row["event"] == "eval" and row["step"] == steps for row in rows):
                raise ValueError("the last evaluation is missing")


def read_record(run: TableRun, results: str | Path) -> Record | None:
    """Read a run from its folder, else from its archive; None if it has not ended.

    Raises DataError for damaged files.
    """
    return folder_record(run) or kept_record(run, results)


def folder_record(run: TableRun) -> Record | None:
    """Read a run from its folder; None if it has not ended."""
    files = finished_files(run.folder)
    if files is None:
        status = run_status(run)
        if status.state == "damaged":
            raise DataError(status.error)
        if status.state != "failed":
            return None
        paths = [run.folder / name for name in RUN_FILES if name != "summary.json"]
        files = {path.name: path.read_bytes() for path in paths if path.is_file()}
        files[FAILURE] = f"{status.error}\n".encode()
    if "config.yaml" in files:  # leave out the path on this machine
        line = f"runs_dir: runs/{run.table}".encode()
        files["config.yaml"] = re.sub(rb"(?m)^runs_dir: .*$", line, files["config.yaml"])
    return Record(run, run.folder, files)


def archive_path(run: TableRun, results: str | Path) -> Path:
    """Return the path of the run's archive: results/TABLE/runs/NAME.tar.xz."""
    return Path(results) / run.table / "runs" / f"{run.name}.tar.xz"


def kept_record(run: TableRun, results: str | Path) -> Record | None:
    """Read a run from its archive; None if there is none."""
    path = archive_path(run, results)
    if not path.exists():
        return None
    with reading(path):
        with tarfile.open(path, "r:xz") as archive:
            members = [member for member in archive if member.isfile()]
            files = {Path(item.name).name: archive.extractfile(item).read() for item in members}
    return Record(run, path, files)


def collect(run: TableRun, results: str | Path) -> bool:
    """Archive a finished or failed run. Returns False if there is nothing new to archive.

    Raises DataError for a damaged run.
    """
    record, kept = folder_record(run), kept_record(run, results)
    if record is None or (kept and kept.files == record.files):
        return False
    if FAILURE not in record.files:
        record.check()  # metrics that were cut off between two lines can still be read
    path = archive_path(run, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda stream: write_archive(stream, run.name, record.files))
    return True


def write_archive(stream: io.BufferedIOBase, folder: str, files: dict[str, bytes]) -> None:
    """Write a tar of folder/NAME without dates and owners, so that equal runs give equal bytes."""
    with tarfile.open(fileobj=stream, mode="w:xz", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))


def refuse_other_recipes(runs: Sequence[TableRun], results: str | Path) -> None:
    """Raise ConfigError for finished runs of another recipe."""
    if others := other_recipes(runs, results):
        (first, changed), paths = others[0], ", ".join(str(record.path) for record, _ in others)
        raise ConfigError(
            f"{first.run.name} was not trained as its table says ({changed}); remove {paths}, or "
            "keep the former values by train=[KEY=VALUE]"
        )


def other_recipes(runs: Sequence[TableRun], results: str | Path) -> list[tuple[Record, str]]:
    """Find finished runs of another recipe, with what differs. Raises DataError, ConfigError."""
    others = []
    for run in runs:
        record = read_record(run, results)
        if record is None or record.failure:
            continue
        expected = {**table_recipe(run.kind), "seed": run.seed}
        with reading(record.path):  # keys that an old file lacks get their defaults
            trained = recipe(OmegaConf.create(yaml.safe_load(record.files["config.yaml"])))
        if changed := differences(trained, expected):
            others.append((record, changed))
    return others


@cache  # composing is slow, and the seeds of a cell share its recipe
def table_recipe(arguments: tuple[str, ...]) -> dict[str, Any]:
    return recipe(compose_config(arguments))


def recipe(config: DictConfig) -> dict[str, Any]:
    """Return the settings that determine the result of a training run."""
    # A table does not say where the data lie, and the result does not depend on it.
    if OmegaConf.is_missing(config.data, "root"):
        config.data.root = None
    settings = settings_from(config)
    return {**identity(settings), "max_steps": settings.max_steps}
