"""A built wheel, installed into a fresh environment and used outside of the repository."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers import ROOT, need_module

pytestmark = [pytest.mark.slow, need_module("setuptools")]

# What `pip install proxynorm` does not bring.
EXTRAS = "timm torchvision hydra omegaconf wandb PIL rich matplotlib safetensors scipy packaging"
BLOCKED = f"""
import sys

class Blocker:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker)
"""
LAYER = """
import torch, proxynorm, proxynorm.nn
layer = proxynorm.NormAct2d(8, norm="ln", act_layer="silu")
assert layer(torch.randn(2, 8, 4, 4)).shape == (2, 8, 4, 4)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
assert "NormAct2d" in str(proxynorm.convert(model, "gn_pn", torch.randn(2, 3, 8, 8)))
try:
    proxynorm.create_model
except ModuleNotFoundError as error:
    print(error)
"""


def run(*words: object, cwd: Path, status: int = 0) -> str:
    """The output of a command, standard error included."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), "WANDB_SILENT": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The bin folder of a virtual environment that holds the wheel.

    The other packages are those of this environment, without its own proxynorm.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy, because a build writes into the source tree.
    for name in ("proxynorm", "hydra_plugins", "configs"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    for path in ROOT.glob("results/*/chosen.json"):
        (source / path.relative_to(ROOT)).parent.mkdir(parents=True)
        shutil.copy(path, source / path.relative_to(ROOT))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=folder)
    site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    # A line of a .pth file adds a path; the .pth files found there are not read.
    (Path(site) / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_the_layer_needs_torch_alone(environment, tmp_path):
    said = run(environment / "python", "-c", BLOCKED + LAYER, cwd=tmp_path)
    assert "proxynorm.create_model needs timm: install proxynorm's extra [train]" in said
    train = "sys.argv = ['proxynorm', 'train']\nfrom proxynorm.commands import main\nmain()"
    said = run(environment / "python", "-c", BLOCKED + train, cwd=tmp_path, status=2)
    assert said.startswith("error: train needs hydra, which ") and said.count("\n") == 1
    assert "install proxynorm's extra [train]" in said


def test_training_in_an_empty_folder(environment, tmp_path):
    words = ["norm=ln_pn", "batch=32", "max_steps=3", "data.holdout=100", "name=three"]
    words += ["model.depth=8", "model.width=8"]
    run(environment / "proxynorm", "train", *words, cwd=tmp_path)
    assert json.loads((tmp_path / "runs/three/summary.json").read_text())["steps"] == 3
    said = run(environment / "proxynorm", "eval", "run=runs/three", "device=cpu", cwd=tmp_path)
    assert json.loads(said.splitlines()[-1])["count"] == 100


def test_a_plan_has_what_the_search_chose_and_names_the_installed_command(environment, tmp_path):
    words = ["reproduce", "plan", "table=mini_norms", "verbose=true"]
    said = run(environment / "proxynorm", *words, cwd=tmp_path)
    assert "optim.base_lr=" in said and "[missing] proxynorm train data=" in said
    assert "train.py" not in said
    run(environment / "proxynorm", "reproduce", "report", "table=mini_norms", cwd=tmp_path)
    report = (tmp_path / "results/mini_norms/report.md").read_text()
    assert "proxynorm reproduce run" in report and "scripts/" not in report
    words = ["doctor", "data=beton", "data.root=x"]
    said = run(environment / "proxynorm", *words, cwd=tmp_path, status=2)
    assert "fix: proxynorm write-ffcv source=" in said


def test_what_needs_the_repository_says_so(environment, tmp_path):
    said = run(environment / "proxynorm", "benchmark", "step", cwd=tmp_path, status=2)
    assert said == "error: benchmarks are in the repository: git clone it and run there\n"
    plan = run(environment / "proxynorm", "reproduce", "plan", "table=imagenet_norms", cwd=tmp_path)
    assert "ln_pn" in plan
    said = run(environment / "proxynorm", "reproduce", "docs", cwd=tmp_path, status=2)
    assert said.startswith("error: docs renders pages of the repository")
    listed = run(environment / "proxynorm", cwd=tmp_path)
    assert "write-ffcv" in listed
