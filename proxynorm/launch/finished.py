"""Read and check the files of a finished run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from proxynorm.errors import DataError

KEPT = ("config.yaml", "environment.json", "metrics.jsonl", "summary.json")
# The keys that reports read; a file without them is damaged.
SUMMARY = {"steps", "total_steps", "top1", "loss", "train_seconds"}
ENVIRONMENT = {"python", "processor", "cores", "threads", "gpus", "packages", "git"}
ROW = {"event", "step", "epoch"}


class Damaged(ValueError):
    """The file `name` is damaged; `reason` says how."""

    def __init__(self, name: str, reason: object) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def finished_files(folder: Path) -> dict[str, bytes] | None:
    """Read the files KEPT of a completed run; None if it is not completed.

    Raises DataError naming a damaged file.
    """
    files = {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}
    if "summary.json" not in files:
        return None
    try:
        if not parse(files, "summary.json", {"completed"})[0]["completed"]:
            return None
        check_files(files)
    except Damaged as damage:
        remedy = f"remove {folder} and run again"
        if damage.name == "summary.json":
            remedy = "remove it, and the run continues from its checkpoint"
        path = folder / damage.name
        raise DataError(f"{path} is damaged ({damage.reason}); {remedy}") from None
    return files


def check_files(files: Mapping[str, bytes]) -> None:
    """Raises Damaged unless the files KEPT of a finished run are there, parse and agree."""
    parse(files, "config.yaml", {"seed"})
    parse(files, "environment.json", ENVIRONMENT)
    (summary,) = parse(files, "summary.json", SUMMARY)
    evaluations = [row for row in parse(files, "metrics.jsonl", ROW) if row["event"] == "eval"]
    last = evaluations[-1] if evaluations else {}
    # Metrics cut between two lines still parse, but lack the evaluation of the summary.
    if (last.get("step"), last.get("top1")) != (summary["steps"], summary["top1"]):
        raise Damaged("metrics.jsonl", "its last evaluation is not that of summary.json")


def parse(files: Mapping[str, bytes], name: str, keys: set[str]) -> list[dict[str, Any]]:
    """Parse a file: its rows or its one mapping, which must hold `keys`. Raises Damaged."""
    if name not in files:
        raise Damaged(name, "missing")
    content = files[name]
    try:
        if name == "config.yaml":
            values = [yaml.safe_load(content)]
        elif name == "metrics.jsonl":
            values = [parse_json(line) for line in content.splitlines()]
        else:
            values = [parse_json(content)]
    except (yaml.YAMLError, ValueError) as error:
        raise Damaged(name, " ".join(str(error).split())) from None
    if name == "metrics.jsonl" and content and not content.endswith(b"\n"):
        raise Damaged(name, "the last line is cut short")
    for value in values:
        if not isinstance(value, dict) or keys - value.keys():
            raise Damaged(name, f"not an object with {', '.join(sorted(keys))}")
    return values


def parse_json(content: bytes) -> Any:
    """Parse JSON of finite numbers. Raises ValueError."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a finite number")

    return json.loads(content, parse_constant=refuse)
