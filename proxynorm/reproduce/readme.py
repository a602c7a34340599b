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


def storage(results: Path) -> str:
    content = load(results, "loader/storage.json")
    header = ("longest side", "JPEG quality", "share of JPEG", "KB an image", "images/s and core")
    rows = [[str(row["max_side"] or "as it is"), str(row["jpeg_quality"]), f"{row['jpeg_probability']:.0%}",
             f"{row['bytes_per_image'] / 1000:.0f}", f"{row['images_per_cpu_second']:.0f}"] for row in content["table"]]
    size, count = content["options"]["size"], content["options"]["images"]
    return f"""{markdown_table(header, rows)}

{count} photographs of 500×375 pixels, random resized crops of {size}; images in a second of processor time
({machine(content["machine"])}; `python scripts/benchmark.py storage`).
"""


def loader(results: Path) -> str:
    content = load(results, "loader/benchmark.json")
    header = ("loader", "images/s", "ours ÷ it", "images per CPU second", "first batch, s", "on a second run, s", "memory, MB")
    rows = [[row["loader"], f"{row['images_per_second']:.0f}", f"{row['ours_over_it']:.2f}",
             f"{row['images_per_cpu_second']:.0f}", f"{row['first_batch_seconds']:.1f}",
             f"{row['first_batch_seconds_second_run']:.1f}", f"{row['memory_mb']:.0f}"] for row in content["table"]]
    options = content["options"]
    bytes_read = "all read the same JPEG bytes" if options["same_bytes"] else "the FFCV loaders read the prepared file, the others its sources"
    command = "python scripts/benchmark.py loader" + (" same_bytes=true" if options["same_bytes"] else "")
    return f"""{markdown_table(header, rows)}

{options["images"]} photographs, the same crops, {options["workers"]} workers each, in turns, medians of {options["rounds"]} rounds; {bytes_read}
({machine(content["machine"])}, load average {content["load_average"][0]:.1f}; `{command}`).
"""


BLOCKS: dict[str, Callable[[Path], str]] = {"demo": demo, "storage": storage, "loader": loader}


def render(text: str, results: Path) -> str:
    """The README `text` with every block rendered anew. Raises DataError for a block that is not known."""
    def fill(match: re.Match[str]) -> str:
        if match["name"] not in BLOCKS:
            raise DataError(f"the README has a block '{match['name']}' that nothing renders")
        return f"{match[1]}\n{BLOCKS[match['name']](results)}\n{match[4]}"

    return BLOCK.sub(fill, text)
