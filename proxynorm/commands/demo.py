"""Train bn, ln and ln_pn on Fashion-MNIST; compare them in a table, a report and a figure."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from proxynorm.analysis.plots import plot_curves
from proxynorm.analysis.tables import markdown_table, text_table
from proxynorm.cli import option, script
from proxynorm.files import write_json, write_text
from proxynorm.launch.runs import TRAIN
from proxynorm.train.run_folder import read_metrics

HEADER = ("norm", "top-1 %", "loss", "images/s", "seconds")
REPORT = """# Demo: {norms} on Fashion-MNIST

{table}

One run each, {limit} training images, {epochs} epochs, batch {batch}; top-1 and loss on the test
set after the last epoch; images/s and seconds of training, evaluation and start-up left out.
Machine: {processor}, {cores} cores, torch {torch}.

![training loss and top-1](curves.png)

```
{commands}
```
"""


@dataclass
class Options:
    norms: list[str] = option(["bn", "ln", "ln_pn"], "the norms to compare")
    limit: int = option(20000, "training images")
    epochs: int = option(4, "epochs")
    batch: int = option(128, "images per weight update")
    seed: int = option(0, "seed of weights and data order")
    runs_dir: str = option("runs/demo", "where the runs and the report go")
    record: bool = option(False, "copy the figures into results/demo, which the README quotes")


def command(norm: str, options: Options) -> list[str]:
    """The training command of one row."""
    arguments = [f"{key}={getattr(options, key)}" for key in ("batch", "epochs", "seed")]
    arguments += [f"data.limit={options.limit}", f"runs_dir={options.runs_dir}"]
    return ["python", "train.py", f"norm={norm}", *arguments, f"name={norm}"]


def train(norm: str, options: Options) -> Path:
    """Train one norm, or find it trained; its run folder. Exits if the training fails."""
    arguments = command(norm, options)
    print(f"\n$ {shlex.join(arguments)}", flush=True)
    status = subprocess.run([*TRAIN, *arguments[2:]]).returncode
    if status:
        sys.exit(status)
    return Path(options.runs_dir) / norm


def row(folder: Path) -> list[str]:
    """A run's row of the table."""
    summary = json.loads((folder / "summary.json").read_text())
    seconds = summary["train_seconds"]
    speed = summary["steps"] * summary["batch"] / seconds
    figures = [f"{summary['top1']:.2f}", f"{summary['loss']:.4f}", f"{speed:.0f}", f"{seconds:.0f}"]
    return [summary["norm"], *figures]


def main(options: Options) -> None:
    folders = [train(norm, options) for norm in options.norms]
    rows, target = [row(folder) for folder in folders], Path(options.runs_dir)
    curves = {folder.name: read_metrics(folder / "metrics.jsonl") for folder in folders}
    plot_curves(curves, target / "curves.png")
    environment = json.loads((folders[-1] / "environment.json").read_text())
    machine = {key: environment[key] for key in ("processor", "cores")}
    chosen = asdict(options)
    report = REPORT.format(
        **machine,
        **{**chosen, "norms": ", ".join(options.norms)},
        torch=environment["packages"]["torch"],
        table=markdown_table(HEADER, rows),
        commands="\n".join(shlex.join(command(norm, options)) for norm in options.norms),
    )
    write_text(target / "report.md", report)
    print(f"\n{text_table(HEADER, rows)}\n\n{target / 'report.md'}")
    if options.record:
        kept = Path("results/demo")
        kept.mkdir(parents=True, exist_ok=True)
        shown = {key: chosen[key] for key in chosen if key not in ("runs_dir", "record")}
        content = {"options": shown, "environment": environment, "header": HEADER, "rows": rows}
        write_json(kept / "demo.json", content)
        shutil.copyfile(target / "curves.png", kept / "curves.png")


def entry() -> None:
    script(Options, main, __doc__)
