"""Step times, and the profiler's trace."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from proxynorm.train.progress import StepTimer, profiled
from tests.helpers import ROOT

TRACE = """
import sys
from pathlib import Path
import torch
from proxynorm.train.progress import profiled

with profiled(2, Path(sys.argv[1])) as after_step:
    for _ in range(5):
        torch.ones(3).sum()
        after_step()
"""


def test_a_trace_is_written_and_named(tmp_path):
    """In a process of its own: Kineto asks for its log level once, at the first profiler."""
    command = [sys.executable, "-c", TRACE, str(tmp_path)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    path = tmp_path / "trace.json"
    assert any(
        event.get("name") == "aten::sum" for event in json.loads(path.read_text())["traceEvents"]
    )
    assert shown.stdout == f"trace in {path}: open it in https://ui.perfetto.dev\n"
    assert "USDT" not in shown.stderr and "ERROR" not in shown.stderr


def test_without_steps_nothing_is_traced(tmp_path):
    with profiled(0, tmp_path) as after_step:
        after_step()
    assert list(tmp_path.iterdir()) == []


def test_the_first_step_of_a_start_is_in_no_rate():
    """It compiles and allocates. A row of it alone has no rates."""
    timer = StepTimer(torch.device("cpu"))
    timer.steps, timer.waits = [12.0], [11.0]
    assert timer.row(20, 9) == {}
    timer.steps, timer.waits = [0.5, 0.5, 0.5, 2.0], [0.0] * 4
    row = timer.row(20, 10)
    assert row["images_per_second"] == 22.9 and row["eta_seconds"] == 8.75
    assert row["step_ms_p50"] == 500 and row["step_ms_p95"] <= 2000
    timer = StepTimer(torch.device("cpu"))
    timer.steps, timer.waits = [12.0, 0.5, 0.5], [11.0, 0.0, 0.0]
    assert timer.row(20, 10)["images_per_second"] == 40
