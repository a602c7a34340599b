"""What type checkers and editors see of the public names, as in the code of the pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import proxynorm
from tests.acceptance.docs_blocks import PAGES, blocks
from tests.helpers import ROOT, need_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def snippets(tmp_path_factory) -> Path:
    """A folder with the Python code of each page."""
    folder = tmp_path_factory.mktemp("snippets")
    for page in PAGES:
        code = [block.text for block in blocks(page) if block.language == "python"]
        # Those of extending.md are pieces of the package's files: test_extending checks them there.
        if code and page.name != "extending.md":
            (folder / f"{page.stem.lower()}.py").write_text("\n".join(code))
    return folder


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@need_module("mypy")
def test_mypy_accepts_the_snippets_and_the_examples(snippets, tmp_path):
    notebook = tmp_path / "notebook.py"
    cells = json.loads((ROOT / "examples" / "proxynorm.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    notebook.write_text("\n".join(code))
    # As a user runs it: without this project's settings, so that errors of the package count only
    # where they reach a snippet.
    options = ("--config-file=", "--ignore-missing-imports", "--follow-imports=silent")
    files = map(str, [*snippets.glob("*.py"), *(ROOT / "examples").glob("*.py"), notebook])
    assert "no issues found" in run("mypy", *options, *files, cwd=ROOT)


@need_module("pyright")
def test_pyright_accepts_the_snippets_and_knows_the_public_names(snippets):
    probe = snippets / "names.py"
    names = [name for name in proxynorm.__all__ if name != "__version__"]
    lines = [f"reveal_type(proxynorm.{name})" for name in names]
    probe.write_text("\n".join(["import proxynorm", *lines]))
    options = {"extraPaths": [str(ROOT)], "include": ["."]}
    (snippets / "pyrightconfig.json").write_text(json.dumps(options))
    said = run("pyright", "--pythonpath", sys.executable, cwd=snippets)
    revealed = [line for line in said.splitlines() if "Type of" in line]
    assert len(revealed) == len(names)
    assert not [line for line in revealed if line.endswith(('"object"', '"Unknown"'))]


@need_module("jedi")
def test_editors_complete_the_public_names():
    import jedi

    project = jedi.Project(str(ROOT))
    source = "import proxynorm\nproxynorm.con"
    found = {name.name: name for name in jedi.Script(source, project=project).complete()}
    assert {"convert", "conversion_report"} <= set(found)
    (signature,) = found["convert"].get_signatures()
    assert [parameter.name for parameter in signature.params][:2] == ["model", "norm"]
