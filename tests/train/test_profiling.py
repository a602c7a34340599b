"""debug=profile: a trace, where it lies, and nothing else on the terminal."""

from __future__ import annotations

import json

import torch

from proxynorm.train.timing import profiled


def test_a_trace_is_written_and_named(tmp_path, capfd):
    with profiled(2, tmp_path) as after_step:
        for _ in range(5):
            torch.ones(3).sum()
            after_step()
    path = tmp_path / "trace.json"
    assert any(
        event.get("name") == "aten::sum" for event in json.loads(path.read_text())["traceEvents"]
    )
    shown = capfd.readouterr()
    assert shown.out == f"trace in {path}: open it in https://ui.perfetto.dev\n"
    assert "USDT" not in shown.err and "ERROR" not in shown.err


def test_without_steps_nothing_is_traced(tmp_path):
    with profiled(0, tmp_path) as after_step:
        after_step()
    assert list(tmp_path.iterdir()) == []
