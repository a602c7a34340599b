"""The power decomposition (the paper's Fig. 2) of random networks or of a run.

  python scripts/power.py 'norms=[ln,ln_pn]' nets=8 output=results/power_random_net
  python scripts/power.py run=runs/NAME             # as logged with power.every_epochs=…
  python scripts/power.py run=runs/NAME weights=last               # of a checkpoint

Writes power.csv and power.png into the output folder. For random networks, it also writes
summary.json and p1.png, which shows P1 against depth for each norm that was measured with and
without PN. Figures are also written as PDF and SVG. The report of a table (scripts/reproduce.py
report) shows the power decomposition of its networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from proxynorm.analysis.power import PowerRow, power_decomposition
from proxynorm.analysis.power_monitor import from_metrics, mean_rows, measure, write_csv
from proxynorm.analysis.power_plots import p1_figure, power_figure
from proxynorm.analysis.random_net import mean_field_p1, random_net
from proxynorm.analysis.style import norm_label, save_figure
from proxynorm.cli import option
from proxynorm.errors import ConfigError
from proxynorm.files import write_json
from proxynorm.nn import NORMS
from proxynorm.train.distributed import choose_device
from proxynorm.train.restore import checkpoint_path, open_evaluation_data, restore
from proxynorm.train.run_folder import read_metrics

VECTOR = ("pdf", "svg")
SHOWN = ["bn", "in", "ln", "gn", "ln_pn", "ln_ws"]
MEASURED = [norm for norm in NORMS if norm != "none"]
BATCH = "images per forward pass, which share Batch Norm's statistics"


@dataclass
class Options:
    output: str = option("results/power", "output folder")
    run: str | None = option(None, "run folder; default: random nets")
    weights: str | None = option(None, "with run=: measure this checkpoint, last or best")
    images: int = option(32, "images to measure on", "at least 1")
    batch: int = option(8, BATCH, "at least 1")
    norms: list[str] = option(SHOWN, "random nets: the norms", choices=MEASURED)
    width: int = option(1024, "random nets: channels", "at least 1")
    depth: int = option(50, "random nets: layers", "at least 1")
    size: int = option(8, "random nets: side of the white-noise input", "at least 1")
    nets: int = option(1, "random nets: seeds to average over", "at least 1")
    beta_std: float = option(0.2, "random nets: β ~ N(0, beta_std²)", "at least 0 and finite")
    gamma_std: float = option(0.2, "random nets: γ ~ N(1, gamma_std²)", "at least 0 and finite")
    groups: int | None = option(None, "random nets: groups of gn", "at least 1")
    device: str = option("auto", "auto, cpu, cuda")


def decompose_random_nets(options: Options, device: torch.device) -> dict[str, list]:
    """Return {norm: rows of each network}."""
    by_norm: dict[str, list[list[PowerRow]]] = {norm: [] for norm in options.norms}
    keys = ("width", "depth", "beta_std", "gamma_std", "groups")
    architecture = {key: getattr(options, key) for key in keys}
    shape = (options.images, 3, options.size, options.size)
    for norm, nets in by_norm.items():
        for seed in range(options.nets):
            net = random_net(norm, seed=seed, **architecture).to(device)
            images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            nets.append(power_decomposition(net, images.split(options.batch)))
            last = nets[-1][-1]
            print(f"{norm} net {seed}: P1 at depth {last.depth} {last.p1:.4f}", flush=True)
    return by_norm


def show_random_nets(options: Options, folder: Path, device: torch.device) -> None:
    """Decompose random networks; write CSV, figures and summary.json."""
    by_norm = decompose_random_nets(options, device)
    means = {norm: mean_rows(nets) for norm, nets in by_norm.items()}
    # The first norm sees a convolution of white noise, whose P1 is 0.
    field = [0.0, *mean_field_p1(options.depth - 1, options.beta_std, options.gamma_std)]
    expected = {"ln": field} if "ln" in means else {}
    write_csv(folder / "power.csv", means, "norm")
    save_figure(power_figure(means, expected), folder / "power.png", VECTOR)
    pairs = [name for norm in by_norm for name in (norm, f"{norm}_pn") if f"{norm}_pn" in by_norm]
    shown = {norm: by_norm[norm] for norm in pairs or by_norm}
    mean_field = {norm: curve for norm, curve in expected.items() if norm in shown}
    title = f"Random nets: {', '.join(map(norm_label, shown))}, mean and range of {options.nets}"
    figure = p1_figure({title: shown}, mean_field=mean_field)
    save_figure(figure, folder / "p1.png", VECTOR)

    def distance(rows: list[PowerRow]) -> float:
        return max(abs(row.p1 - p) for row, p in zip(rows, field, strict=True))

    keys = ("width", "depth", "nets", "images", "size", "beta_std", "gamma_std")
    summary = {key: getattr(options, key) for key in keys}
    summary["largest_p1"] = {norm: max(row.p1 for row in rows) for norm, rows in means.items()}
    if expected:
        summary["largest_distance_of_ln_from_mean_field"] = {
            "mean over nets": distance(means["ln"]),
            "each net": [distance(rows) for rows in by_norm["ln"]],
        }
    write_json(folder / "summary.json", summary)


def show_run(options: Options, folder: Path, device: torch.device) -> None:
    """Write what a run logged; if it logged nothing, or with weights=, decompose its checkpoint."""
    source = Path(options.run)
    logged = [row for row in read_metrics(source / "metrics.jsonl") if row["event"] == "power"]
    if logged and not options.weights:
        panels = {f"epoch {row['epoch']:g}": from_metrics(row) for row in logged}
    else:
        weights = options.weights or "last"
        restored = restore(checkpoint_path(options.run, None, weights))
        data = open_evaluation_data(restored)
        panels = {weights: measure(restored.model.to(device), data, options.images, options.batch)}
    write_csv(folder / "power.csv", panels, "step")
    norm = norm_label(yaml.safe_load((source / "config.yaml").read_text())["norm"]["name"])
    titled = {f"{norm}, {step}": rows for step, rows in panels.items()}
    save_figure(power_figure(titled), folder / "power.png", VECTOR)


def main(options: Options) -> None:
    if options.groups and options.width % options.groups:
        raise ConfigError(f"groups={options.groups}: must divide width={options.width}")
    folder, device = Path(options.output), choose_device(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (show_run if options.run else show_random_nets)(options, folder, device)
    except ValueError as error:  # no norms, or a number of channels that groups does not divide
        raise ConfigError(str(error)) from error
    print(folder / "power.png")
