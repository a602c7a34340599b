"""Reproduce a table: python scripts/reproduce.py COMMAND table=NAME [key=value …]

Commands
  plan     a line per cell: runs done, hours; with verbose=true the command of
           each run
  run      train the missing runs on this machine, jobs= at a time
  launch   the same, or with launcher=slurm submit them as an array of jobs,
           followed by the report
  status   the state of each run
  choose   after a finished search: write results/TABLE/chosen.json, which tuned
           tables read
  collect  archive finished and failed runs (config, environment, metrics,
           summary) in results/TABLE/runs
  report   write results/TABLE: report.md, figures (PNG, PDF), table.tex,
           cells.csv, and a comparison run on W&B; with cells= or seeds= into
           results/TABLE/selection
  upload   log finished runs that are not on W&B yet, from their folders or
           results/TABLE/runs
  claims   write results/claims.md: each claim of the poster, its evidence, its
           status (no table=)
  docs     update the tables of results in README.md and docs/*.md (no table=)

Upload offline W&B runs with wandb sync runs/TABLE/wandb/offline-run-* and
wandb sync runs/TABLE/*/wandb/offline-run-*, and those of the command `upload` with
wandb sync runs/TABLE/upload/*/wandb/offline-run-*"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from proxynorm.cli import nearest, option, script
from proxynorm.errors import ConfigError
from proxynorm.files import write_json, write_text
from proxynorm.launch.local import run_locally
from proxynorm.launch.slurm import SlurmOptions, launch_array
from proxynorm.paper import records, search
from proxynorm.paper.plan import kept_status, plan_text, status_text
from proxynorm.paper.records import refuse_other_recipes
from proxynorm.paper.table import (
    Table,
    TableRun,
    load_table,
    read_chosen,
    reported_runs,
    table_runs,
)
from proxynorm.train.config import compose_config, settings_from

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class TableOptions:
    command: str = option("???", "one of the commands above; the first argument")
    table: str | None = option(None, "the table's name, or a YAML file; required")
    root: str = option("runs", "folder of the run folders, ROOT/TABLE/NAME")
    results: str = option("results", "folder of chosen values, collected runs and reports")
    seeds: int | None = option(None, "runs per cell; default: the table's")
    cells: list[str] = option([], "only these cells")
    train: list[str] = option([], "further overrides for every run, such as train=[device=cuda]")
    verbose: bool = option(False, "plan: the command of each run")
    force: bool = option(False, "report: replace a report of more runs")
    wandb: str = option(
        "auto", "report, upload: online, offline, disabled; auto: online with a key, else offline"
    )
    launcher: str = option("local", "local, slurm", choices=("local", "slurm"))
    jobs: int = option(1, "local: runs at a time", "at least 1")
    threads: int = option(1, "local: CPU threads of a run", "at least 1")


@dataclass
class Options(SlurmOptions, TableOptions):  # dataclasses take the fields of the last base first
    report: bool = option(True, "slurm: submit a job that writes the report after the array")


def selected_runs(options: Options, check: bool = False) -> tuple[Table, list[TableRun]]:
    """Return the table and its runs; with cells=, only the runs of those cells.

    Raises ConfigError for an unknown cell and, with `check`, for finished runs of another recipe.
    """
    table = load_table(options.table or "", options.seeds)
    for override in options.train:
        if override.split("=")[0].lstrip("+") in ("seed", "name", "runs_dir"):
            raise ConfigError(f"train=[{override}]: the table sets it for each run; leave it out")
    runs = table_runs(table, options.root, read_chosen(table, options.results), options.train)
    names = sorted({run.cell.name for run in runs})
    for cell in options.cells:
        if cell not in names:
            raise ConfigError(f"table {table.name} has no cell '{cell}'; {nearest(cell, names)}")
    runs = [run for run in runs if not options.cells or run.cell.name in options.cells]
    if check:
        refuse_other_recipes(runs, options.results)
    return table, runs


def arguments(options: Options, *keys: str) -> list[str]:
    """Return the options that are set, as key=value arguments with JSON values."""
    given = {key: value for key in keys if (value := getattr(options, key))}
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def plan(options: Options) -> None:
    table, runs = selected_runs(options)
    print(plan_text(table, runs, Path(options.results), options.jobs, options.verbose))


def status(options: Options) -> None:
    print(status_text(selected_runs(options)[1], Path(options.results)))


def launch(options: Options) -> int:
    """Train the runs that are not finished or archived, here or on SLURM (run, launch)."""
    table, runs = selected_runs(options, check=True)
    due = []
    for run in runs:
        kept = kept_status(run, options.results)
        if kept and kept.state == "done":
            print(f"{run.name}: finished, {kept.note}", flush=True)
        else:
            due.append(run)
    if not due:
        return 0
    try:  # report a mistake in the overrides once, not for each run
        settings_from(compose_config(due[0].arguments))
    except ConfigError as error:
        raise ConfigError(f"cell {due[0].cell.name}: {error}") from error
    if options.launcher == "local":
        return run_locally(due, options.jobs, options.threads)
    keys = ("table", "root", "results", "seeds", "cells", "train", "wandb")
    report = ["report", *arguments(options, *keys)] if options.report else []
    return launch_array(due, table.name, options, report)


def choose(options: Options) -> None:
    table, runs = selected_runs(options, check=True)
    choice = search.choose(table, runs, options.results)
    path = Path(options.results) / table.name / "chosen.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, choice)
    for group, values in choice["chosen"].items():
        print(f"{group}: {values}  of {choice['tried'][group]}")
    for group, axes in choice["at_edge"].items():
        warning = f"the best value of {' and '.join(axes)} is at the edge of the search"
        print(f"warning: {group}: {warning}", file=sys.stderr)
    print(path)


def collect(options: Options) -> None:
    table, runs = selected_runs(options, check=True)
    kept = sum(records.collect(run, options.results) for run in runs)
    print(f"{kept} runs collected into {Path(options.results) / table.name / 'runs'}")


def report(options: Options) -> None:
    from proxynorm.paper.findings import gather, verdicts
    from proxynorm.paper.report import write_report
    from proxynorm.paper.tracking import log_comparison

    table, runs = selected_runs(options, check=True)
    selection = "selection" if options.seeds or options.cells else ""
    findings = gather(table, runs, options.results, arguments(options, "seeds", "cells", "train"))
    folder = Path(options.results) / table.name / selection
    write_report(findings, folder, options.force)
    log_comparison(findings, options.wandb, folder, Path(options.root) / table.name)
    print(*verdicts(findings), folder / "report.md", sep="\n")


def upload(options: Options) -> None:
    from proxynorm.paper.tracking import upload_runs

    table, runs = selected_runs(options)
    folder = Path(options.root) / table.name / "upload"
    names = upload_runs(runs, Path(options.results), options.wandb, folder)
    where = f"; W&B's files: {folder}" if names else ""
    print(f"{len(names)} runs uploaded ({options.wandb}){where}")


def claims(options: Options) -> None:
    from proxynorm.paper.claims import claims_report, load_claims
    from proxynorm.paper.findings import gather

    outcomes = {}
    for name in dict.fromkeys(name for claim in load_claims() for name in claim.tables):
        table = load_table(name)
        runs = reported_runs(table, options.root, options.results)
        refuse_other_recipes(runs, options.results)
        outcomes[name] = gather(table, runs, options.results).outcomes
    path = Path(options.results) / "claims.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, claims_report(outcomes))
    print(path)


def docs(options: Options) -> None:
    from proxynorm.paper.report import rendered

    if not (ROOT / "README.md").is_file():
        raise ConfigError("docs renders pages of the repository: git clone it and run there")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        new = rendered(text, Path(options.results))
        if new != text:
            write_text(path, new)
            print(path)


FUNCTIONS = (plan, launch, status, choose, collect, report, upload, claims, docs)
COMMANDS = {"run": launch, **{function.__name__: function for function in FUNCTIONS}}


def main(options: Options) -> int:
    if options.command not in COMMANDS:
        raise ConfigError(f"no command '{options.command}'; {nearest(options.command, COMMANDS)}")
    return COMMANDS[options.command](options) or 0


def entry() -> None:
    if sys.argv[1:] and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"command={sys.argv[1]}"
    script(Options, main, __doc__)
