"""The README's measured numbers: each block between two markers is rendered from files in results/."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proxynorm.analysis.tables import markdown_table
from proxynorm.errors import DataError

BLOCK = re.compile(r"(<!-- (?P<name>[a-z_]+): .*? -->\n)(?P<body>.*?)(<!-- end of (?P=name) -->)", re.DOTALL)


def machine(environment: dict[str, Any]) -> str:
    """The machine in a few words."""
    gpus = f", {', '.join(environment['gpus'])}" if environment.get("gpus") else ""
    return f"{environment['processor']}, {environment['cores']} cores{gpus}, torch {environment['packages']['torch']}"


def load(results: Path, name: str) -> dict[str, Any]:
    """A file of results. Raises DataError if it is not there."""
    path = results / name
    if not path.exists():
        raise DataError(f"{path} is missing: the README quotes it")
    return json.loads(path.read_text())


def demo(results: Path) -> str:
    content = load(results, "demo/demo.json")
    options = content["options"]
    return f"""{markdown_table(content["header"], content["rows"])}

Fashion-MNIST test set, one run each, {options["limit"]} training images, {options["epochs"]} epochs, batch {options["batch"]}, the
same learning rate for all, at which ln is not stable ({machine(content["environment"])}).

![training loss and top-1 of the demo](results/demo/curves.png)
"""


BLOCKS: dict[str, Callable[[Path], str]] = {"demo": demo}


def render(text: str, results: Path) -> str:
    """The README `text` with every block rendered anew. Raises DataError for a block that is not known."""
    def fill(match: re.Match[str]) -> str:
        if match["name"] not in BLOCKS:
            raise DataError(f"the README has a block '{match['name']}' that nothing renders")
        return f"{match[1]}\n{BLOCKS[match['name']](results)}\n{match[4]}"

    return BLOCK.sub(fill, text)
