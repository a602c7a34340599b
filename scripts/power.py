"""The power decomposition (Fig. 2): of random nets, python scripts/power.py norms=[bn,ln], of a run, run=FOLDER, or of
the trained nets of a table, table=NAME.

With run= it shows the steps logged in training (power.every_epochs=…), or else measures the checkpoint last.pt; with
table= it measures last.pt of every finished run and sets P1 against accuracy. Writes power.csv, power.png and, except
for a run, summary.json into output."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from proxynorm.cli import nearest, option, script
from proxynorm.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from proxynorm.analysis.power import PowerRow


@dataclass
class Options:
    output: str = option("results/power", "folder of the files")
    run: str | None = option(None, "a run folder instead of random nets")
    table: str | None = option(None, "the finished runs of a table instead of random nets")
    root: str = option("runs", "with table=: folder of the tables' run folders")
    results: str = option("results", "with table=: folder of what searches have chosen")
    weights: str = option(
        "", "with run=: measure this checkpoint, last or best, even if steps were logged"
    )
    images: int = option(32, "images to measure on")
    batch: int = option(8, "images a forward; Batch Norm's statistics are over these")
    norms: list[str] = option(
        ["bn", "in", "ln", "gn", "ln_pn", "ln_ws"], "random nets: their norms"
    )
    width: int = option(1024, "random nets: channels")
    depth: int = option(50, "random nets: layers")
    size: int = option(8, "random nets: side of the input, which is white noise")
    nets: int = option(1, "random nets: number of seeds to average over")
    beta_std: float = option(0.2, "random nets: β ~ N(0, beta_std²)")
    gamma_std: float = option(0.2, "random nets: γ ~ N(1, gamma_std²)")
    padding: str = option("circular", "random nets: circular, zeros, reflect")
    groups: int | None = option(None, "random nets: groups of gn")
    threads: int | None = option(None, "CPU threads")
    device: str = option("auto", "auto, cpu, cuda")


def check_mode(options: Options) -> None:
    """Raises ConfigError for what is given but belongs to another kind of nets."""
    if options.run and options.table:
        raise ConfigError("run= and table= exclude each other: give one")
    mode = "run" if options.run else "table" if options.table else "random nets"
    for item in fields(options):
        kind = ONLY.get(item.name)
        default = item.default_factory() if callable(item.default_factory) else item.default
        if kind not in (None, mode) and getattr(options, item.name) != default:
            here = f"with {mode}=" if mode in ("run", "table") else "of random nets"
            raise ConfigError(f"{item.name}= says nothing {here}: leave it out")


# Options of one kind of nets alone.
ONLY = {
    "weights": "run",
    **dict.fromkeys(("root", "results"), "table"),
    **dict.fromkeys(
        ("norms", "width", "depth", "size", "nets", "beta_std", "gamma_std", "padding", "groups"),
        "random nets",
    ),
}


def random_nets(options: Options, device: torch.device) -> dict[str, list[list[PowerRow]]]:
    """For each norm, each net's rows."""
    import torch

    from proxynorm.analysis.power import power_decomposition
    from proxynorm.analysis.random_net import random_net

    found: dict[str, list[list[PowerRow]]] = {}
    for norm in options.norms:
        for seed in range(options.nets):
            net = random_net(
                norm,
                options.width,
                options.depth,
                seed,
                3,
                options.padding,
                options.beta_std,
                options.gamma_std,
                options.groups,
            ).to(device)
            images = torch.randn(
                options.images,
                3,
                options.size,
                options.size,
                generator=torch.Generator().manual_seed(seed),
            )
            found.setdefault(norm, []).append(power_decomposition(net, images.split(options.batch)))
            print(
                f"{norm} net {seed}: P1 at depth {options.depth} {found[norm][-1][-1].p1:.4f}",
                flush=True,
            )
    return found


