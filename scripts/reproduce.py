"""Reproduce a table: python scripts/reproduce.py COMMAND table=NAME [key=value …]

Commands
  plan     the table's runs with their commands, what is done, the hours left
  run      train what is missing on this machine, jobs= at a time
  launch   the same, or with launcher=slurm as an array of jobs, and the report after it
  status   where each run stands
  choose   of a finished search: write results/TABLE/chosen.json, which the tuned tables read
  collect  keep finished runs (configuration, environment, metrics, summary) as results/TABLE/runs/*.tar.xz
  report   write results/TABLE/report.md, report.html and figures from the run folders and the kept runs; with cells= or
           seeds= into results/TABLE/selection, beside the whole table's
  claims   write results/claims.md: each claim of the poster, what shows it here, its status (no table=)

Offline W&B runs go up with: wandb sync runs/TABLE/wandb/offline-run-* runs/TABLE/*/wandb/offline-run-*"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from proxynorm.cli import nearest, option, script
from proxynorm.errors import ConfigError
from proxynorm.paper.table import Table, load_table, with_seeds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxynorm.launch.runs import Run
    from proxynorm.launch.slurm import SlurmOptions
    from proxynorm.launch.sweep import Entry


@dataclass
class Options:
    command: str = option(
        "???", "as the first word: plan, run, launch, status, choose, collect, report, claims"
    )
    table: str = option("", "the table's name, or a YAML file; required")
    root: str = option("runs", "folder of the tables' run folders")
    results: str = option(
        "results", "folder of what is kept: chosen values, collected runs, reports"
    )
    seeds: int | None = option(None, "runs a cell; none given: the table's")
    cells: list[str] = option([], "only these cells")
    launcher: str = option("local", "what runs them: local, slurm")
    jobs: int = option(1, "local: runs at a time")
    threads: int = option(1, "local: CPU threads of a run")
    limit: int | None = option(None, "slurm: array tasks at a time")
    time: str | None = option(
        None,
        "slurm: time limit of a run, as sbatch takes it: 90 (minutes), 12:00:00; it is queued again if it saved",
    )
    partition: str | None = option(None, "slurm: partition")
    nodes: int | None = option(None, "slurm: nodes of a run")
    gpus: int | None = option(None, "slurm: GPUs of a run, over all its nodes, a process each")
    cpus_per_task: int | None = option(None, "slurm: CPUs of a process")
    stage: str | None = option(
        None,
        "slurm: folder of each node, such as /dev/shm, into which .beton files are copied first",
    )
    sbatch: list[str] = option(
        [], "slurm: further arguments of sbatch, such as sbatch=[--account=A,--mem=32G]"
    )
    requeues: int = option(0, "slurm: how many more time limits a run may take")
    report: bool = option(True, "slurm: a job that writes the report after the array")
    retry_failed: bool = option(False, "slurm: submit failed runs again")
    probe: bool = option(False, "first train a few steps of each cell, to estimate by")
    dry_run: bool = option(
        False, "slurm: print the sbatch command and the array's runs, submit nothing"
    )
    force: bool = option(False, "slurm: submit what the estimate says cannot end within its limits")
    wandb: str = option(
        "auto",
        "the report on W&B: online, offline, disabled; auto: online with a key, else offline",
    )
    train: list[str] = option([], "further overrides for every run, such as train=[device=cuda]")


def selected_runs(options: Options, table: Table) -> list[Run]:
    """The table's runs, or those of the cells asked for. Raises ConfigError for a cell it does not have."""
    from proxynorm.launch.runs import read_chosen, table_runs

    runs = table_runs(table, options.root, read_chosen(table, options.results))
    names = sorted({run.cell.name for run in runs})
    for cell in options.cells:
        if cell not in names:
            raise ConfigError(f"table {table.name} has no cell '{cell}'; {nearest(cell, names)}")
    return [run for run in runs if not options.cells or run.cell.name in options.cells]


def own_runs(options: Options, table: Table) -> list[Run]:
    """The selected runs. Raises ConfigError if a finished one was trained otherwise than the table and train= say."""
    from proxynorm.paper.recipe import refuse_other_recipes

    runs = selected_runs(options, table)
    refuse_other_recipes(runs, options.results, options.train)
    return runs


def plan(options: Options, table: Table) -> int:
    from proxynorm.launch.planning import plan as describe

    print(
        describe(
            table, selected_runs(options, table), Path(options.results), options.jobs, options.train
        )
    )
    return 0


def status(options: Options, table: Table) -> int:
    from proxynorm.launch.planning import status as describe

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(describe(selected_runs(options, table), Path(options.results), width, options.train))
    return 0


def launch(options: Options, table: Table) -> int:
    from proxynorm.launch.estimate import Estimator, check, probe_runs
    from proxynorm.launch.local import LAUNCHERS, LaunchOptions
    from proxynorm.paper.recipe import refuse_other_recipes

    if options.launcher not in LAUNCHERS:
        raise ConfigError(f"launcher={options.launcher}: {nearest(options.launcher, LAUNCHERS)}")
    runs, overrides = selected_runs(options, table), tuple(options.train)
    for override in overrides:
        if override.split("=")[0].lstrip("+") in ("seed", "name", "runs_dir"):
            raise ConfigError(
                f"train=[{override}]: each run of a table has its own seed, name and runs_dir; leave it out"
            )
    refuse_other_recipes(runs, options.results, overrides)
    runs = not_kept(runs, options.results)
    if not runs:
        return 0
    check_overrides(runs[0], overrides)

    def estimated(due: Sequence[Entry]) -> None:
        estimate = Estimator(runs[0].folder.parent, Path(options.results), table, options.gpus or 1)
        check(due, estimate, settings.slurm, options.force, partial(print, flush=True))

    settings = LaunchOptions(
        options.jobs, options.threads, overrides, slurm=slurm_options(options), check=estimated
    )
    launcher = LAUNCHERS[options.launcher]
    if options.probe:
        launcher(
            probe_runs(runs),
            replace(settings, slurm=replace(settings.slurm, wait=True, report=()), check=None),
        )
    return launcher(runs, settings)


