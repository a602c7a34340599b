"""The moving line: the step counter first, the figures as the width allows, the bar in what is left."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from proxynorm.train import progress
from proxynorm.train.progress import Display, figures, fit
from proxynorm.train.timing import StepTimer

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
    """What a terminal of `width` columns shows for ROW."""
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, highlight=False, soft_wrap=True
    )
    monkeypatch.setattr(progress, "Console", lambda **arguments: console)
    display = Display(450000, 100)
    display.update(ROW)
    display.bar.stop()
    with console.capture() as capture:
        console.print(display.bar.make_tasks_table(display.bar.tasks))
    return capture.get().rstrip("\n")


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 200])
def test_the_step_counter_is_whole_at_any_width(monkeypatch, width):
    shown = Console(file=io.StringIO()).render_str(line(monkeypatch, width)).plain
    assert "12345/450000" in shown and "\n" not in shown and "…" not in shown


def test_a_wide_terminal_shows_everything(monkeypatch):
    shown = line(monkeypatch, 200)
    for part in (*figures(ROW), "━"):
        assert part in shown


def test_eighty_columns_give_up_the_bar_before_the_time_left(monkeypatch):
    shown = line(monkeypatch, 80)
    assert "loss 2.3456" in shown and "ETA 3:25:45" in shown and "━" not in shown


def test_the_first_step_of_a_start_is_in_no_rate(capsys):
    """It compiles and allocates. A row of it alone has no rates, and the display goes without them."""
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
    assert figures({"loss": 2.0, "lr": 0.1, "gradient_norm": 1.0}) == [
        "loss 2.0000",
        "lr 0.1",
        "gradient 1",
    ]
    Display(9, 1).epoch(
        {"epoch": 1, "step": 1, "loss": 2.0, "top1": 1.0, "top5": 2.0}, 2.5, float("nan"), 3.0
    )
    assert capsys.readouterr().out.split() == ["1/1", "1", "2.5000", "2.0000", "1.00", "2.00", "3"]


def test_figures_leave_out_what_is_not_known():
    assert not [
        part
        for part in figures({key: ROW[key] for key in ROW if key != "gpu_memory_gib"})
        if "GPU" in part
    ]
    assert fit(["abc", "de", "f"], 7) == ("abc  de", 0) and fit(["abc"], 2) == ("", 2)
