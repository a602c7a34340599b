"""Reproduce a table: python scripts/reproduce.py COMMAND table=NAME [key=value …]

Commands
  plan     a line for each cell: runs done, hours; with verbose=true the command of each run
  run      train what is missing on this machine, jobs= at a time
  launch   the same, or with launcher=slurm as an array of jobs, and the report after it
  status   the state of each run
  choose   after a finished search: write results/TABLE/chosen.json, which tuned tables read
  collect  keep finished runs (config, environment, metrics, summary) in results/TABLE/runs
  report   write results/TABLE: report.md, figures (PNG, PDF), table.tex, cells.csv, and a
           comparison run on W&B; with cells= or seeds= into results/TABLE/selection
  upload   put finished runs that are not on W&B there, from their folders or results/TABLE/runs
  claims   write results/claims.md: each claim of the poster, its evidence, its status (no table=)
  docs     render the tables of results in README.md and docs/*.md anew (no table=)

Upload offline W&B runs with: wandb sync runs/TABLE/wandb/offline-run-* and
wandb sync runs/TABLE/*/wandb/offline-run-*, and what upload made offline with
wandb sync runs/TABLE/upload/*/wandb/offline-run-*"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from proxynorm.cli import nearest, option, script
from proxynorm.errors import ConfigError
from proxynorm.paper.table import Table, load_table, read_chosen, reported_runs, table_runs

if TYPE_CHECKING:
    from proxynorm.launch.slurm import SlurmOptions
    from proxynorm.paper.table import TableRun

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Options:
    command: str = option(
        "???",
        "plan, run, launch, status, choose, collect, report, upload, claims, docs; first word",
    )
    table: str = option("", "the table's name, or a YAML file; required")
    root: str = option("runs", "folder of the tables' run folders")
    results: str = option("results", "folder of chosen values, collected runs and reports")
    seeds: int | None = option(None, "runs a cell; none given: the table's")
    cells: list[str] = option([], "only these cells")
    verbose: bool = option(False, "plan: the command of each run")
    launcher: str = option("local", "local, slurm")
    jobs: int = option(1, "local: runs at a time")
    threads: int = option(1, "local: CPU threads of a run")
    limit: int | None = option(None, "slurm: array tasks at a time")
    time: str | None = option(
        None, "slurm: time limit of a run, in sbatch's notation: 90 (minutes), 12:00:00"
    )
    partition: str | None = option(None, "slurm: partition")
    nodes: int | None = option(None, "slurm: nodes of a run")
    gpus: int | None = option(None, "slurm: GPUs of a run, over all its nodes, a process each")
    cpus_per_task: int | None = option(None, "slurm: CPUs of a process")
    stage: str | None = option(
        None, "slurm: folder on each node, as /dev/shm, into which .beton files are copied first"
    )
    sbatch: list[str] = option(
        [], "slurm: further arguments of sbatch, as sbatch=[--account=A,--mem=32G]"
    )
    report: bool = option(True, "slurm: a job that writes the report after the array")
    retry_failed: bool = option(False, "slurm: submit failed runs again")
    dry_run: bool = option(False, "slurm: print the sbatch command and its runs, submit nothing")
    force: bool = option(False, "replace a report of more runs")
    wandb: str = option(
        "auto", "report, upload: online, offline, disabled; auto: online with a key, else offline"
    )
    train: list[str] = option([], "further overrides for every run, as train=[device=cuda]")


def selected_runs(options: Options, table: Table, check: bool = False) -> list[TableRun]:
    """The table's runs, or those of cells=. Raises ConfigError for a cell it does not have.

    check: also if a finished run was trained with another recipe.
    """
    for override in options.train:
        if override.split("=")[0].lstrip("+") in ("seed", "name", "runs_dir"):
            raise ConfigError(f"train=[{override}]: each run of a table has its own; leave it out")
    runs = table_runs(table, options.root, read_chosen(table, options.results), options.train)
    names = sorted({run.cell.name for run in runs})
    for cell in options.cells:
        if cell not in names:
            raise ConfigError(f"table {table.name} has no cell '{cell}'; {nearest(cell, names)}")
    runs = [run for run in runs if not options.cells or run.cell.name in options.cells]
    if check:
        from proxynorm.paper.recipe import refuse_other_recipes

        refuse_other_recipes(runs, options.results)
    return runs


def plan(options: Options, table: Table) -> int:
    from proxynorm.paper.plan import plan as describe

    runs = selected_runs(options, table)
    print(describe(table, runs, Path(options.results), options.jobs, options.verbose))
    return 0


def status(options: Options, table: Table) -> int:
    from proxynorm.paper.plan import status as describe

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(describe(selected_runs(options, table), Path(options.results), width))
    return 0


def launch(options: Options, table: Table) -> int:
    from proxynorm.launch.local import run_locally
    from proxynorm.launch.multirun import submit_array
    from proxynorm.paper.plan import estimator

    if options.launcher not in ("local", "slurm"):
        raise ConfigError(f"launcher={options.launcher}: valid: local, slurm")
    runs = not_kept(selected_runs(options, table, check=True), options.results)
    if not runs:
        return 0
    check_overrides(runs[0])
    if options.launcher == "slurm":
        estimate = partial(estimator, table, runs, options.gpus or 1)
        return submit_array(runs, table.name, slurm_options(options), estimate)
    return run_locally(runs, options.jobs, options.threads)


def check_overrides(run: TableRun) -> None:
    """Raises ConfigError for a mistake in the overrides, now rather than in each run."""
    from proxynorm.train.config import compose_config, settings_from

    try:
        settings_from(compose_config(run.arguments))
    except ConfigError as error:
        raise ConfigError(f"cell {run.cell.name}: {error}") from error


def not_kept(runs: list[TableRun], results: str) -> list[TableRun]:
    """The runs without the finished ones that are kept as archives alone, which it prints."""
    from proxynorm.paper.records import kept_status

    left = []
    for run in runs:
        now = kept_status(run, results)
        if now and now.state == "done":
            print(f"{run.name}: finished, {now.note}", flush=True)
        else:
            left.append(run)
    return left


def slurm_options(options: Options) -> SlurmOptions:
    """The options of sbatch; the report's arguments are this command line's, as YAML strings."""
    from proxynorm.launch.slurm import SlurmOptions

    words = {name: str(getattr(options, name)) for name in ("table", "root", "results", "wandb")}
    words |= {name: getattr(options, name) for name in ("cells", "train")}
    words |= {"seeds": options.seeds} if options.seeds else {}
    report = ("report", *(f"{name}={json.dumps(word)}" for name, word in words.items()))
    shared = {field.name for field in fields(SlurmOptions)} & vars(options).keys()
    values = {name: getattr(options, name) for name in shared}
    values["sbatch"] = tuple(options.sbatch)
    return SlurmOptions(**{**values, "report": report if options.report else ()})


def choose(options: Options, table: Table) -> int:
    from proxynorm.files import write_json
    from proxynorm.paper.search import choose as best

    found = best(table, selected_runs(options, table, check=True), options.results)
    path = Path(options.results) / table.name / "chosen.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    for place, values in found["chosen"].items():
        print(f"{place}: {values}  of {found['tried'][place]}")
    for place, axes in found["at_edge"].items():
        words = f"the best value of {' and '.join(axes)} lies at the edge of the search"
        print(f"warning: {place}: {words}", file=sys.stderr)
    print(path)
    return 0


def collect(options: Options, table: Table) -> int:
    from proxynorm.paper.records import collect as keep

    runs = selected_runs(options, table, check=True)
    kept = [run.name for run in runs if keep(run, options.results)]
    print(f"{len(kept)} runs collected into {Path(options.results) / table.name / 'runs'}")
    return 0


def report(options: Options, table: Table) -> int:
    from proxynorm.paper.findings import gather, verdicts
    from proxynorm.paper.report import write_report
    from proxynorm.paper.tracking import log_report

    part = {"seeds": options.seeds, "cells": options.cells}
    given = {**part, "train": options.train}
    words = [f"{key}={json.dumps(value)}" for key, value in given.items() if value]
    findings = gather(table, selected_runs(options, table, check=True), options.results, words)
    folder = Path(options.results) / table.name / ("selection" if any(part.values()) else "")
    path = folder / "report.md"
    write_report(findings, folder, options.force)
    log_report(findings, options.wandb, path, Path(options.root) / table.name)
    print(*verdicts(findings), path, sep="\n")
    return 0


def upload(options: Options, table: Table) -> int:
    from proxynorm.paper.tracking import upload as put

    folder = Path(options.root) / table.name / "upload"
    names = put(selected_runs(options, table), Path(options.results), options.wandb, folder)
    print(f"{len(names)} runs uploaded ({options.wandb}); W&B's files: {folder}")
    return 0


def claims(options: Options) -> int:
    from proxynorm.files import write_text
    from proxynorm.paper.claims import claims_report, load_claims, random_net_figures
    from proxynorm.paper.findings import gather
    from proxynorm.paper.recipe import refuse_other_recipes

    outcomes = {}
    for name in dict.fromkeys(name for claim in load_claims() for name in claim.tables):
        table = load_table(name)
        runs = reported_runs(table, options.root, options.results)
        refuse_other_recipes(runs, options.results)
        outcomes[name] = gather(table, runs, options.results).outcomes
    path = Path(options.results) / "claims.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, claims_report(outcomes, random_net_figures(options.results)))
    print(path)
    return 0


def docs(options: Options) -> int:
    from proxynorm.paper.blocks import render_blocks

    if not (ROOT / "README.md").is_file():
        raise ConfigError("docs renders the pages of the repository: git clone it and run there")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if render_blocks(path, Path(options.results)):
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
    "upload": upload,
}
WITHOUT_TABLE = {"claims": claims, "docs": docs}


def main(options: Options) -> int:
    if options.command in WITHOUT_TABLE:
        return WITHOUT_TABLE[options.command](options)
    if options.command not in COMMANDS:
        valid = [*COMMANDS, *WITHOUT_TABLE]
        raise ConfigError(f"no command '{options.command}'; {nearest(options.command, valid)}")
    return COMMANDS[options.command](options, load_table(options.table, options.seeds))


def prepare(words: list[str]) -> list[str]:
    """Name the first word."""
    if words and "=" not in words[0] and not words[0].startswith("-"):
        return [f"command={words[0]}", *words[1:]]
    return words


def entry() -> None:
    sys.argv[1:] = prepare(sys.argv[1:])
    script(Options, main, __doc__)
