"""A run's folder: its lock, configuration, metrics, checkpoints and summary."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from proxynorm.errors import ConfigError, DataError
from proxynorm.files import finite, locked, write_text, writing

# The packages and the properties of the machine that floating-point results may depend on.
NUMERIC = ("torch", "torchvision", "timm", "ffcv", "numpy")
MACHINE = ("python", "processor", "gpus", "cuda", "threads", "device")
PACKAGES = ("proxynorm", *NUMERIC, "hydra-core", "wandb")


class RunFolder:
    """The files of one run, with an exclusive lock while it trains."""

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

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder and keep other processes from training in it.

        Raises FileError if one does, or ConfigError if the folder cannot be written.
        """
        lock = self.path / ".lock"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock.touch()
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {self.path}: {error.strerror}; "
                "choose another runs_dir="
            ) from None
        holder = lock.read_text().strip() or "another process"
        busy = f"{self.path} is in use by {holder}; wait for it, or choose another name="
        with locked(lock, busy):
            with writing(lock):
                lock.write_text(f"{socket.gethostname()} pid {os.getpid()}")
            for item in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
                item.unlink()  # left by a process that was killed
            yield

    def clear(self) -> None:
        """Delete the files of a former run, and nothing else in the folder."""
        files = (self.last, self.previous, self.best, self.metrics, self.environment)
        for path in (*files, self.summary, self.curves):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path / "wandb", ignore_errors=True)

    def rewind(self, step: int, evaluated: int) -> None:
        """Drop the rows after `step`, and those at `step` of measurements that will be repeated."""

        def is_kept(row: dict[str, Any]) -> bool:
            at_step = row["step"] == step and (row["event"] == "train" or evaluated == step > 0)
            return row["step"] < step or at_step

        rows = [row for row in read_metrics(self.metrics) if is_kept(row)]
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl; null stands for NaN and infinity.

        Raises FileError if the disk is full. The next start of the run drops an incomplete line.
        """
        with writing(self.metrics), open(self.metrics, "a") as stream:
            stream.write(json.dumps(finite(row)) + "\n")

    def sync_metrics(self) -> None:
        """Flush the rows to disk."""
        with writing(self.metrics), open(self.metrics, "a") as stream:
            os.fsync(stream.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl, without an incomplete last line. Raises DataError if it is damaged."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: a line is not JSON ({error}); remove that line"
        ) from None


def environment() -> dict[str, Any]:
    """Return the versions, the hardware and the source commit."""
    versions, source = {}, {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if commit := git("rev-parse", "HEAD"):
        source = {"commit": commit, "dirty": bool(git("status", "--porcelain", "-uno"))}
    return {
        "python": sys.version.split()[0],
        "packages": versions,
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "git": source,
    }


def numeric_environment(environment: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an environment that floating-point results may depend on."""
    machine = {key: environment.get(key) for key in MACHINE}
    return machine | {key: environment["packages"].get(key) for key in NUMERIC}


def git(*arguments: str) -> str | None:
    """Return git's output about the source tree; None outside of a checkout or if git fails."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: git would find an unrelated repository
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor_name() -> str:
    """Return the processor's model as the system names it."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"(?m)^model name\s*: (.*)$", file.read_text()) if file.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
