"""The progress bar: the step counter first, then the metrics that fit. Step times; a trace."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from rich.text import Text

from proxynorm.train import progress
from proxynorm.train.progress import Display, StepTimer, format_metrics, profiled
from tests.helpers import ROOT

ROW = {
    "step": 12345,
    "epoch": 12.34,
    "loss": 2.3456,
    "lr": 0.01234,
    "images_per_second": 1234.5,
    "data_wait": 0.25,
    "gradient_norm": 1.234,
    "step_ms_p50": 51.23,
    "step_ms_p95": 101.2,
    "eta_seconds": 12345.0,
    "gpu_memory_gib": 12.34,
}


def line(monkeypatch, width: int) -> str:
    """Return what a terminal of `width` columns shows for ROW."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, highlight=False)
    monkeypatch.setattr(progress, "Console", lambda **arguments: console)
    display = Display(450000, 100)
    display.update(ROW)
    with console.capture() as capture:
        console.print(display.bar.get_renderable())
    return Text.from_ansi(capture.get()).plain.rstrip("\n")


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 200])
def test_the_step_counter_is_whole_at_any_width(monkeypatch, width):
    shown = line(monkeypatch, width)
    assert "12345/450000" in shown and "\n" not in shown


def test_a_wide_terminal_shows_everything(monkeypatch):
    shown = line(monkeypatch, 200)
    for part in format_metrics(ROW):
        assert part in shown


def test_eighty_columns_show_the_time_left(monkeypatch):
    shown = line(monkeypatch, 80)
    assert "loss 2.3456" in shown and "ETA 3:25:45" in shown and "gradient" not in shown


def test_a_row_without_rates_is_shown_without_them(capsys):
    assert format_metrics({"loss": 2.0, "lr": 0.1, "gradient_norm": 1.0}) == [
        "loss 2.0000",
        "lr 0.1",
        "gradient 1",
    ]
    display = Display(9, 1)
    display.update({"epoch": 1, "step": 1, "loss": 2.5})
    evaluated = {"loss": 2.0, "top1": 1.0, "top5": 2.0, "train_seconds": 3.0}
    display.epoch({"epoch": 1, "step": 1, **evaluated})
    assert capsys.readouterr().out.split() == ["1/1", "1", "2.5000", "2.0000", "1.00", "2.00", "3"]


def test_unknown_figures_are_left_out():
    assert not [
        part
        for part in format_metrics({key: ROW[key] for key in ROW if key != "gpu_memory_gib"})
        if "GPU" in part
    ]


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
    """In a process of its own: Kineto reads its log level once, at the first profiler."""
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


def test_rates_leave_out_the_first_step_of_a_start():
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
