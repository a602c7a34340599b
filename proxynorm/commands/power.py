"""The power decomposition (the paper's Fig. 2) of random nets, of a run, or of a table's runs.

  python scripts/power.py 'norms=[ln,ln_pn]' nets=8 output=results/power_random_net
  python scripts/power.py run=runs/NAME           # the steps logged by power.every_epochs=…,
  python scripts/power.py run=runs/NAME weights=last       # or a checkpoint
  python scripts/power.py table=mini_norms        # last.pt of every finished run, against accuracy

Writes power.csv, power.png and, except for a run, summary.json into output; for random nets also
p1.png and p1.svg: P1 of each norm that was measured both with and without PN, against depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from proxynorm.analysis.plots import plot_p1, plot_power
from proxynorm.analysis.power import PowerRow, power_decomposition
from proxynorm.analysis.power_files import from_metrics, mean_rows, write_csv
from proxynorm.analysis.power_monitor import measure
from proxynorm.analysis.random_net import mean_field_p1, random_net
from proxynorm.cli import nearest, option, script
from proxynorm.errors import ConfigError
from proxynorm.files import write_json
from proxynorm.nn import NORMS
from proxynorm.train.distributed import choose_device
from proxynorm.train.run_folder import environment, read_metrics

RANDOM, RUN, TABLE = "random nets", "run=", "table="


@dataclass
class Options:
    output: str = option("results/power", "folder of the files")
    run: str | None = option(None, "a run folder instead of random nets")
    table: str | None = option(None, "the finished runs of a table instead of random nets")
    root: str = option("runs", "table=: folder of the tables' run folders")
    results: str = option("results", "table=: folder of what searches have chosen")
    weights: str = option("", "run=: measure this checkpoint, last or best, not the logged steps")
    images: int = option(32, "images to measure on")
    batch: int = option(8, "images a forward; Batch Norm's statistics are over these")
    norms: list[str] = option(["bn", "in", "ln", "gn", "ln_pn", "ln_ws"], "random nets: the norms")
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


def mode_of(options: Options) -> str:
    """RUN, TABLE or RANDOM. Raises ConfigError for an option of another mode."""
    if options.run and options.table:
        raise ConfigError("run= and table= exclude each other: give one")
    mode = RUN if options.run else TABLE if options.table else RANDOM
    default = Options()
    for item in fields(options):
        # The help text of an option of one mode begins with it.
        owner, colon, _ = item.metadata["help"].partition(": ")
        given = getattr(options, item.name) != getattr(default, item.name)
        if colon and owner in (RANDOM, RUN, TABLE) and owner != mode and given:
            here = "of random nets" if mode == RANDOM else f"with {mode}"
            raise ConfigError(f"{item.name}= says nothing {here}: leave it out")
    return mode


def check(options: Options) -> None:
    """Raise ConfigError for a value that cannot be measured."""
    for name in ("images", "batch", "width", "depth", "size", "nets"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)}: must be at least 1")
    for name in ("beta_std", "gamma_std"):
        if not 0 <= getattr(options, name) < math.inf:
            raise ConfigError(f"{name}={getattr(options, name)}: must be at least 0 and finite")
    if not options.norms:
        raise ConfigError("norms=[]: name at least one")
    if options.groups is not None and (options.groups < 1 or options.width % options.groups):
        raise ConfigError(f"groups={options.groups}: must divide width={options.width}")
    known = set(NORMS) - {"none"}
    for norm in options.norms:
        if norm not in known:
            raise ConfigError(
                f"norms=[{','.join(options.norms)}]: no norm '{norm}' to measure behind; "
                f"{nearest(norm, known)}"
            )


def decompose_random_nets(options: Options, device: torch.device) -> dict[str, list]:
    """The rows of each net, by norm."""
    found: dict[str, list[list[PowerRow]]] = {norm: [] for norm in options.norms}
    keys = ("width", "depth", "beta_std", "gamma_std", "groups")
    chosen = {key: getattr(options, key) for key in keys}
    shape = (options.images, 3, options.size, options.size)
    for norm, nets in found.items():
        for seed in range(options.nets):
            net = random_net(norm, seed=seed, padding_mode=options.padding, **chosen).to(device)
            images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            nets.append(power_decomposition(net, images.split(options.batch)))
            last = nets[-1][-1]
            print(f"{norm} net {seed}: P1 at depth {last.depth} {last.p1:.4f}", flush=True)
    return found


def show_random_nets(options: Options, folder: Path, device: torch.device) -> None:
    found = decompose_random_nets(options, device)
    means = {norm: mean_rows(nets) for norm, nets in found.items()}
    field = [0.0, *mean_field_p1(options.depth - 1, options.beta_std, options.gamma_std)]
    expected = {"ln": field} if "ln" in means else {}
    write_csv(folder / "power.csv", means, "norm")
    plot_power(means, folder / "power.png", expected)
    pairs = [name for norm in found for name in (norm, f"{norm}_pn") if f"{norm}_pn" in found]
    shown = {norm: found[norm] for norm in pairs or found}
    mean_field = {norm: curve for norm, curve in expected.items() if norm in shown}
    plot_p1(shown, [folder / "p1.png", folder / "p1.svg"], mean_field)
    keys = ("width", "depth", "nets", "images", "size", "beta_std", "gamma_std", "padding")
    last = {norm: [rows[-1].p1 for rows in nets] for norm, nets in found.items()}
    summary = {
        **{key: getattr(options, key) for key in keys},
        "largest_p1": {norm: max(row.p1 for row in rows) for norm, rows in means.items()},
        "p1_of_each_net_at_last_depth": last,
    }
    if expected:
        summary["mean_field_p1"] = field
        summary["largest_distance_of_ln_from_mean_field"] = {
            "mean over nets": distance(means["ln"], field),
            "each net": [distance(rows, field) for rows in found["ln"]],
        }
    write_json(folder / "summary.json", summary)


def distance(rows: list[PowerRow], curve: list[float]) -> float:
    """The largest distance of P1 from a curve."""
    return max(abs(row.p1 - p) for row, p in zip(rows, curve, strict=True))


def show_run(options: Options, folder: Path, device: torch.device) -> None:
    rows = read_metrics(Path(options.run) / "metrics.jsonl")
    logged = [row for row in rows if row["event"] == "power"]
    if logged and not options.weights:
        panels = {f"epoch {row['epoch']:g}": from_metrics(row) for row in logged}
    else:
        panels = {options.weights or "last": measure_checkpoint(options, device)}
    write_csv(folder / "power.csv", panels, "step")
    plot_power(panels, folder / "power.png")


def measure_checkpoint(options: Options, device: torch.device) -> list[PowerRow]:
    from proxynorm.train.restore import checkpoint_path, open_evaluation_data, restore

    restored = restore(checkpoint_path(options.run, None, options.weights or "last"))
    data = open_evaluation_data(restored).data
    return measure(restored.model.to(device), data, options.images, options.batch)


def show_table(options: Options, folder: Path, device: torch.device) -> None:
    from proxynorm.paper.table import load_table, read_chosen, table_runs
    from proxynorm.paper.trained_power import plot_against_metric, summarize, trained_nets

    table = load_table(options.table)
    runs = table_runs(table, options.root, read_chosen(table, options.results))
    nets = []
    for net in trained_nets(runs, table.metric, options.images, options.batch, device):
        print(f"{net.run}: {table.metric} {net.metric:.2f}, P1 {net.mean('p1'):.4f}", flush=True)
        nets.append(net)
    write_csv(folder / "power.csv", {net.run: net.rows for net in nets}, "run")
    plot_against_metric(nets, table.metric, folder / "power.png")
    measured = {"table": table.name, "metric": table.metric, "images": options.images}
    content = {**measured, "environment": environment(), **summarize(nets)}
    write_json(folder / "summary.json", content)


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    mode = mode_of(options)
    check(options)
    folder, device = Path(options.output), choose_device(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    show = {RUN: show_run, TABLE: show_table, RANDOM: show_random_nets}[mode]
    try:
        show(options, folder, device)
    except ValueError as error:  # a wrong padding or number of groups
        raise ConfigError(str(error)) from error
    print(folder / "power.png")


def entry() -> None:
    script(Options, main, __doc__)
