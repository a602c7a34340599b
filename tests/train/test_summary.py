"""The normalization batch in summary.json."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("norm=bn",), 20),
        (("norm=bn_pn", "micro_batch=10"), 10),
        (("norm=bn", "norm_batch=5"), 5),
        (("norm=ln_pn", "norm_batch=5"), None),
    ],
)
def test_only_batch_norm_has_a_normalization_batch(run_small, overrides, expected):
    run = run_small(*overrides, "max_steps=1")
    assert json.loads((run.folder / "summary.json").read_text())["norm_batch"] == expected
