"""The fenced blocks, commands and links of the project's Markdown pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.helpers import ROOT

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


class Block(NamedTuple):
    """A fenced block: language, heading above it, paragraph before it, text."""

    language: str
    heading: str
    introduction: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, heading, introduction = [], "", ""
    pieces = re.split(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for prose, language, text in zip(pieces[::3], pieces[1::3], pieces[2::3]):
        headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
        heading = headings[-1] if headings else heading
        introduction = " ".join(prose.strip().rpartition("\n\n")[2].split())
        found.append(Block(language, heading, introduction, text))
    return found


def commands(page: Path) -> list[list[str]]:
    """The shell commands of a page as lists of words: those of bash blocks and of `inline code`."""
    lines = []
    for block in blocks(page):
        if block.language == "bash":
            lines += block.text.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:python|bash|sbatch|torchrun)\s[^`]*)`", prose)
    lines += [line for line in inline if "…" not in line]
    words = [shlex.split(line, comments=True) for line in lines]
    return [command for command in words if command]


def links(page: Path) -> list[str]:
    """The targets of a page's links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }
