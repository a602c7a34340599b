"""Export: a run becomes files that give its logits back."""

import json
import os
import runpy

import pytest
import torch
from omegaconf import OmegaConf

from proxynorm import model_card
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.export import export_run, load
from proxynorm.files import write_json, write_text
from proxynorm.train import checkpoint
from proxynorm.train.build import build_model
from proxynorm.train.config import compose_config, settings_from
from tests.helpers import need_module

INPUTS = {"classes": ["a", "b", "c"], "channels": 1, "mean": [0.3], "std": [0.4]}
RESULT = {"top1": 91.5, "top5": 99.0, "loss": 0.3, "count": 10000}


def make_run(folder, *overrides):
    """A run folder with random weights, as train.py would leave it."""
    config = compose_config(["model.depth=8", "model.width=4", "data.root=somewhere", *overrides])
    settings = settings_from(config)
    torch.manual_seed(0)
    model = build_model(settings, 3, 1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    (folder / "checkpoints").mkdir(parents=True)
    content = {"model": model.state_dict(), "ema": None, "inputs": INPUTS, "step": 7, **RESULT}
    checkpoint.save(folder / "checkpoints" / "last.pt", content)
    checkpoint.save(folder / "checkpoints" / "best.pt", {**content, "top1": 92.0})
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    write_json(folder / "summary.json", {**RESULT, "epochs": 5, "steps": 9, "seed": 0})
    return model.eval()


@pytest.mark.parametrize("norm", ["bn", "ln_pn", "ln_ws"])
def test_what_is_exported_gives_the_same_logits(tmp_path, norm):
    model = make_run(tmp_path / "run", f"norm={norm}")
    assert export_run(tmp_path / "run", tmp_path / "out") == {"model.safetensors": 0.0}
    exported, images = load(tmp_path / "out"), torch.randn(2, 1, 32, 32)
    assert torch.equal(exported.model(images), model(images)) and not exported.model.training
    assert exported.inputs["classes"] == ["a", "b", "c"] and exported.metrics["top1"] == 91.5


def run_card(folder, monkeypatch, block):
    """Run a Python block of a card in its folder, as the card says; what it defines."""
    monkeypatch.chdir(folder)
    example = (folder / "README.md").read_text().split("```python\n")[block].split("```")[0]
    (folder / "example.py").write_text(example)
    return runpy.run_path("example.py")


def test_the_card_s_example_runs(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert run_card(tmp_path / "out", monkeypatch, 1)["label"] in ("a", "b", "c")
    assert "onnx" not in (tmp_path / "out" / "README.md").read_text()


def test_the_model_card_tells_accuracy_recipe_and_loading(tmp_path):
    make_run(tmp_path / "run", "norm=ln_pn", "weights=/secret/place/start.pt")
    export_run(tmp_path / "run", tmp_path / "out", weights="best", licence="cc0-1.0")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "| 92.00 % | 99.00 % | 0.3000 | 10000 | 1 |",
        "Evaluated on 10000 images of the evaluation set: 32 pixels a side",
        "The best checkpoint, after 7 weight updates, of one run (seed 0)",
        "license: cc0-1.0",
        "      value: 92.0",
        '| weights | "start.pt" |',
        "| norm | ln_pn: proxy_eps=0.03, ",
        "| optim | momentum: base_lr=0.1, base_batch=128, momentum=0.9, weight_decay=0.0001 |",
    ):
        assert words in card
    written = card + (tmp_path / "out" / "config.json").read_text()
    assert "somewhere" not in written and "secret" not in written


@need_module("onnxscript")
@pytest.mark.parametrize(
    ("origin", "address"),
    [
        (
            "https://me:secret@example.org/me/proxynorm.git",
            "https://example.org/me/proxynorm.git@abc",
        ),
        ("https://example.org:8443/me/p", "https://example.org:8443/me/p@abc"),
        ("git@example.org:me/proxynorm.git", "ssh://git@example.org/me/proxynorm.git@abc"),
        ("ssh://git:secret@example.org:22/me/p", "ssh://git@example.org:22/me/p@abc"),
        ("/srv/proxynorm.git", None),  # this machine's alone
        ("file:///srv/proxynorm", None),
        (None, None),
    ],
)
def test_the_card_installs_the_checkout_that_made_it(origin, address, monkeypatch):
    said = {"remote": origin, "rev-parse": "abc"}
    monkeypatch.setattr(model_card, "git", lambda command, *_: said[command])
    told = model_card._install()
    if address is None:
        assert told.startswith("Install proxynorm ") and "pip install" not in told
    else:
        assert told == f"```bash\npip install 'proxynorm[train] @ git+{address}'\n```"


def test_onnx_agrees_with_the_run(tmp_path):
    make_run(tmp_path / "run", "norm=gn_pn", "norm.groups=2")
    differences = export_run(tmp_path / "run", tmp_path / "out", onnx=True)
    assert (
        differences["model.onnx"] < 1e-4
        and "model.onnx" in (tmp_path / "out" / "README.md").read_text()
    )


def test_without_onnx_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("proxynorm.export.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx: install proxynorm's extra \[export\]"):
        export_run(tmp_path / "run", tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_summary_is_not_exported(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="no summary.json"):
        export_run(tmp_path / "run", tmp_path / "out")
    with pytest.raises(
        CheckpointError, match="model.safetensors is missing|config.json is missing"
    ):
        load(tmp_path / "out")


def test_config_json_is_plain(tmp_path):
    make_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(content) == {"config", "inputs", "metrics"} and "runs_dir" not in content["config"]


def test_files_have_the_mode_that_the_umask_leaves(tmp_path):
    make_run(tmp_path / "run")
    before = os.umask(0o027)
    try:
        export_run(tmp_path / "run", tmp_path / "out")
    finally:
        os.umask(before)
    assert {
        path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()
    } == dict.fromkeys(("model.safetensors", "config.json", "README.md"), "0o640")


@need_module("onnxscript")
def test_the_card_s_onnx_example_runs(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", onnx=True)
    assert run_card(tmp_path / "out", monkeypatch, 2)["logits"].shape == (1, 3)
    export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out" / "model.onnx").exists()
