"""Check and measure one GPU: python scripts/gpu_check.py [device=cuda] [minutes=10] [name=NAME]

Checks correctness first, then measures speed. Prints Markdown and writes RESULTS/NAME.md and .json
(results= is results/gpu by default, name= the GPU's name). Needs only torch: a check that needs
another package is skipped, naming it, if it is missing. device=cpu runs a few small cases to
try the script; speed means nothing there. The exit status is 1 if something is wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import gpu_speed
from benchmarks.gpu_speed import Machine, Skipped, device_name
from proxynorm.analysis.tables import markdown_table
from tests.gpu import layers, training

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the runs that compare bits

OPTIONS = {"device": "cuda", "minutes": "10", "name": "", "results": "results/gpu"}
CHECKS = {
    "Machine": gpu_speed.facts,
    "Waits for the device in a step": layers.syncs,
    "Training": training.training,
    "Two GPUs": training.processes,
    "Layers against float64": layers.norms,
    "Bytes an element, forward and backward, (64, 256, 56, 56), bf16": gpu_speed.traffic,
    "Training steps, bf16": gpu_speed.networks,
    "The training loop, images/s": gpu_speed.engine,
}
# When the long checks have to end, as shares of the time, so that none takes all of it.
ENDS = {"Layers against float64": 0.4, "Training steps, bf16": 0.9}


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if unknown := given.keys() - OPTIONS:
        return fail(f"no option '{min(unknown)}'; valid: {', '.join(OPTIONS)}")
    options = OPTIONS | given
    try:
        device, minutes = torch.device(options["device"]), float(options["minutes"])
    except (RuntimeError, ValueError) as error:
        return fail(f"device= or minutes=: {str(error).splitlines()[0]}")
    if device.type == "cuda" and not torch.cuda.is_available():
        return fail("torch finds no CUDA device; device=cpu runs small cases without one")
    machine = Machine(device)
    name = device_name(device)
    path = Path(options["results"]) / (options["name"] or name.lower().replace(" ", "_"))
    path.parent.mkdir(parents=True, exist_ok=True)
    results, text = {}, []

    def report(part: str) -> None:
        text.append(part)
        print(part, flush=True)

    report(f"# {name}\n")
    if not machine.on_gpu:
        report("On a CPU: small cases that check correctness only; speed means nothing here.\n")
    start = time.monotonic()
    for title, check in CHECKS.items():
        machine.deadline = start + 60 * minutes * ENDS.get(title, 1.0)
        rows, skipped = collect(machine, title, check(machine))
        results[title] = {"rows": rows, "skipped": skipped}
        report(f"## {title}\n")
        if rows:
            grid = [[*rows[0]], *(list(map(str, row.values())) for row in rows)]
            report(f"{markdown_table(grid)}\n")
        if skipped:
            report(f"Skipped: {skipped}.\n")
    report("\n".join(f"- wrong: {what}" for what in machine.failures) or "Nothing is wrong.")
    content = {"checks": results, "failures": machine.failures}
    Path(f"{path}.json").write_text(json.dumps(content, indent=1) + "\n")
    Path(f"{path}.md").write_text("\n".join(text) + "\n")
    print(f"\nwritten: {path}.md and .json")
    return 1 if machine.failures else 0


def collect(machine: Machine, title: str, check: Iterator[dict]) -> tuple[list[dict], str | None]:
    """Run a check; return its rows, and the reason if it, or the rest of it, was skipped."""
    rows = []
    try:
        for row in check:
            rows.append(row)
    except Skipped as reason:
        return rows, str(reason)
    except Exception as error:  # the other checks still run
        machine.expect(False, f"{title}: {type(error).__name__}: {str(error).splitlines()[:1]}")
        traceback.print_exc()
    return rows, None


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
