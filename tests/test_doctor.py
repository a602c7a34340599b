"""The doctor prints a finding per line, and a remedy for what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from proxynorm import commands
from proxynorm.commands import doctor
from proxynorm.commands.doctor import MISSING, OK, WARNING, Finding
from proxynorm.data import fashion_mnist
from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.sources import list_source
from proxynorm.errors import ConfigError
from proxynorm.train.build import build_model
from proxynorm.train.config import compose_config, settings_from
from tests.data.conftest import needs_fashion_mnist, needs_ffcv, write_folder


def settings(*overrides: str):
    return settings_from(compose_config(overrides))


def data_findings(*overrides: str) -> list[Finding]:
    findings = doctor.examine(settings(*overrides))
    return [finding for finding in findings if finding.subject == "data"]


def run_script(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments])
    with pytest.raises(SystemExit) as end:
        commands.run("doctor")
    return end.value.code


@pytest.fixture
def small_betons(tmp_path) -> Path:
    """train.beton and val.beton, 12 and 6 photographs of three classes."""
    root = write_folder(tmp_path / "photos", 4, 2)
    for part in ("train", "val"):
        prepare(list_source(root / part), tmp_path / f"{part}.beton", StorageOptions())
    return tmp_path


def test_a_terminal_gets_wrapped_lines_and_a_pipe_whole_ones(monkeypatch, capsys):
    findings = [Finding(OK, "packages", ", ".join(["torch 2.11.0"] * 20))]
    monkeypatch.setattr(doctor, "examine", lambda *arguments: findings)
    monkeypatch.setenv("COLUMNS", "80")
    assert run_script(monkeypatch) == 0
    whole = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run_script(monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert whole == f"{findings[0]}\n" and " ".join(map(str.strip, lines)) == whole.strip()
    assert max(map(len, lines)) <= 80 and all(line[:19].isspace() for line in lines[1:])


@needs_fashion_mnist
def test_the_default_experiment_can_run_here(monkeypatch, capsys):
    assert run_script(monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {OK, WARNING}
    assert {line.split()[1] for line in lines} == {
        "packages",
        "cuda",
        "ffcv",
        "data",
        "wandb",
        "slurm",
    }


def test_weights_to_start_from_are_checked(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path / "photos", 4, 2)
    file = tmp_path / "start.pt"
    asked = (
        "data=folder model.depth=8 batch=4 data.image_size=32 device=cpu name=x "
        f"data.root={root} weights={file} runs_dir={tmp_path}/runs"
    ).split()
    for width, status, words in ((0, 2, "no file"), (16, 0, "started from"), (8, 2, "another net")):
        if width:
            network = build_model(settings("model.depth=8", f"model.width={width}"), 3, 3)
            torch.save(network.state_dict(), file)
        assert run_script(monkeypatch, *asked) == status
        (line,) = [text for text in capsys.readouterr().out.splitlines() if " weights " in text]
        assert words in line
    (tmp_path / "runs/x/checkpoints").mkdir(parents=True)  # it goes on without them
    assert run_script(monkeypatch, *asked) == 0


def test_an_experiment_without_data_is_status_2_with_the_command(monkeypatch, capsys, tmp_path):
    assert run_script(monkeypatch, "experiment=imagenet_resnet50") == 2
    out = capsys.readouterr().out
    assert "; fix: python scripts/write_ffcv.py source=DIR output=" in out
    assert "the experiment asks for 8 GPUs" in out
    (missing,) = data_findings("experiment=imagenet_resnet50", f"data.root={tmp_path}")
    assert missing.status == MISSING and "train.beton: no such file" in missing.text
    assert missing.remedy.startswith("python scripts/write_ffcv.py source=DIR output=")


@needs_ffcv
def test_every_line_that_is_not_ok_names_a_command(monkeypatch, capsys, small_betons):
    for arguments in (
        ("experiment=imagenet_resnet50",),
        ("experiment=imagenet_efficientnet_b1", f"data.root={small_betons}"),
    ):
        assert run_script(monkeypatch, *arguments, "device=cuda") == 2
        lines = capsys.readouterr().out.splitlines()
        assert all("; fix: " in line for line in lines if not line.startswith(OK))


@pytest.mark.parametrize(("cuda", "built"), [(None, "CPUs"), ("13.0", "CUDA 13.0")])
def test_a_gpu_that_torch_does_not_see_is_explained(monkeypatch, cuda, built):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = doctor.check_cuda(settings(), None)
    assert finding.status == WARNING and f"built for {built}, sees no GPU" in finding.text
    assert "CUDA_VISIBLE_DEVICES" in finding.remedy and "nvidia-smi" in finding.remedy


def test_data_other_than_the_experiments_are_reported():
    """Twelve images of three classes are neither ImageNet nor enough for a batch of 1024."""
    asked = settings("experiment=imagenet_resnet50", "data.root=x")
    short, other = doctor.check_counts(asked, "imagenet_resnet50", (3, 12, 6))
    assert short.status == MISSING and short.remedy == "batch=12"
    assert other.status == WARNING
    assert "3 classes instead of 1,000, 12 training images instead of" in other.text
    assert list(doctor.check_counts(settings("batch=12"), None, (3, 12, 6))) == []


def test_imagenet_with_a_few_images_left_out_is_imagenet():
    asked = settings("experiment=imagenet_resnet50", "data.root=x")
    for train, findings in ((1_281_167, 0), (1_281_000, 0), (1_000_000, 1)):
        found = doctor.check_counts(asked, "imagenet_resnet50", (1000, train, 50_000))
        assert len(list(found)) == findings


def test_damaged_images_in_a_folder_are_found(tmp_path):
    root = write_folder(tmp_path / "photos", 4, 2)
    asked = ("data=folder", f"data.root={root}", "batch=4", "model.depth=8")
    assert [finding.status for finding in data_findings(*asked)] == [OK, OK]
    (root / "val" / "bee" / "000.jpg").write_bytes(b"")
    train, evaluation = data_findings(*asked)
    assert train.status == OK and evaluation.status == MISSING
    assert "1 damaged" in evaluation.text and "bee/000.jpg: is empty" in evaluation.text
    assert "data.on_bad=skip" in evaluation.remedy
    _, evaluation = data_findings(*asked, "data.on_bad=skip")  # the run leaves it out
    assert evaluation.status == WARNING and "on_bad" not in evaluation.remedy
    for path in (root / "val").glob("*/*.jpg"):
        path.write_bytes(b"")
    assert data_findings(*asked, "data.on_bad=skip")[1].status == MISSING


def test_a_wrong_argument_is_one_line(monkeypatch, capsys):
    assert run_script(monkeypatch, "experiment=imagenet_resnet5") == 2
    assert "did you mean 'imagenet_resnet50'" in capsys.readouterr().err


@needs_ffcv
def test_data_files_are_compared_with_their_manifest(small_betons):
    asked = ("data=beton", f"data.root={small_betons}", "batch=4", "model.depth=8")
    assert [finding.status for finding in data_findings(*asked)] == [OK, OK]
    (small_betons / "val.beton.json").rename(small_betons / "kept.json")
    (small_betons / "val.beton.sums.npy").unlink()
    warning, *found = data_findings(*asked)
    assert warning.status == WARNING and "no manifest" in warning.text
    assert [finding.status for finding in found] == [OK, OK]
    path = small_betons / "train.beton"
    data, samples = bytearray(path.read_bytes()), read_beton(path)
    data[int(samples.pointer[3]) + 200] ^= 1
    path.write_bytes(data)
    _, train, _ = data_findings(*asked)
    assert train.status == MISSING and "12 of them decoded, 1 damaged" in train.text
    path.write_bytes(data[:-5])
    (finding,) = data_findings(*asked)
    assert finding.status == MISSING and "truncated" in finding.text
    assert "overwrite=true" in finding.remedy


@needs_ffcv
@pytest.mark.parametrize("manifest", ["[]", "null", '"x"', '{"bytes": 1}'])
def test_a_damaged_manifest_does_not_end_the_doctor(monkeypatch, capsys, small_betons, manifest):
    (small_betons / "train.beton.json").write_text(manifest)
    assert run_script(monkeypatch, "data=beton", f"data.root={small_betons}", "batch=4") == 2
    lines = capsys.readouterr().out.splitlines()
    (told,) = (line for line in lines if line.startswith(MISSING))
    assert "train.beton: does not match its manifest" in told and "overwrite=true" in told
    assert lines[-1].split()[1] == "slurm"


def test_ffcv_is_required_only_where_it_is_asked_for(monkeypatch):
    def absent():
        raise ConfigError("loader.name=ffcv: FFCV is not installed; install it with: …")

    monkeypatch.setattr(doctor, "ffcv_library", absent)
    needless, needed = (doctor.check_ffcv(settings(*keys)) for keys in ((), ("loader=ffcv",)))
    assert needless.status == WARNING and "the torchvision loader serves" in needless.text
    assert (
        needed.status == MISSING
        and "FFCV is not installed" in needed.text
        and "apt-get install" in needed.remedy
    )


def test_missing_fashion_mnist_is_a_warning_with_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "none")
    (finding,) = data_findings()
    assert finding.status == WARNING and finding.remedy == "apt-get install dataset-fashion-mnist"
    (finding,) = data_findings(f"data.root={tmp_path}")
    assert finding.status == MISSING


def test_a_finding_is_one_line():
    assert str(Finding(OK, "python", "3.11")) == "ok       python    3.11"
    assert (
        str(Finding(MISSING, "ffcv", "not there", "pip install"))
        == "missing  ffcv      not there; fix: pip install"
    )


@needs_fashion_mnist
def test_an_experiment_of_the_user_s_own_is_examined(monkeypatch, tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nbatch: 24\n")
    run_script(monkeypatch, f"--config-dir={tmp_path}", "experiment=mine")
    assert "ok       data" in capsys.readouterr().out
