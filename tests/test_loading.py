"""proxynorm.load: the way back from whatever holds a trained network."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from PIL import Image

import proxynorm
from proxynorm.errors import CheckpointError
from proxynorm.export import export_run
from tests.test_export import make_run


@pytest.fixture
def run(tmp_path):
    """A run folder with its export in it, and its model."""
    model = make_run(tmp_path / "run", "norm=ln_pn")
    export_run(tmp_path / "run", tmp_path / "run" / "export")
    return tmp_path / "run", model


@pytest.mark.parametrize(
    "place", ["", "checkpoints/last.pt", "export", "export/model.safetensors", "hub"]
)
def test_every_place_gives_the_network_back(run, monkeypatch, place):
    folder, model = run
    if place == "hub":
        fetch = lambda repo_id, **_: {"me/net": str(folder / "export")}[repo_id]  # noqa: E731
        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    loaded = proxynorm.load("hf-hub:me/net" if place == "hub" else folder / place)
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(images), model(images)) and not loaded.training


def test_timm_makes_the_transform(run):
    model = proxynorm.load(run[0])
    assert model.pretrained_cfg["label_names"] == ("a", "b", "c")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = transform(Image.new("L", (40, 50), 255))[None]
    torch.testing.assert_close(images, torch.full((1, 1, 32, 32), (1 - 0.3) / 0.4))
    assert model(images).shape == (1, 3)


@pytest.mark.parametrize(
    ("file", "content", "place", "message"),
    [
        ("export/config.json", None, "export/model.safetensors", "config.json is missing"),
        ("export/model.safetensors", None, "export", "model.safetensors is missing"),
        ("export/model.safetensors", "damaged", "export", "model.safetensors is damaged"),
        ("export/config.json", "damaged", "export", "not a proxynorm export"),
        ("export/config.json", "{}", "export", "not a proxynorm export"),
        ("config.yaml", None, "checkpoints/last.pt", "the run's configuration, cannot be read"),
        ("config.yaml", None, "nowhere", "no such run folder, export or checkpoint"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(run, file, content, place, message):
    folder, _ = run
    (folder / file).unlink()
    if content:
        (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        proxynorm.load(folder / place)
    assert "\n" not in str(error.value)


def test_another_network_s_weights_are_refused(run, tmp_path):
    folder, _ = run
    make_run(tmp_path / "other", "norm=ln_pn", "model.width=8")
    export_run(tmp_path / "other", tmp_path / "other" / "export")
    shutil.copy(tmp_path / "other/export/model.safetensors", folder / "export")
    with pytest.raises(CheckpointError, match="of another network"):
        proxynorm.load(folder / "export")


def test_a_repository_that_is_not_there(monkeypatch):
    def refuse(repo_id, **_):
        raise OSError("401 Client Error.\nRepository Not Found for url: …")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="hf-hub:me/net: 401 Client Error. Repository"):
        proxynorm.load("hf-hub:me/net")
