"""The moving line: the step counter first, then the figures that fit."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from proxynorm.train import progress
from proxynorm.train.progress import Display, figures

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
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, highlight=False)
    monkeypatch.setattr(progress, "Console", lambda **arguments: console)
    display = Display(450000, 100)
    display.status.stop()
    display.update(ROW)
    with console.capture() as capture:
        console.print(display.status.renderable)
    return Text.from_ansi(capture.get()).plain.rstrip("\n")


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 200])
def test_the_step_counter_is_whole_at_any_width(monkeypatch, width):
    shown = line(monkeypatch, width)
    assert "12345/450000" in shown and "\n" not in shown and "…" not in shown


def test_a_wide_terminal_shows_everything(monkeypatch):
    shown = line(monkeypatch, 200)
    for part in figures(ROW):
        assert part in shown


def test_eighty_columns_show_the_time_left(monkeypatch):
    shown = line(monkeypatch, 80)
    assert "loss 2.3456" in shown and "ETA 3:25:45" in shown and "gradient" not in shown


def test_a_row_without_rates_is_shown_without_them(capsys):
    assert figures({"loss": 2.0, "lr": 0.1, "gradient_norm": 1.0}) == [
        "loss 2.0000",
        "lr 0.1",
        "gradient 1",
    ]
    display = Display(9, 1)
    display.update({"epoch": 1, "step": 1, "loss": 2.5})
    evaluated = {"loss": 2.0, "top1": 1.0, "top5": 2.0, "train_seconds": 3.0}
    display.epoch({"epoch": 1, "step": 1, **evaluated})
    assert capsys.readouterr().out.split() == ["1/1", "1", "2.5000", "2.0000", "1.00", "2.00", "3"]


def test_figures_leave_out_what_is_not_known():
    assert not [
        part
        for part in figures({key: ROW[key] for key in ROW if key != "gpu_memory_gib"})
        if "GPU" in part
    ]
