"""The README's measured numbers: each block between two markers is rendered from files in results/."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.passes import CONSTANTS, OURS, TORCH
from proxynorm.analysis.tables import markdown_table
from proxynorm.errors import DataError
from proxynorm.launch.runs import reported_runs
from proxynorm.paper.report import gather, p_value, provenance
from proxynorm.paper.table import load_table

BLOCK = re.compile(
    r"(<!-- (?P<name>[a-z_]+): .*? -->\n)(?P<body>.*?)(<!-- end of (?P=name) -->)", re.DOTALL
)


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
    rows = [
        [
            str(row["max_side"] or "as it is"),
            str(row["jpeg_quality"]),
            f"{row['jpeg_probability']:.0%}",
            f"{row['bytes_per_image'] / 1000:.0f}",
            f"{row['images_per_cpu_second']:.0f}",
        ]
        for row in content["table"]
    ]
    size, count = content["options"]["size"], content["options"]["images"]
    return f"""{markdown_table(header, rows)}

{count} photographs of 500×375 pixels, random resized crops of {size}; images in a second of processor time
({machine(content["machine"])}; `python scripts/benchmark.py storage`).
"""


def loader(results: Path) -> str:
    content = load(results, "loader/benchmark.json")
    header = (
        "loader",
        "images/s",
        "ours ÷ it",
        "images per CPU second",
        "first batch, s",
        "on a second run, s",
        "memory, MB",
    )
    rows = [
        [
            row["loader"],
            f"{row['images_per_second']:.0f}",
            f"{row['ours_over_it']:.2f}",
            f"{row['images_per_cpu_second']:.0f}",
            f"{row['first_batch_seconds']:.1f}",
            f"{row['first_batch_seconds_second_run']:.1f}",
            f"{row['memory_mb']:.0f}",
        ]
        for row in content["table"]
    ]
    options = content["options"]
    bytes_read = (
        "all read the same JPEG bytes"
        if options["same_bytes"]
        else "the FFCV loaders read the prepared file, the others its sources"
    )
    command = "python scripts/benchmark.py loader" + (
        " same_bytes=true" if options["same_bytes"] else ""
    )
    return f"""{markdown_table(header, rows)}

{options["images"]} photographs, the same crops, {options["workers"]} workers each, in turns, medians of {options["rounds"]} rounds; {bytes_read}
({machine(content["machine"])}, load average {content["load_average"][0]:.1f}; `{command}`).
"""


def mini_norms(results: Path) -> str:
    """The table's cells and its claims, from the kept runs alone."""
    table = load_table("mini_norms")
    findings = gather(table, reported_runs(table, results / "no run folders", results), results)
    norms = [
        [cell.name, str(findings.samples[cell.name]), str(findings.samples[cell.name].n)]
        for cell in findings.cells
    ]
    outcomes = [
        [
            item.comparison.claim,
            f"{item.comparison.first} − {item.comparison.second}",
            "" if item.difference is None else f"{item.difference:+.2f}",
            "" if item.p is None else p_value(item.p),
            item.verdict,
        ]
        for item in findings.outcomes
    ]
    return f"""{markdown_table(("norm", "top-1 %", "seeds"), norms)}

![top-1 of every run](results/mini_norms/cells.svg)

{markdown_table(("claim", "difference", "points", "p", "verdict"), outcomes)}

{table.about.strip()} Mean ± standard deviation over seeds; Welch's t-test. {provenance(findings.records)} The whole report:
[results/mini_norms/report.md](results/mini_norms/report.md).
"""


def trained_power(results: Path) -> str:
    """P1 of mini_norms' trained nets beside their accuracy."""
    content = load(results, "power_mini_norms/summary.json")
    header = ("norm", "top-1 %", "P1 after training", "correlation of the two over seeds", "seeds")
    rows = [
        [
            cell,
            f"{row['metric']:.2f}",
            f"{row['p1']:.3f}",
            "" if row["correlation"] is None else f"{row['correlation']:+.2f}",
            str(row["n"]),
        ]
        for cell, row in content["cells"].items()
    ]
    return f"""{markdown_table(header, rows)}

![P1 and top-1 of every run](results/power_mini_norms/power.png)

Means over the norms of a net and over seeds, on {content["images"]} test images (`python scripts/power.py table=mini_norms images={content["images"]}`).
"""


