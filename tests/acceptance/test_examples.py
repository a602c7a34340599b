"""The programs of examples/ run from start to end, as a user starts them."""

from __future__ import annotations

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
