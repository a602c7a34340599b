"""Show the method in minutes: P1 in random nets, then bn, ln and ln_pn trained on Fashion-MNIST.

Each norm has the learning rate and weight decay that the committed search chose for it
(results/mini_search). The result is a table, figures, suggestions, and a verdict in one sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from proxynorm.analysis.tables import text_table
from proxynorm.cli import as_installed, option
from proxynorm.commands import power
from proxynorm.data.opening import share_of_cores
from proxynorm.launch.local import run_locally
from proxynorm.paper.findings import gather, verdicts
from proxynorm.paper.records import collect, refuse_other_recipes
from proxynorm.paper.report import beside_bn, write_report
from proxynorm.paper.table import load_table, read_chosen, table_runs
from proxynorm.paper.tracking import log_comparison

NEXT = """
What next:
  python train.py norm=gn_pn batch=32                  # another norm
  python scripts/reproduce.py plan table=mini_norms    # nine norms, with more seeds and epochs
  python scripts/power.py run={run} weights=last       # P1 … P4 of a trained network
"""
JOBS = "runs at a time, one thread each; 0: as many as there are CPU cores"
# Sizes of the random nets: small enough to take only seconds on a CPU.
SIZES = {"width": 128, "depth": 30, "nets": 3, "images": 16, "batch": 16, "size": 8}


@dataclass
class Options:
    seeds: int | None = option(None, "runs per norm; default: the table's")
    jobs: int = option(0, JOBS, "at least 0 and finite")
    root: str = option("runs", "folder of the run folders: ROOT/demo")
    results: str = option("results", "folder of the values that the search has chosen")
    record: bool = option(False, "archive runs and report in RESULTS/demo, which docs/ quotes")
    wandb: str = option("auto", "W&B: online, offline, disabled; auto: online with a key")
    train: list[str] = option([], "further overrides for every run, such as train=[epochs=1]")


def main(options: Options) -> int:
    table = load_table("demo", options.seeds)
    runs = table_runs(table, options.root, read_chosen(table, options.results), options.train)
    refuse_other_recipes(runs, options.results)
    folder = Path(options.root) / table.name
    print("Random nets, no training: the share of power in channel-wise constants", flush=True)
    nets, norms = str(folder / "random_nets"), ["bn", "ln", "ln_pn"]
    power.main(power.Options(output=nets, norms=norms, device="cpu", **SIZES))
    jobs = options.jobs or min(share_of_cores(), len(runs))
    print(f"\nTraining {len(runs)} networks, {jobs} at a time, about a minute each", flush=True)
    if status := run_locally(runs, jobs):
        return status
    if options.record:
        for run in runs:
            collect(run, options.results)
    findings = gather(table, runs, options.results)
    target = Path(options.results) / table.name if options.record else folder / "report"
    write_report(findings, target, force=True)
    log_comparison(findings, options.wandb, target, folder)
    print(f"\n{text_table(beside_bn(findings))}\n\n{target}/report.md, curves.png, cells.png")
    print(as_installed(NEXT.format(run=runs[-1].folder)))
    print(*verdicts(findings), sep="\n")
    return 0
