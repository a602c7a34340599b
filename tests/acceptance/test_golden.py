"""Golden losses: the first 20 of every norm. `pytest --renew-golden` stores new ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxynorm.nn import NORMS

GOLDEN = Path(__file__).with_name("golden_losses.json")
# A small learning rate: rounding differs between CPUs and grows to 2 % in 20 steps at 0.02;
# here it stays below 5e-5.
OPTIONS = (
    "model.depth=20",
    "model.width=16",
    "batch=32",
    "max_steps=20",
    "epochs=20",
    "optim.lr=5e-5",
    "micro_batch=16",
)


@pytest.mark.parametrize("norm", NORMS)
def test_losses_are_the_golden_ones(run_small, norm, request):
    losses = [
        row["loss"] for row in run_small(f"norm={norm}", *OPTIONS).rows if row["event"] == "train"
    ]
    assert len(losses) == 20
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--renew-golden"):
        golden[norm] = losses
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    assert losses == pytest.approx(golden[norm], rel=1e-4)