def show_random_nets(options: Options, folder: Path, device: torch.device) -> None:
    from proxynorm.analysis.plots import plot_power
    from proxynorm.analysis.power_files import mean_rows, write_csv
    from proxynorm.analysis.random_net import mean_field_p1
    from proxynorm.files import write_json

    found = random_nets(options, device)
    means = {norm: mean_rows(nets) for norm, nets in found.items()}
    field = [0.0, *mean_field_p1(options.depth - 1, options.beta_std, options.gamma_std)]
    expected = {"ln": field} if "ln" in means else {}
    write_csv(folder / "power.csv", means, "norm")
    plot_power(means, folder / "power.png", expected)
    summary = {
        "width": options.width,
        "depth": options.depth,
        "nets": options.nets,
        "images": options.images,
        "size": options.size,
        "beta_std": options.beta_std,
        "gamma_std": options.gamma_std,
        "padding": options.padding,
        "largest_p1": {norm: max(row.p1 for row in rows) for norm, rows in means.items()},
        "p1_of_each_net_at_last_depth": {
            norm: [rows[-1].p1 for rows in nets] for norm, nets in found.items()
        },
    }
    if expected:
        summary["mean_field_p1"] = field
        summary["largest_distance_of_ln_from_mean_field"] = {
            "mean over nets": max(
                abs(row.p1 - p) for row, p in zip(means["ln"], field, strict=True)
            ),
            "each net": [
                max(abs(row.p1 - p) for row, p in zip(rows, field, strict=True))
                for rows in found["ln"]
            ],
        }
    write_json(folder / "summary.json", summary)


def show_run(options: Options, folder: Path, device: torch.device) -> None:
    from proxynorm.analysis.plots import plot_power
    from proxynorm.analysis.power_files import from_metrics, write_csv
    from proxynorm.train.run_folder import read_metrics

    logged = [
        row for row in read_metrics(Path(options.run) / "metrics.jsonl") if row["event"] == "power"
    ]
    if logged and not options.weights:
        panels = {f"epoch {row['epoch']:g}": from_metrics(row) for row in logged}
    else:
        panels = {options.weights or "last": measure_checkpoint(options, device)}
    write_csv(folder / "power.csv", panels, "step")
    plot_power(panels, folder / "power.png")


def show_table(options: Options, folder: Path, device: torch.device) -> None:
    from proxynorm.analysis.power_files import write_csv
    from proxynorm.files import write_json
    from proxynorm.launch.runs import read_chosen, table_runs
    from proxynorm.paper.table import load_table
    from proxynorm.paper.trained_power import panels, plot_against_metric, summarize, trained_nets
    from proxynorm.train.run_folder import environment

    table = load_table(options.table)
    runs = table_runs(table, options.root, read_chosen(table, options.results))
    nets = []
    for net in trained_nets(runs, table.metric, options.images, options.batch, device):
        print(f"{net.run}: {table.metric} {net.metric:.2f}, P1 {net.mean('p1'):.4f}", flush=True)
        nets.append(net)
    write_csv(folder / "power.csv", panels(nets), "run")
    plot_against_metric(nets, table.metric, folder / "power.png")
    measured = {
        "table": table.name,
        "metric": table.metric,
        "images": options.images,
        "environment": environment(),
    }
    write_json(folder / "summary.json", {**measured, **summarize(nets)})


def measure_checkpoint(options: Options, device: torch.device) -> list[PowerRow]:
    from proxynorm.analysis.power_monitor import measure
    from proxynorm.train.restore import checkpoint_path, open_evaluation_data, restore

    restored = restore(checkpoint_path(options.run, None, options.weights or "last"))
    data = open_evaluation_data(restored, None, None, None, None)
    return measure(restored.model.to(device), data, options.images, options.batch)


def main(options: Options) -> int:
    import torch

    from proxynorm.nn import NORMS
    from proxynorm.train.distributed import choose_device

    if options.threads:
        torch.set_num_threads(options.threads)
    for name in ("images", "batch", "width", "depth", "size", "nets"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)}: must be at least 1")
    for name in ("beta_std", "gamma_std"):
        if not 0 <= getattr(options, name) < math.inf:
            raise ConfigError(f"{name}={getattr(options, name)}: must be at least 0 and finite")
    check_mode(options)
    if not options.norms:
        raise ConfigError("norms=[]: name at least one")
    if options.groups is not None and (options.groups < 1 or options.width % options.groups):
        raise ConfigError(f"groups={options.groups}: must divide width={options.width}")
    for norm in options.norms:
        if norm not in NORMS or norm == "none":
            valid = nearest(norm, set(NORMS) - {"none"})
            raise ConfigError(
                f"norms=[{','.join(options.norms)}]: no norm '{norm}' to measure behind; {valid}"
            )
    folder, device = Path(options.output), choose_device(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        show = show_run if options.run else show_table if options.table else show_random_nets
        show(options, folder, device)
    except ValueError as error:  # a wrong padding or number of groups
        raise ConfigError(str(error)) from error
    print(folder / "power.png")
    return 0


if __name__ == "__main__":
    script(Options, main, __doc__)
