"""scripts/gpu_check.py without a GPU: it runs small cases and names missing packages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import gpu_check
from tests.gpu import layers, training
from tests.helpers import ROOT


def test_it_runs_to_its_end_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layers, "ACTIVATIONS", {"relu": layers.ACTIVATIONS["relu"]})
    assert gpu_check.main(["device=cpu", f"results={tmp_path}", "name=here"]) == 0
    shown = capsys.readouterr().out
    assert "speed means nothing" in shown and "Nothing is wrong." in shown
    content = json.loads((tmp_path / "here.json").read_text())
    assert content["failures"] == []
    layer_rows = content["checks"]["Layers against float64"]["rows"]
    assert {row["norm"] for row in layer_rows} == set(layers.NORMS)
    assert "compiled" in {row["mode"] for row in layer_rows}
    assert len(content["checks"]["Training"]["rows"]) == len(training.CHECKS)
    assert (tmp_path / "here.md").read_text().startswith("# cpu\n")


def test_a_wrong_layer_is_status_1_and_named(tmp_path, capsys, monkeypatch):
    original = layers.formula
    monkeypatch.setattr(layers, "formula", lambda layer, x: 1.1 * original(layer, x))
    monkeypatch.setattr(gpu_check, "CHECKS", {"Layers": layers.norms})
    monkeypatch.setattr(layers, "NORMS", ("ln_pn",))
    assert gpu_check.main(["device=cpu", f"results={tmp_path}"]) == 1
    assert "- wrong: eager fp32 channels_last ln_pn relu: error of " in capsys.readouterr().out


LACKING = """
import runpy, sys
for name in ("hydra", "omegaconf", "wandb", "ffcv", "rich"):
    sys.modules[name] = None
from tests.gpu import layers
layers.NORMS = ("ln",)
sys.argv[1:] = ["device=cpu", "results=" + sys.argv[1]]
runpy.run_path("scripts/gpu_check.py", run_name="__main__")
"""


def test_a_machine_without_our_requirements_skips_by_name(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LACKING, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Skipped: needs omegaconf." in done.stdout and "| eager | fp16 |" in done.stdout


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("device=cuda", "torch finds no CUDA device; device=cpu"),
        ("device=gpu", "device= or minutes=: "),
        ("minutes=many", "device= or minutes=: "),
        ("norms=ln", "no option 'norms'; valid: device, minutes, name, results"),
    ],
)
def test_a_mistake_is_one_line(capsys, argument, words):
    assert gpu_check.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1
