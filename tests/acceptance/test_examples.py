"""The programs of examples/ run from start to end, as a user starts them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT


def run_example(name: str, *arguments: object) -> str:
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracy(output: str) -> float:
    return float(re.search(r"accuracy on new images: ([\d.]+)%", output)[1])


def test_own_network_learns():
    assert accuracy(run_example("own_network.py")) > 90


@pytest.fixture(scope="module")
def own_images(tmp_path_factory):
    """The folder in which own_images.py has trained, and what it printed."""
    folder = tmp_path_factory.mktemp("own_images")
    return folder, run_example("own_images.py", folder / "images", folder / "runs")


def test_own_images_are_trained_on_evaluated_and_exported(own_images):
    folder, output = own_images
    assert '{"top1": 100.0' in output
    assert (folder / "runs/own_images/export/model.safetensors").is_file()


def test_an_exported_model_classifies_images(own_images):
    folder, _ = own_images
    images = [folder / "images/val" / name / "0.jpg" for name in ("blue", "green", "red")]
    output = run_example("load_export.py", folder / "runs/own_images/export", *images)
    assert re.findall(r": (\w+) \(", output) == ["blue", "green", "red"]


def test_the_power_of_each_layer_of_an_own_network(tmp_path):
    output = run_example("own_power.py", tmp_path / "power.csv")
    last = output.splitlines()[-1].split()
    assert float(last[1]) > 0.5 > 10 * float(last[2])  # LN's P1 grows with depth, LN+PN's does not
    assert len((tmp_path / "power.csv").read_text().splitlines()) == 1 + 2 * 20


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Its cells' code in one process, as a kernel would, with figures drawn but not shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((ROOT / "examples" / "proxynorm.ipynb").read_text())
    namespace = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    said = capsys.readouterr().out
    assert "LN + PN-ReLU" in said and "BatchNorm2d  LN + ReLU + PN" in said
    assert float(re.search(r"loss ([\d.]+)", said)[1]) < 2  # from 2.3
    curves = {line.get_label(): line.get_ydata() for line in namespace["plt"].gca().lines}
    namespace["plt"].close("all")
    assert curves["ln"][-1] > 0.5 and curves["bn"][-1] < 0.1 and curves["ln_pn"][-1] < 0.1