def check_overrides(run: Run, overrides: Sequence[str]) -> None:
    """Raises ConfigError for a mistake in the overrides, which shows now, not once a run."""
    from proxynorm.train.config import compose_config, settings_from

    try:
        settings_from(compose_config([*run.arguments(), *overrides]))
    except ConfigError as error:
        raise ConfigError(f"cell {run.cell.name}: {error}") from error


def not_kept(runs: Sequence[Run], results: str) -> list[Run]:
    """The runs without those that are finished and kept as archives alone, which it names."""
    from proxynorm.paper.records import kept_standing

    kept = {
        run.name: now
        for run in runs
        if (now := kept_standing(run, results)) and now.state == "done"
    }
    for name, now in kept.items():
        print(f"{name}: finished, {now.note}", flush=True)
    return [run for run in runs if run.name not in kept]


def slurm_options(options: Options) -> SlurmOptions:
    """What sbatch is asked for; the report's arguments are those of this command line, as YAML strings."""
    from proxynorm.launch.slurm import SlurmOptions

    words = {
        name: json.dumps(str(getattr(options, name)))
        for name in ("table", "root", "results", "wandb")
    }
    words |= {name: json.dumps(getattr(options, name)) for name in ("cells", "train")}
    words |= {"seeds": str(options.seeds)} if options.seeds else {}
    report = (
        ("report", *(f"{name}={word}" for name, word in words.items())) if options.report else ()
    )
    shared = {field.name for field in fields(SlurmOptions)} & {
        field.name for field in fields(options)
    }
    values = {name: getattr(options, name) for name in shared}
    return SlurmOptions(**{**values, "sbatch": tuple(options.sbatch), "report": report})


def choose(options: Options, table: Table) -> int:
    from proxynorm.files import write_json
    from proxynorm.paper.search import choose as best

    found = best(table, own_runs(options, table), options.results)
    path = Path(options.results) / table.name / "chosen.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    for place, values in found["chosen"].items():
        print(f"{place}: {values}  of {found['tried'][place]}")
    for place, axes in found["at_edge"].items():
        print(
            f"warning: {place}: the best value of {' and '.join(axes)} lies at the edge of the search",
            file=sys.stderr,
        )
    print(path)
    return 0


def collect(options: Options, table: Table) -> int:
    from proxynorm.paper.records import collect as keep

    kept = [run.name for run in own_runs(options, table) if keep(run, options.results)]
    print(f"{len(kept)} runs collected into {Path(options.results) / table.name / 'runs'}")
    return 0


def report(options: Options, table: Table) -> int:
    from proxynorm.paper.report import gather, write_report
    from proxynorm.paper.tracking import log_report

    part = {"seeds": options.seeds, "cells": options.cells}
    words = [
        f"{key}={json.dumps(value)}"
        for key, value in {**part, "train": options.train}.items()
        if value
    ]
    findings = gather(table, own_runs(options, table), options.results, words)
    folder = Path(options.results) / table.name / ("selection" if any(part.values()) else "")
    write_report(findings, folder)
    log_report(findings, options.wandb, Path(options.root) / table.name, project="proxynorm")
    print(folder / "report.md")
    return 0


def claims(options: Options) -> int:
    from proxynorm.files import write_text
    from proxynorm.launch.runs import reported_runs
    from proxynorm.paper.claims import claims_report, load_claims, random_net_figures
    from proxynorm.paper.recipe import refuse_other_recipes
    from proxynorm.paper.report import gather

    tables = {name: load_table(name) for claim in load_claims() for name in claim.tables}
    runs = {
        name: reported_runs(table, options.root, options.results) for name, table in tables.items()
    }
    for of_table in runs.values():
        refuse_other_recipes(of_table, options.results)
    outcomes = {
        name: gather(table, runs[name], options.results).outcomes for name, table in tables.items()
    }
    path = Path(options.results) / "claims.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, claims_report(outcomes, random_net_figures(options.results)))
    print(path)
    return 0


COMMANDS = {
    "plan": plan,
    "run": launch,
    "launch": launch,
    "status": status,
    "choose": choose,
    "collect": collect,
    "report": report,
}


def main(options: Options) -> int:
    if options.command == "claims":
        return claims(options)
    if options.command not in COMMANDS:
        raise ConfigError(
            f"no command '{options.command}'; {nearest(options.command, [*COMMANDS, 'claims'])}"
        )
    return COMMANDS[options.command](options, with_seeds(load_table(options.table), options.seeds))


if __name__ == "__main__":
    if len(sys.argv) > 1 and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"command={sys.argv[1]}"
    # YAML reads 1:30:00 as a number to the base of 60
    sys.argv[1:] = [
        f"time={json.dumps(word[5:])}" if word.startswith("time=") else word
        for word in sys.argv[1:]
    ]
    script(Options, main, __doc__)