STEP_NORMS = (
    "torch bn",
    "torch ln",
    "bn",
    "ln",
    "ln_pn",
    "ln_pn+recompute",
    "gn",
    "gn_pn",
    "in",
    "in_pn",
    "bn_pn",
)


def step(results: Path) -> str:
    parts = []
    for model in ("resnet50", "efficientnet_b0"):
        parts += [
            step_table(load(results, f"step/{model}.json")),
            more_processes(results, model),
            with_malloc(load(results, f"step/{model}_malloc.json")),
            passes_table(load(results, f"passes/{model}.json")),
            compiled_step(load(results, f"step/{model}_compiled.json")),
        ]
    return "\n".join([*parts, memory_table(load(results, "memory/resnet50v2.json"))])


def memory_table(content: dict[str, Any]) -> str:
    """The bytes that a step of one more model keeps for its backward pass."""
    options, kept = content["options"], content["bytes_kept"]
    rows = [
        [norm, f"{size / 1e6:.0f}", f"{size / kept['torch bn']:.3f}"] for norm, size in kept.items()
    ]
    return f"""{markdown_table((f"{options['model']}, NCHW", "kept for backward, MB", "÷ torch bn"), rows)}

(`python scripts/benchmark.py memory model={options["model"]} batch={options["batch"]} size={options["size"]}`).
"""


def more_processes(results: Path, model: str) -> str:
    """The ratios of the goals from runs of channels_last alone, the medians of which differ from process to process."""
    content = load(results, f"step/{model}_channels_last.json")
    options = content["options"]
    told = [
        f"{short(name)}: {median(values):.3f} ({values[0]:.3f} … {values[-1]:.3f})"
        for name, values in content["figures"].items()
        if name.startswith(("step", "inference", "moments"))
    ]
    return f"""Again in channels_last alone, {options["processes"]} processes one after another, {options["rounds"]} rounds each, the median process
(least … greatest): {"; ".join(told)}
({machine(content["processes"][0]["environment"])}; `python scripts/benchmark.py step model={model} processes={options["processes"]} formats=[channels_last]`).
"""


def with_malloc(content: dict[str, Any]) -> str:
    """The same from one process under malloc's own ways."""
    told = "; ".join(
        f"{short(name)}: {value:.3f}"
        for name, value in content["figures"].items()
        if name.startswith(("step", "inference"))
    )
    return f"""One process, {content["options"]["rounds"]} rounds, with malloc's own ways (keep_memory=false): {told}
({machine(content["environment"])}, of commit {content["environment"]["git"]["commit"][:7]}).
"""


def short(figure: str) -> str:
    """A figure's name where there is one format."""
    return figure.removesuffix(", each in its best format")


def passes_table(content: dict[str, Any]) -> str:
    """Where LN+PN's time goes, of one model."""
    options = content["options"]
    rows = [[row["what"], f"{row['ms']:.1f}", f"{row['share']:.2%}"] for row in content["rows"]]
    share = {row["what"]: row["share"] for row in content["rows"]}
    added = share[OURS] - share[TORCH] + share[CONSTANTS]
    return f"""Where the difference lies: the {content["layers"]} proxied layers alone, and alone the passes that only they make
({machine(content["environment"])}; `python scripts/benchmark.py passes model={options["model"]}`, {options["format"]}):

{markdown_table(("sum over the layers", "ms", "of a training step"), rows)}

By its parts, layers and constants, a step of {content["step_ms"]:.0f} ms is {1 / (1 - added):.3f} of what it would be with torch's LN and activation.
"""


