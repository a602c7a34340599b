"""The worked examples of docs/extending.md, applied to a copy of the project and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.docs_blocks import Block, blocks
from tests.helpers import ROOT, need_module

BLOCKS = blocks(ROOT / "docs" / "extending.md")
PLACE = re.compile(r"(New file|At the end of|In) `([^`]+)`(?:, after `([^`]+)`)?[^`]*:$")


@pytest.fixture
def project(tmp_path):
    """A copy of what a run needs."""
    for name in ("proxynorm", "configs", "scripts", "hydra_plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "eval.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def apply(block: Block, project: Path) -> None:
    """Write the block to where the paragraph before it says."""
    verb, path, line = PLACE.search(block.introduction).groups()
    file = project / path
    if verb == "New file":
        assert not file.exists(), f"{path} exists already"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text)
    elif verb == "In":
        text = file.read_text()
        assert text.count(f"{line}\n") == 1, f"{path}: {line}"
        file.write_text(text.replace(f"{line}\n", f"{line}\n{block.text}"))
    else:
        file.write_text(f"{file.read_text()}\n\n{block.text}")


def run(script: str, project: Path) -> str:
    """What the commands of a bash block print; fails where one of them fails."""
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-e"], input=script, cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("heading", sorted({block.heading for block in BLOCKS}))
def test_the_example_works(heading, project):
    section = [block for block in BLOCKS if block.heading == heading]
    assert section[-1].language == "bash"
    for block in section:
        if block.language == "bash":
            run(block.text, project)
        else:
            apply(block, project)


@pytest.mark.slow
@need_module("mypy")
def test_mypy_accepts_the_python_of_the_examples(project):
    """Errors in the lines around it are the package's, which CI checks with its own settings."""
    code: dict[str, set[str]] = {}
    for block in BLOCKS:
        if block.language == "python":
            apply(block, project)
            path = PLACE.search(block.introduction).group(2)
            code.setdefault(path, set()).update(block.text.splitlines())
    command = [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports"]
    command += ["--follow-imports=silent", *code]
    said = subprocess.run(command, cwd=project, capture_output=True, text=True).stdout
    assert "checked 5 source files" in said or "no issues found in 5" in said, said
    for path, line, error in re.findall(r"^(.+?):(\d+): error: (.*)", said, re.MULTILINE):
        text = (project / path).read_text().splitlines()[int(line) - 1]
        assert text not in code[path], f"{path}: {text.strip()}: {error}"
