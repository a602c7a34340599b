"""Whether the files of a finished run are whole: each is what train.py writes, and the last evaluation is the summary's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from proxynorm.errors import DataError

KEPT = ("config.yaml", "environment.json", "metrics.jsonl", "summary.json")
FIGURES = {
    "steps": math.inf,
    "total_steps": math.inf,
    "top1": 100,
    "train_seconds": math.inf,
}  # of a summary: from 0 to this
MACHINE = {
    "python": str,
    "processor": str,
    "cores": int,
    "threads": int,
    "gpus": list,
    "packages": dict,
    "git": dict,
}
REMEDIES = {
    "summary.json": "remove it, and the run goes on from its checkpoint",
    "environment.json": "remove it and summary.json, and the run goes on from its checkpoint",
}


class Damaged(ValueError):
    """What is wrong with the file `name`."""

    def __init__(self, name: str, words: str) -> None:
        super().__init__(f"{name}: {words}")
        self.name, self.words = name, words


def folder_error(folder: Path, damage: Damaged) -> DataError:
    """The line for a file of a run folder, and what to do about it."""
    remedy = REMEDIES.get(damage.name, f"remove {folder}, and run again")
    return DataError(f"{folder / damage.name} is damaged ({damage.words}); {remedy}")


def parse_summary(content: bytes) -> dict[str, Any]:
    """The summary of a run that need not be complete. Raises Damaged."""
    summary = _object("summary.json", content)
    if not isinstance(summary.get("completed"), bool):
        raise Damaged("summary.json", "it does not say whether the run is complete")
    if summary["completed"]:
        for key, most in FIGURES.items():
            if not (_is_finite(summary.get(key)) and 0 <= summary[key] <= most):
                raise Damaged("summary.json", f"{key} is {summary.get(key, 'missing')}")
        if summary["steps"] > summary["total_steps"]:
            raise Damaged(
                "summary.json", f"steps is {summary['steps']}, of {summary['total_steps']}"
            )
    return summary


def check_finished(read: Callable[[str], bytes | None]) -> None:
    """Raises Damaged unless the files KEPT of a finished run, which `read` gives by name, are whole and agree."""
    files = {name: read(name) for name in KEPT}
    for name, content in files.items():
        if content is None:
            raise Damaged(name, "it is missing")
    summary = parse_summary(files["summary.json"])
    loss = summary.get("loss", "missing")
    if not (loss is None or _is_finite(loss)):  # None: it was not finite
        raise Damaged("summary.json", f"loss is {loss}")
    _check_config(files["config.yaml"])
    _check_environment(files["environment.json"])
    _check_metrics(files["metrics.jsonl"], summary)


def _check_config(content: bytes) -> None:
    try:
        config = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Damaged("config.yaml", " ".join(str(error).split())) from None
    if not isinstance(config, dict):
        raise Damaged("config.yaml", "it has no keys")


def _check_environment(content: bytes) -> None:
    environment = _object("environment.json", content)
    for key, kind in MACHINE.items():
        if not isinstance(environment.get(key), kind):
            raise Damaged("environment.json", f"{key} is {environment.get(key, 'missing')}")
    if not all(isinstance(name, str) for name in environment["gpus"]):
        raise Damaged("environment.json", f"gpus is {environment['gpus']}")
    git = environment["git"]
    if "torch" not in environment["packages"] or (git and not {"commit", "dirty"} <= git.keys()):
        raise Damaged("environment.json", "torch's version, or the commit, is missing")


def _check_metrics(content: bytes, summary: Mapping[str, Any]) -> None:
    """Every row is whole, the steps of each kind of row rise, and the last evaluation is that of the summary."""
    name = "metrics.jsonl"
    if content and not content.endswith(b"\n"):
        raise Damaged(name, "its last line is cut short")
    evaluations: list[dict[str, Any]] = []
    steps: dict[str, float] = {}
    for number, line in enumerate(content.splitlines(), 1):
        row = _object(name, line, f"line {number}: ")
        if not (
            _is_finite(row.get("step"))
            and _is_finite(row.get("epoch"))
            and isinstance(row.get("event"), str)
        ):
            raise Damaged(name, f"line {number} lacks event, step or epoch")
        if row["step"] <= steps.get(row["event"], -1):
            raise Damaged(
                name,
                f"line {number} is of step {row['step']}, the {row['event']} row before it of {steps[row['event']]}",
            )
        steps[row["event"]] = row["step"]
        evaluations += [row] if row["event"] == "eval" else []
    last = evaluations[-1] if evaluations else {}
    was, said = (last.get("step"), last.get("top1")), (summary["steps"], summary["top1"])
    if was != said:
        what = (
            f"the last evaluation is of step {was[0]}, top1 {was[1]}"
            if last
            else "there is no evaluation"
        )
        raise Damaged(name, f"{what}; summary.json says step {said[0]}, top1 {said[1]}")


def _object(name: str, content: bytes, where: str = "") -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise Damaged(name, f"{where}{error}" if content.strip() else f"{where}empty") from None
    if not isinstance(value, dict):
        raise Damaged(name, f"{where}no JSON object")
    return value


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
