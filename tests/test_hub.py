"""Upload to the Hugging Face Hub, whose place a folder takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import CommitOperationAdd

import proxynorm
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.export import export_run
from proxynorm.hub import push
from tests.test_export import make_run


class FolderHub:
    """HfApi's methods that push needs; repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> SimpleNamespace:
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / full).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=full)

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return (self.root / repo_id / filename).is_file()

    def create_commit(
        self, repo_id: str, operations: list[CommitOperationAdd], commit_message: str
    ) -> None:
        for operation in operations:
            with operation.as_file() as stream:
                (self.root / repo_id / operation.path_in_repo).write_bytes(stream.read())


@pytest.fixture
def export(tmp_path):
    make_run(tmp_path / "run", "norm=ln_pn")
    export_run(tmp_path / "run", tmp_path / "export")
    (tmp_path / "export" / "notes.txt").write_text("private")
    return tmp_path / "export"


def test_what_is_pushed_loads_again(export, tmp_path):
    hub = FolderHub(tmp_path / "hub")
    assert push(export, "net", api=hub) == "https://huggingface.co/me/net"
    pushed = tmp_path / "hub" / "me" / "net"
    assert {path.name for path in pushed.iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
    }
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(proxynorm.load(pushed)(images), proxynorm.load(export)(images))
    assert 'proxynorm.load("hf-hub:me/net")' in (pushed / "README.md").read_text()


def test_a_card_on_the_hub_is_kept(export, tmp_path):
    card = tmp_path / "hub" / "me" / "net" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("written by hand")
    push(export, "me/net", api=FolderHub(tmp_path / "hub"))
    assert card.read_text() == "written by hand" and (card.parent / "config.json").is_file()


def test_what_cannot_be_pushed(export, monkeypatch):
    monkeypatch.setattr("proxynorm.hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="push=me/net: no token; run hf auth login"):
        push(export, "me/net")

    def refuse(*_, **__):
        raise RuntimeError("403 Forbidden:\nyou do not own me/net")

    with pytest.raises(ConfigError, match="403 Forbidden: you do not own me/net"):
        push(export, "me/net", api=SimpleNamespace(create_repo=refuse))
    (export / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        push(export, "me/net")
