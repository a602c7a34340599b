"""The README and docs/: their code runs, their commands compose, their links lead somewhere."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import gpu_check
from proxynorm.cli import parse_options
from proxynorm.commands import COMMANDS
from proxynorm.paper.table import load_table
from proxynorm.train.config import check_arguments
from tests.acceptance.docs_blocks import PAGES, anchors, blocks, commands, links
from tests.helpers import ROOT

README = ROOT / "README.md"
EXECUTED = [
    page
    for page in PAGES
    if page.name != "extending.md" and any(block.language == "python" for block in blocks(page))
]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", EXECUTED, ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, name(page), "exec"), namespace)


def check_script(path: str, arguments: list[str]) -> None:
    """Raises ConfigError where a script does not take these arguments."""
    if path == "scripts/doctor.py":
        return check_arguments(arguments)
    if path == "scripts/gpu_check.py":  # parses them itself, without omegaconf
        assert {argument.partition("=")[0] for argument in arguments} <= set(gpu_check.OPTIONS)
        return None
    module = import_module(f"proxynorm.commands.{Path(path).stem}")
    if path == "scripts/benchmark.py":
        module = import_module(f"benchmarks.{arguments.pop(0)}")
    if path == "scripts/reproduce.py":
        arguments = [f"command={arguments[0]}", *arguments[1:]]
        for table in [word for word in arguments if word.startswith("table=")]:
            load_table(table.removeprefix("table="))
    parse_options(module.Options, arguments)
    return None


def check_command(words: list[str]) -> None:
    """Raises ConfigError, or fails, where a command of the pages would not start."""
    words = [word.replace("DIR", "somewhere") for word in words]
    # The console script, or python -m proxynorm: the same code as a script.
    if "proxynorm" in words and words[0] != "git":
        place = words.index("proxynorm")
        assert words[place + 1] in COMMANDS, words
        stem = words[place + 1].replace("-", "_")
        folder = "" if stem in ("train", "eval") else "scripts/"
        words[place : place + 2] = [f"{folder}{stem}.py"]
    entry = next(
        (i for i, word in enumerate(words) if re.fullmatch(r"[\w/]+\.(py|sh|sbatch)", word)), None
    )
    if entry is None:
        assert words[0] in ("git", "source", "pip", "ruff", "mypy", "pre-commit"), words
        return
    path, arguments = words[entry], [word for word in words[entry + 1 :] if word != "…"]
    assert (ROOT / path).is_file(), path
    if path in ("train.py", "slurm/train.sbatch"):
        check_arguments(arguments)
    elif path.endswith(".py") and not path.startswith("examples/"):
        check_script(path, arguments)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=f"{name(page)}: {' '.join(words)}")
        for page in PAGES
        for words in commands(page)
        if "--help" not in words and name(page) != "docs/extending.md"
    ],
)
def test_commands_compose(words):
    check_command(list(words))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_at_most_100_characters_long(page):
    """Except rows of tables, links and code, which cannot be wrapped."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in lines if len(re.sub(r"\]\([^)]*\)", "]", line)) > 100] == []


def test_the_readme_fits_on_150_lines():
    assert len(README.read_text().splitlines()) <= 150


def test_every_page_is_in_both_indexes():
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= {Path(link).name for link in links(README)}
    assert pages <= {Path(link).name for link in links(ROOT / "docs" / "README.md")}


def test_the_index_names_every_folder_of_the_package():
    named = {link.rstrip("/") for link in links(ROOT / "docs" / "README.md")}
    folders = [path.parent for path in (ROOT / "proxynorm").glob("*/__init__.py")]
    assert {f"../proxynorm/{folder.name}" for folder in folders} <= named
