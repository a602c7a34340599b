"""Train bn, ln and ln_pn on Fashion-MNIST and compare them: a table, runs/demo/report.md and a plot."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from proxynorm.analysis.plots import plot_curves
from proxynorm.analysis.tables import markdown_table, text_table
from proxynorm.cli import option, script
from proxynorm.files import write_json, write_text
from proxynorm.train.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[1]
HEADER = ("norm", "top-1 %", "loss", "images/s", "seconds")


@dataclass
class Options:
    norms: list[str] = option(["bn", "ln", "ln_pn"], "the norms to compare")
    limit: int = option(20000, "training images")
    epochs: int = option(4, "epochs")
    batch: int = option(128, "images per weight update")
    seed: int = option(0, "seed of weights and data order")
    runs_dir: str = option("runs/demo", "where the runs and the report go")
    record: bool = option(False, "keep the figures in results/demo, which the README quotes")


def command(norm: str, options: Options) -> list[str]:
    """The training command of one row."""
    return [
        "python",
        "train.py",
        f"norm={norm}",
        f"batch={options.batch}",
        f"epochs={options.epochs}",
        f"data.limit={options.limit}",
        f"seed={options.seed}",
        f"runs_dir={options.runs_dir}",
        f"name={norm}",
    ]


def train(norm: str, options: Options) -> Path:
    """Train one norm, or find it trained; its run folder. Exits with the training's status if that is not 0."""
    arguments = command(norm, options)
    print(f"\n$ {shlex.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, *arguments[1:]], cwd=ROOT).returncode
    if status:
        sys.exit(status)
    return ROOT / options.runs_dir / norm


def row(summary: dict) -> list[str]:
    images = summary["steps"] * summary["batch"]
    seconds = summary["train_seconds"]
    return [
        summary["norm"],
        f"{summary['top1']:.2f}",
        f"{summary['loss']:.4f}",
        f"{images / seconds:.0f}",
        f"{seconds:.0f}",
    ]


def report(options: Options, rows: list[list[str]], environment: dict) -> str:
    commands = "\n".join(shlex.join(command(norm, options)) for norm in options.norms)
    return f"""# Demo: {", ".join(options.norms)} on Fashion-MNIST

{markdown_table(HEADER, rows)}

One run each, {options.limit} training images, {options.epochs} epochs, batch {options.batch}; top-1 and loss on the test set after the last
epoch; images/s and seconds of training, evaluation and start-up left out. Machine: {environment["processor"]},
{environment["cores"]} cores, torch {environment["packages"]["torch"]}.

![training loss and top-1](curves.png)

```
{commands}
```
"""


def record(options: Options, rows: list[list[str]], environment: dict, target: Path) -> None:
    """Keep the table, the plot and the machine's description in results/demo."""
    kept = ROOT / "results" / "demo"
    kept.mkdir(parents=True, exist_ok=True)
    chosen = {
        key: value for key, value in vars(options).items() if key not in ("runs_dir", "record")
    }
    write_json(
        kept / "demo.json",
        {"options": chosen, "environment": environment, "header": HEADER, "rows": rows},
    )
    shutil.copyfile(target / "curves.png", kept / "curves.png")


def main(options: Options) -> int:
    folders = [train(norm, options) for norm in options.norms]
    rows = [row(json.loads((folder / "summary.json").read_text())) for folder in folders]
    target = ROOT / options.runs_dir
    plot_curves(
        {folder.name: read_metrics(folder / "metrics.jsonl") for folder in folders},
        target / "curves.png",
    )
    environment = json.loads((folders[-1] / "environment.json").read_text())
    write_text(target / "report.md", report(options, rows, environment))
    print(f"\n{text_table(HEADER, rows)}\n\n{target / 'report.md'}")
    if options.record:
        record(options, rows, environment, target)
    return 0


if __name__ == "__main__":
    script(Options, main, __doc__)
