"""A run's folder: its lock, configuration, metrics, checkpoints and summary."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from proxynorm.errors import CheckpointError, ConfigError, DataError
from proxynorm.files import finite, write_json, write_text, writing

NUMERIC = (
    "torch",
    "torchvision",
    "timm",
    "ffcv",
    "numpy",
)  # the packages whose versions may change the bits
PACKAGES = ("proxynorm", *NUMERIC, "hydra-core", "wandb")
MACHINE = (
    "python",
    "processor",
    "gpus",
    "cuda",
    "threads",
    "device",
)  # what else of the environment may
SUMMARY = ("completed", "steps", "total_steps", "top1")  # what a summary is read for


class RunFolder:
    """Paths and files of one run, held under an exclusive lock while it trains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.previous = self.checkpoints / "previous.pt"
        self.best = self.checkpoints / "best.pt"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self._lock: Any = None

    def acquire(self) -> None:
        """Create the folder and lock it. Raises ConfigError naming the holder if another process trains there."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            stream = open(self.path / ".lock", "ab+", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {self.path}: {error.strerror}; choose another runs_dir="
            ) from None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            holder = stream.read().decode().strip() or "another process"
            stream.close()
            raise ConfigError(
                f"{self.path} is in use by {holder}; wait for it, or choose another name="
            ) from None
        self._lock = stream
        with writing(self.path / ".lock"):
            stream.truncate(0)
            stream.write(f"{socket.gethostname()} pid {os.getpid()}".encode())

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Forget a former run: its files, and nothing else that may lie in the folder."""
        for path in (
            self.last,
            self.previous,
            self.best,
            self.metrics,
            self.environment,
            self.summary,
            self.curves,
        ):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path / "wandb", ignore_errors=True)
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Temporary files that a killed writer left."""
        for folder in (self.path, self.checkpoints):
            for item in folder.glob(".*.tmp"):
                item.unlink()

    def write_config(self, text: str) -> None:
        write_text(self.config, text)

    def write_environment(self, environment: dict[str, Any], saved: bool) -> None:
        """environment.json: `environment`, and whether a checkpoint was ever saved here."""
        write_json(self.environment, {**environment, "saved": saved})

    def mark_saved(self) -> None:
        """Note at the first save that there is a checkpoint to lose."""
        stored = self.read_environment()
        if stored is not None and not stored.get("saved"):
            self.write_environment(stored, saved=True)

    def read_environment(self) -> dict[str, Any] | None:
        """environment.json as the last start wrote it; None if it is missing or damaged."""
        try:
            stored = json.loads(self.environment.read_text())
            return stored if isinstance(stored["packages"], dict) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def read_summary(self) -> dict[str, Any]:
        """summary.json. Raises CheckpointError if it is damaged."""
        return read_summary(self.summary)

    def read_rows(self) -> list[dict[str, Any]]:
        """The complete rows of metrics.jsonl; a last line cut short by a kill is left out."""
        return read_metrics(self.metrics)

    def rewind(self, step: int, evaluated: int) -> None:
        """Drop the rows after weight update `step`, and those of an evaluation at it that is to be made again."""

        def stays(row: dict[str, Any]) -> bool:
            return row["step"] < step or (
                row["step"] == step and (row["event"] == "train" or evaluated == step)
            )

        rows = [row for row in self.read_rows() if stays(row)]
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: dict[str, Any]) -> None:
        """Add one complete line to metrics.jsonl, or nothing; null stands for what is not a finite number. Raises FileError."""
        line = (json.dumps(finite(row)) + "\n").encode()
        with writing(self.metrics), open(self.metrics, "ab", buffering=0) as stream:
            size = stream.tell()
            try:
                while line:  # a disk that fills up takes a part, and refuses the rest
                    line = line[stream.write(line) :]
            except OSError:
                stream.truncate(size)
                raise

    def sync_metrics(self) -> None:
        """Make the rows durable that a checkpoint is about to take for written."""
        if self.metrics.exists():
            with writing(self.metrics), open(self.metrics, "rb") as stream:
                os.fsync(stream.fileno())

    def lost_checkpoint(self) -> bool:
        """Whether a checkpoint was here once: there is one after the first save, evaluation or end of a start."""
        rows = self.read_rows()
        first = next((row["step"] for row in rows if row["event"] == "eval"), None)
        evaluated = first is not None and rows[-1]["step"] > first
        return (
            self.summary.exists() or evaluated or bool((self.read_environment() or {}).get("saved"))
        )


def read_summary(path: Path) -> dict[str, Any]:
    """A run's summary.json. Raises CheckpointError if it is damaged."""
    try:
        summary = json.loads(path.read_text())
    except ValueError:
        summary = None
    if not isinstance(summary, dict) or any(key not in summary for key in SUMMARY):
        raise CheckpointError(
            f"{path} is damaged; remove it, and the run goes on from its checkpoint"
        )
    return summary


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that is incomplete."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: a line is not JSON ({error}); remove that line"
        ) from None


def git_state() -> dict[str, Any]:
    """Commit of the source tree and whether it had changes; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root)]
    try:
        commit = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def processor_name() -> str:
    """The processor's model as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def bits(environment: dict[str, Any]) -> dict[str, Any]:
    """The part of an environment that rounding may depend on."""
    return {key: environment.get(key) for key in MACHINE} | {
        key: environment["packages"].get(key) for key in NUMERIC
    }


def environment() -> dict[str, Any]:
    """Versions, hardware and source commit: what one needs to make the run again."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "git": git_state(),
    }
