"""key=value command lines as the user sees them: exit statuses, one-line errors, help."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from proxynorm.cli import as_installed, guard, option, options_help, parse_options
from proxynorm.commands import COMMANDS, main
from proxynorm.commands.eval import Options as EvalOptions
from proxynorm.commands.eval import main as evaluate
from proxynorm.errors import ConfigError
from tests.helpers import ROOT


@dataclass
class Options:
    size: int = option(3, "a size", "at least 1")
    names: list[str] = option(["a"], "names")
    file: str | None = option(None, "a file")
    share: float | None = option(None, "a share", "from 0 to 1")
    norms: list[str] = option(["bn"], "norms", choices=("bn", "ln"))


@dataclass
class Needy:
    need: str = option("???", "must be given")
    names: list[str] = option([], "names")


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_user_error(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_options():
    assert parse_options(Options, ["size=5", "names=[x,y]"]) == Options(5, ["x", "y"], None)
    assert parse_options(Options, ["names=x"]).names == ["x"]
    assert parse_options(Options, ["file=1_0", "names=[1e3,'a,b',x=[1,2]]"]) == Options(
        3, ["1e3", "a,b", "x=[1,2]"], "1_0"
    )
    assert parse_options(Options, ["file=null"]).file is None
    assert parse_options(Options, ["norms=[ln,bn]", "share=1"]).norms == ["ln", "bn"]
    assert parse_options(Needy, ["need=1"]) == Needy("1", [])
    with pytest.raises(ConfigError, match="need= is missing"):
        parse_options(Needy, ["names=x"])
    assert "size=3" in options_help(Options) and "a size" in options_help(Options)
    for arguments, message in (
        (["sise=5"], "did you mean 'size'"),
        (["size=x"], "size=x: must be a whole number in digits"),
        (["share=[1,2]"], r"share=\[1,2\]: must be a number, or null"),
        (["size=99999999999999999999"], "size=99999999999999999999: is too large"),
        (["file="], "file= is empty"),
        (["size"], "not of the form key=value"),
        (["names=[x"], "a bracket is not closed"),
        (["size=0"], "size=0: must be at least 1"),
        (["share=nan"], "share=nan: must be from 0 to 1"),
        (["norms=[bn,lm]"], "norms=lm: did you mean 'ln'. valid: bn, ln"),
        (["norms=[]"], "norms=: valid: bn, ln"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            parse_options(Options, arguments)
        assert "\n" not in str(error.value)


def test_an_installed_command_names_itself_in_its_texts(monkeypatch):
    text = "python train.py -m x; torchrun --n=8 train.py y; make it with scripts/write_ffcv.py"
    assert as_installed(text) == text
    monkeypatch.setattr(sys, "argv", ["proxynorm train"])
    said = "proxynorm train -m x; torchrun --n=8 -m proxynorm train y; make it with proxynorm "
    assert as_installed(text) == said + "write-ffcv"


def test_train_help_is_readable():
    result = command("train.py", "norm=gn", "--help")
    assert result.returncode == 0
    assert "norm=gn: Group Norm" in result.stdout and "norm=ln_pn batch=32" in result.stdout


SCRIPTS = {"train.py", "eval.py", *(f"scripts/{path.name}" for path in ROOT.glob("scripts/*.py"))}
SCRIPTS -= {"scripts/gpu_check.py", "scripts/_checkout.py"}  # no commands of the package


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_forgotten_environment_is_one_line(script, tmp_path):
    """-S -E: Python without the packages of any environment, like the system's own."""
    result = command("-S", "-E", str(ROOT / script), cwd=tmp_path)
    assert_user_error(result, "source .venv/bin/activate")