def compiled_step(content: dict[str, Any]) -> str:
    """torch.compile, which fuses the plain formula by itself."""
    options = content["options"]
    header = (
        f"torch.compile, {options['model']}",
        "format",
        "step, ms",
        "÷ torch ln",
        "inference, ms",
        "÷ torch ln",
    )
    rows = [
        [
            row["norm"],
            row["format"],
            f"{row['step ms']:.0f}",
            f"{row['/ torch ln']:.3f}",
            f"{row['inference ms']:.0f}",
            f"{row['/ torch ln (inf.)']:.3f}",
        ]
        for row in content["rows"]
    ]
    return f"""{markdown_table(header, rows)}

({machine(content["environment"])}; `python scripts/benchmark.py step model={options["model"]} modes=[compiled] formats=[channels_last]`).
"""


def step_table(content: dict[str, Any]) -> str:
    """The eager steps of one model: a norm a row, both memory formats."""
    options = content["options"]
    rows = {(row["norm"], row["format"]): row for row in content["rows"] if row["mode"] == "eager"}
    header = (
        "norm",
        "step, NCHW, ms",
        "step, channels_last, ms",
        "inference, NCHW, ms",
        "inference, channels_last, ms",
        "kept for backward, MB",
        "÷ torch bn",
    )
    table = []
    for norm in STEP_NORMS:
        pair = [rows[norm, memory_format] for memory_format in ("nchw", "channels_last")]
        times = [f"{row[key]:.0f}" for key in ("step ms", "inference ms") for row in pair]
        table.append([norm, *times, f"{pair[0]['MB kept']:.0f}", f"{pair[0]['/ torch bn']:.3f}"])
    command = f"python scripts/benchmark.py step model={options['model']} batch={options['batch']} size={options['size']}"
    best = [
        f"{key.removeprefix('step, ').removesuffix(', each in its best format')}: {value:.3f}"
        for key, value in content["figures"].items()
        if key.startswith("step, ")
    ]
    return f"""{options["model"]}, {options["batch"]} images of {options["size"]} pixels:

{markdown_table(header, table)}

Ratios of training steps, each norm in its best format, medians of {options["rounds"]} interleaved rounds: {"; ".join(best)}
({machine(content["environment"])}; `{command}`).
"""


def engine(results: Path) -> str:
    header = ("model, data", "what", "images/s", "ratio", "of")
    rows = []
    for name, data in (("resnet20v2", "Fashion-MNIST"), ("resnet18", "photographs, 128 px")):
        content = load(results, f"engine/{name}.json")
        rows += [
            [
                f"{name}, {data}",
                row["what"],
                f"{row['images_per_second']:.0f}",
                f"{row['ratio']:.3f}" if row["ratio"] else "",
                row["of"],
            ]
            for row in content["rows"]
        ]
    start = load(results, "engine/startup.json")["seconds"]
    return f"""{markdown_table(header, rows)}

Medians of interleaved rounds, the same batch and {content["options"]["workers"]} worker each; timm's parts joined as
its training script joins them ({machine(content["environment"])}; `python scripts/benchmark.py engine`). From `python train.py` to its first
weight update, with a warm cache: {start["median"]:.1f} s (`python scripts/benchmark.py startup`).
"""


BLOCKS: dict[str, Callable[[Path], str]] = {
    "demo": demo,
    "storage": storage,
    "loader": loader,
    "step": step,
    "engine": engine,
    "mini_norms": mini_norms,
    "trained_power": trained_power,
}


def stale(text: str, results: Path) -> list[str]:
    """The names of the blocks of the README `text` that are not what `results` says. Raises DataError as render does."""
    old, new = (BLOCK.finditer(version) for version in (text, render(text, results)))
    return [was["name"] for was, now in zip(old, new, strict=True) if was[0] != now[0]]


def render(text: str, results: Path) -> str:
    """The README `text` with every block rendered anew. Raises DataError for a block that is not known."""

    def fill(match: re.Match[str]) -> str:
        if match["name"] not in BLOCKS:
            raise DataError(f"the README has a block '{match['name']}' that nothing renders")
        return f"{match[1]}\n{BLOCKS[match['name']](results)}\n{match[4]}"

    return BLOCK.sub(fill, text)
