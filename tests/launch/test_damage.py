"""Damaged run folders and archives: one line names the file and the remedy."""

import re
import shutil
from pathlib import Path

import pytest

from proxynorm.cli import guard, parse_options
from proxynorm.commands.reproduce import Options, main
from proxynorm.errors import DataError
from proxynorm.launch.local import run_locally
from proxynorm.launch.slurm import is_due
from proxynorm.launch.status import run_status
from proxynorm.paper.plan import plan_text, status_text
from proxynorm.paper.records import archive_path, collect, kept_record, read_record, write_archive
from proxynorm.paper.table import table_runs
from tests.tiny_table import write_run

DAMAGE = {
    "truncated summary": ("summary.json", lambda text: text[:20]),
    "empty summary": ("summary.json", lambda text: ""),
    "summary of a list": ("summary.json", lambda text: "[]"),
    "summary without completed": ("summary.json", lambda text: "{}"),
    "no metrics": ("metrics.jsonl", None),
    "no configuration": ("config.yaml", None),
}
NOISE = {
    "metrics cut in a line": ("metrics.jsonl", lambda text: text[:-9]),
    "random metrics": ("metrics.jsonl", lambda text: "\x00\x93\x01\n" + text),
    "half an environment": ("environment.json", lambda text: text[:30]),
    "a configuration of noise": ("config.yaml", lambda text: "{" + text),
}


@pytest.fixture(params=DAMAGE)
def damaged(request, tiny, tmp_path):
    """The table's runs, of which two are finished and the first is damaged, and its error."""
    runs = table_runs(tiny, tmp_path / "runs")
    write_run(runs[0], 50.0)
    write_run(runs[1], 50.0)
    name, change = DAMAGE[request.param]
    spoil(runs[0].folder / name, change)
    folder = re.escape(str(runs[0].folder))
    reason = rf".*{re.escape(name)}.*" if name != "summary.json" else ".*"
    return runs, rf"{folder}(/summary\.json)? is damaged \({reason}\); remove it and run again"


def spoil(path, change):
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))


def command(tmp_path, capsys, word):
    """Run a command and return its exit status and output."""
    words = [
        f"command={word}",
        f"table={tmp_path}/tiny.yaml",
        f"root={tmp_path}/runs",
        f"results={tmp_path}/results",
    ]
    with pytest.raises(SystemExit) as ended:
        guard(lambda: main(parse_options(Options, [*words, "wandb=disabled"])))
    return ended.value.code, capsys.readouterr()


@pytest.mark.parametrize("word", ["report", "collect"])
def test_report_and_collect_name_the_damaged_file(damaged, tmp_path, capsys, word):
    code, said = command(tmp_path, capsys, word)
    assert code == 2 and re.fullmatch(f"error: {damaged[1]}\n", said.err)
    assert not (tmp_path / "results").exists()


def test_a_run_whose_metrics_are_cut_between_two_lines_is_not_archived(tiny, tmp_path):
    run = table_runs(tiny, tmp_path / "runs")[0]
    write_run(run, 50.0)
    metrics = run.folder / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(row for row in rows if '"eval"' not in row))
    with pytest.raises(DataError, match="metrics.jsonl: the last evaluation is missing"):
        collect(run, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("damage", NOISE)
def test_report_names_the_run_whose_files_are_noise(tiny, tmp_path, capsys, damage):
    """Also if only its archive is left."""
    runs = table_runs(tiny, tmp_path / "runs")
    for run in runs:
        write_run(run, 50.0)
    assert command(tmp_path, capsys, "collect")[0] == 0
    name, change = NOISE[damage]
    spoil(runs[0].folder / name, change)
    part = "" if name == "config.yaml" else f"{name}: "
    words = rf"is damaged \({part}.*\); remove it and run again\n"
    code, said = command(tmp_path, capsys, "report")
    assert code == 2 and re.fullmatch(f"error: {runs[0].folder} {words}", said.err)
    path, files = archive_path(runs[0], tmp_path / "results"), {}
    for file in runs[0].folder.iterdir():
        files[file.name] = file.read_bytes()
    with open(path, "wb") as stream:
        write_archive(stream, runs[0].name, files)
    shutil.rmtree(runs[0].folder)
    code, said = command(tmp_path, capsys, "report")
    assert code == 2 and re.fullmatch(f"error: {path} {words}", said.err)


def test_status_and_plan_report_damage_and_continue(damaged, tiny, tmp_path, capsys):
    runs, words = damaged
    text = status_text(runs, tmp_path / "results")
    assert re.search(f"damaged  {words}", text) and "1 done, 1 damaged, 2 missing" in text
    text = plan_text(tiny, runs, tmp_path / "results", 1)
    assert "4 runs; 1 done" in text and re.search(words, text)


def test_status_and_plan_go_on_after_a_configuration_of_noise(tiny, tmp_path):
    runs = table_runs(tiny, tmp_path / "runs")
    for run in runs:
        write_run(run, 50.0)
    spoil(runs[0].folder / "config.yaml", NOISE["a configuration of noise"][1])
    assert "3 done, 1 damaged" in status_text(runs, tmp_path / "results")
    assert "4 runs; 3 done" in plan_text(tiny, runs, tmp_path / "results", 1)


def test_run_skips_a_damaged_run_and_says_what_to_remove(damaged, stand_in, capsys):
    runs, words = damaged
    assert run_locally(runs, 2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [run_status(run).state for run in runs] == ["damaged", "done", "done", "done"]
    assert re.fullmatch(f"failed: bn-s0: {words}", lines[-1])


def test_a_damaged_run_is_not_submitted(damaged, capsys):
    runs, words = damaged
    assert not is_due(runs[0], run_status(runs[0]), True)
    assert re.fullmatch(f"bn-s0: {words}\n", capsys.readouterr().out)


def test_a_damaged_file_in_an_archive_is_reported(tiny, tmp_path):
    run = table_runs(tiny, tmp_path / "runs")[0]
    write_run(run, 50.0)
    assert collect(run, tmp_path / "results")
    path, files = (
        archive_path(run, tmp_path / "results"),
        kept_record(run, tmp_path / "results").files,
    )
    with open(path, "wb") as stream:
        write_archive(stream, run.name, {**files, "summary.json": b"{"})
    shutil.rmtree(run.folder)
    with pytest.raises(
        DataError, match=r"bn-s0.tar.xz is damaged \(summary.json: .*; remove it and run again"
    ):
        _ = read_record(run, tmp_path / "results").summary
    assert "1 damaged, 3 missing" in status_text(
        table_runs(tiny, tmp_path / "runs"), tmp_path / "results"
    )


@pytest.mark.parametrize(
    "name, change",
    [
        ("metrics.jsonl", lambda text: "1\n" + text),
        ("metrics.jsonl", lambda text: "no JSON\n" + text),
        ("config.yaml", lambda text: ""),
        ("config.yaml", None),
    ],
)
def test_a_damaged_unfinished_run_is_reported(tiny, tmp_path, name, change):
    runs = table_runs(tiny, tmp_path / "runs")
    write_run(runs[0], 50.0)
    (runs[0].folder / "summary.json").unlink()
    assert "1 stopped, 3 missing" in status_text(runs, Path("no results"))
    spoil(runs[0].folder / name, change)
    assert "1 damaged, 3 missing" in status_text(runs, Path("no results"))
    assert (
        "damaged" in (said := run_status(runs[0]).error) and "remove" in said and "\n" not in said
    )