SIGNAL_ON_IMPORT = """
import os, runpy, signal, sys
from tests.helpers import ROOT

class Finder:
    def find_spec(name, path, target=None):
        if name == "hydra":
            os.kill(os.getpid(), signal.{name})

sys.meta_path.insert(0, Finder)
sys.argv = ["train.py"]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR2"])
def test_a_signal_during_the_imports_exits_with_75(name):
    result = command("-c", SIGNAL_ON_IMPORT.replace("{name}", name))
    assert (result.returncode, result.stderr) == (75, f"stopped by {name}; run again to go on\n")


@pytest.mark.parametrize("argument", ["checkpoint.every_steps=0", "optim.lr=inf", "--foo"])
def test_wrong_values(argument):
    assert_user_error(command("train.py", argument), argument)


def test_wrong_norm():
    assert_user_error(command("train.py", "norm=ln_pm"), "did you mean 'ln_pn'")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("beta_std=-1", "beta_std=-1: must be at least 0 and finite"),
        ("gamma_std=nan", "gamma_std=nan: must be at least 0"),
        pytest.param(
            "device=cuda",
            "torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU"),
        ),
        ("device=tpu", "valid: auto, cpu, cuda"),
        ("norms=[bn,none]", "norms=none: "),
        ("norms=[]", "norms=: valid: bn"),
        ("groups=7", "groups=7: must divide width=16"),
        ("norms=[bn,lm]", "norms=lm: did you mean 'ln'"),
    ],
)
def test_wrong_values_of_power_are_reported_before_measuring(tmp_path, argument, message):
    result = command(
        "scripts/power.py",
        argument,
        "width=16",
        "depth=3",
        "size=2",
        "images=4",
        f"output={tmp_path / 'power'}",
    )
    assert_user_error(result, message)
    assert result.stdout == "" and not (tmp_path / "power").exists()


def test_no_such_data_folder():
    assert_user_error(
        command("train.py", "data=folder", "data.root=/nowhere/at/all"), "/nowhere/at/all"
    )


@pytest.mark.parametrize(
    "script",
    [
        "eval.py",
        "scripts/demo.py",
        "scripts/reproduce.py",
        "scripts/benchmark.py",
        "scripts/write_ffcv.py",
        "scripts/power.py",
    ],
)
def test_scripts_have_help(script):
    result = command(script, "--help")
    assert result.returncode == 0, result.stderr
    assert "=" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_the_installed_commands_fits_80_columns(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proxynorm", name, "--help"])
    with contextlib.suppress(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    # A command stays in one line, to be copied.
    assert not [line for line in lines if len(line) > 80 and not line.startswith("  proxynorm ")]
    assert name == "benchmark" or not any("scripts/" in line for line in lines)


@pytest.mark.parametrize(
    "words",
    [
        "scripts/reproduce.py status table=mini_norms",
        "scripts/power.py --help",
        "scripts/benchmark.py --help",
    ],
)
def test_a_closed_pipe_is_no_fault(tmp_path, words):
    """As with `| head`: neither a traceback nor a message when the interpreter exits."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, *words.split()],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_another_broken_pipe_is_a_fault():
    def action():
        raise BrokenPipeError("of a socket")

    with pytest.raises(BrokenPipeError, match="of a socket"):
        guard(action)


def test_a_path_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        guard(lambda: (tmp_path / "file" / "deep").mkdir(parents=True))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/file/deep: Not a directory\n"


def test_a_run_from_the_command_line(tmp_path):
    """Train; train again and find it finished; evaluate with the result of the last evaluation."""
    arguments = [
        "train.py",
        "model.depth=8",
        "model.width=8",
        "data.limit=640",
        "data.holdout=300",
        "batch=64",
        "epochs=1",
        f"runs_dir={tmp_path}",
        "name=a run",
        "norm=bn",
    ]
    first = command(*arguments)
    assert first.returncode == 0, first.stderr
    assert "top-1" in first.stdout and "\x1b" not in first.stdout
    folder = tmp_path / "a run"
    expected = {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "curves.png",
    }
    assert expected <= {path.name for path in folder.iterdir()}
    again = command(*arguments)
    assert again.returncode == 0 and "is finished" in again.stdout
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    result = command("eval.py", f"run={folder}", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    evaluated = json.loads(result.stdout.splitlines()[-1])
    assert evaluated == {key: last[key] for key in ("top1", "top5", "loss", "count")}
    best = command(
        "eval.py",
        f"checkpoint={folder / 'checkpoints' / 'best.pt'}",
        "loader=torchvision",
        "batch=7",
    )
    assert json.loads(best.stdout.splitlines()[-1])["top1"] == last["top1"]


@pytest.mark.parametrize("words", ["size=0", "batch=-1", "ratio=2", "workers=-1", "on_bad=no"])
def test_evaluation_names_the_option_as_it_was_typed(words):
    with pytest.raises(ConfigError, match=f"^{words}: "):
        parse_options(EvalOptions, [words])


def test_a_folder_that_cannot_be_made_does_not_cost_the_evaluation(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("proxynorm.commands.eval.restore", lambda path: pytest.fail("evaluates"))
    with pytest.raises(OSError, match="Not a directory"):
        evaluate(EvalOptions(run=str(tmp_path), output=str(tmp_path / "file/deep")))


def test_wrong_checkpoints(tmp_path):
    other = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(3)}, other)
    text = tmp_path / "text.pt"
    text.write_text("hello")
    assert_user_error(command("eval.py", f"checkpoint={other}"), "not a checkpoint of proxynorm")
    assert_user_error(command("eval.py", f"checkpoint={text}"), "not a readable checkpoint")
    assert_user_error(command("eval.py", "run=nowhere"), "no run folder nowhere")
