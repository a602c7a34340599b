"""Stored throughputs: how fast runs were, read from their folders and from the archives that are kept of finished ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from proxynorm.errors import DataError
from proxynorm.launch.damage import KEPT
from proxynorm.paper.records import read_archive
from proxynorm.train.run_folder import processor_name

DECIDE_SPEED = ("model", "batch", "micro_batch", "norm_batch", "precision", "compile", "recompute")


@dataclass(frozen=True)
class Measured:
    """A run's images per second at its end. kind: what it was; memory: peak GPU memory in GiB, 0 on a CPU; processor: the
    GPU's name, else the CPU's; processes: how many trained it; table: whose archives it was kept in."""

    kind: str
    images_per_second: float
    memory: float
    processor: str
    processes: int
    table: str = ""


def kind(config: Mapping[str, Any]) -> str:
    """What decides a run's speed on given hardware; runs that agree in it are taken to be equally fast."""
    data = config.get("data", {})
    known = [config.get(key) for key in DECIDE_SPEED]
    known += [config.get("norm", {}).get("name"), data.get("name"), data.get("image_size")]
    return json.dumps(known, sort_keys=True, default=str)


def processor_here() -> str:
    """The GPU of this machine, else its processor."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor_name()


def measured(files: Mapping[str, bytes], table: str = "") -> Measured | None:
    """What a run's files tell; None if they tell no speed. The files may be those of a run that trains just now."""
    try:
        config = yaml.safe_load(files["config.yaml"])
        environment = json.loads(files["environment.json"])
        rows = [json.loads(line) for line in files["metrics.jsonl"].split(b"\n")[:-1]]
        row = [row for row in rows if row["event"] == "train" and "images_per_second" in row][-1]
        gpu = environment.get("device", "cpu").startswith("cuda") and environment["gpus"]
        return Measured(
            kind(config),
            row["images_per_second"],
            row.get("gpu_memory_gib", 0.0),
            environment["gpus"][0] if gpu else environment["processor"],
            environment.get("world_size", 1),
            table,
        )
    except (LookupError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        return None


def in_folders(runs_dir: Path) -> list[Measured]:
    """Of the runs and the probes in a folder of runs."""
    folders = {
        path.parent
        for pattern in ("*", "probe/*")
        for path in runs_dir.glob(f"{pattern}/metrics.jsonl")
    }
    contents = (
        {name: (folder / name).read_bytes() for name in KEPT[:3] if (folder / name).is_file()}
        for folder in sorted(folders)
    )
    return [found for files in contents if (found := measured(files))]


def in_archives(results: Path) -> Iterator[Measured]:
    """Of the runs that are kept of any table; damaged archives are left to the report, which tells."""
    for path in sorted(results.glob("*/runs/*.tar.xz")):
        try:
            found = measured(read_archive(path), table=path.parents[1].name)
        except DataError:
            continue
        if found:
            yield found
