"""Read and check the files of a finished run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from proxynorm.errors import DataError

# The files that are kept of a run, with the keys that readers rely on.
KEPT = {
    "config.yaml": {"seed", "epochs"},
    "environment.json": {"python", "processor", "cores", "threads", "gpus", "packages", "git"},
    "metrics.jsonl": {"event", "step", "epoch"},
    "summary.json": {"completed", "steps", "total_steps", "top1", "loss", "train_seconds"},
}


class Damaged(ValueError):
    """A file is damaged. args: its name and the reason."""

    def __str__(self) -> str:
        return ": ".join(self.args)


def finished_files(folder: Path) -> dict[str, bytes] | None:
    """Read the files KEPT of a completed run; None if it is not completed.

    Raises DataError naming a damaged file.
    """
    files = {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}
    if "summary.json" not in files:
        return None
    try:
        if not parse(files, "summary.json")[0]["completed"]:
            return None
        check_files(files)
    except Damaged as damage:
        name, reason = damage.args
        remedy = f"remove {folder} and run again"
        if name == "summary.json":
            remedy = "remove it, and the run continues from its checkpoint"
        raise DataError(f"{folder / name} is damaged ({reason}); {remedy}") from None
    return files


def check_files(files: Mapping[str, bytes]) -> None:
    """Raises Damaged unless the files KEPT of a finished run are there, parse and agree."""
    parsed = {name: parse(files, name) for name in KEPT}
    (summary,) = parsed["summary.json"]
    evaluations = [row for row in parsed["metrics.jsonl"] if row["event"] == "eval"]
    last = evaluations[-1] if evaluations else {}
    # Metrics cut between two lines still parse, but lack the evaluation of the summary.
    if (last.get("step"), last.get("top1")) != (summary["steps"], summary["top1"]):
        raise Damaged("metrics.jsonl", "its last evaluation is not that of summary.json")


def parse(files: Mapping[str, bytes], name: str) -> list[dict[str, Any]]:
    """Parse a file: its rows or its one mapping, with the keys of KEPT. Raises Damaged."""
    if name not in files:
        raise Damaged(name, "missing")
    content, several = files[name], name == "metrics.jsonl"
    if several and content and not content.endswith(b"\n"):
        raise Damaged(name, "the last line is cut short")
    read = yaml.safe_load if name == "config.yaml" else parse_json
    try:
        values = [read(part) for part in (content.splitlines() if several else [content])]
    except (yaml.YAMLError, ValueError) as error:
        raise Damaged(name, " ".join(str(error).split())) from None
    for value in values:
        if not isinstance(value, dict) or KEPT[name] - value.keys():
            raise Damaged(name, f"not an object with {', '.join(sorted(KEPT[name]))}")
    return values


def parse_json(content: bytes) -> Any:
    """Parse JSON of finite numbers. Raises ValueError."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a finite number")

    return json.loads(content, parse_constant=refuse)
