"""The local launcher: missing runs are trained once, failures listed, stopped runs resumed."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest

from proxynorm.cli import parse_options
from proxynorm.commands.reproduce import Options, main
from proxynorm.errors import ConfigError
from proxynorm.launch.local import run_locally
from proxynorm.launch.status import run_status
from proxynorm.paper.findings import gather
from proxynorm.paper.plan import kept_status, plan_text, status_text
from proxynorm.paper.records import archive_path, collect
from proxynorm.paper.report import write_report
from proxynorm.paper.table import load_table, table_runs
from tests.tiny_table import TINY, reproduce, write_run


@pytest.fixture
def launch(tiny, tmp_path, stand_in, capsys):
    """Run the tiny table with the stand-in and return exit status, output lines and runs."""

    def go(jobs=2):
        runs = table_runs(tiny, tmp_path / "runs")
        code = run_locally(runs, jobs)
        return code, capsys.readouterr().out.splitlines(), runs

    return go


def starts(runs):
    return [
        len((run.folder / "started").read_text()) if (run.folder / "started").exists() else 0
        for run in runs
    ]


def test_all_runs_are_trained_once(launch):
    code, _, runs = launch()
    assert code == 0 and [run_status(run).state for run in runs] == ["done"] * 4
    code, lines, runs = launch()
    assert (
        code == 0
        and starts(runs) == [1] * 4
        and sorted(lines) == sorted(f"{run.name}: finished" for run in runs)
    )


def test_a_failure_is_listed_with_its_last_line_and_tried_again(launch, stand_in):
    stand_in(
        bn__s1={
            "status": 1,
            "says": "ValueError: no such thing\nerror: the run in x ended with the fault above",
        }
    )
    code, lines, runs = launch()
    assert code == 1 and lines[-1].startswith("failed: bn-s1: ValueError: no such thing")
    assert [run_status(run).state for run in runs] == ["done", "done", "failed", "done"]
    assert "ValueError: no such thing" in status_text(runs, runs[0].folder / "no results")
    stand_in()
    assert launch()[0] == 0 and starts(runs) == [1, 1, 2, 1]


def test_a_killed_run_is_reported_as_killed_not_by_its_last_row(launch, stand_in):
    stand_in(bn__s0={"signal": signal.SIGKILL, "says": "  1.00  12/20  2.1234"})
    code, lines, runs = launch()
    killed = [line for line in lines if "killed" in line]
    assert code == 1 and killed[0].startswith("bn-s0: killed (signal 9); run again (")
    assert lines[-1].startswith(
        "failed: bn-s0: killed (signal 9); run again  ("
    ) and "2.1234" not in "".join(lines)
    assert run_status(runs[0]).state == "missing"
    stand_in()
    assert launch()[0] == 0 and starts(runs) == [2, 1, 1, 1]


def test_a_run_that_another_process_trains_is_skipped(launch, stand_in):
    stand_in(
        bn__s0={"status": 2, "says": "error: runs/tiny/bn-s0 is in use by host pid 1; wait for it"}
    )
    code, lines, _ = launch()
    assert code == 0 and "bn-s0: running elsewhere" in lines


def test_two_launches_at_once_train_no_run_twice(launch, stand_in):
    stand_in(**{f"{norm}__s{seed}": {"seconds": 1} for norm in ("bn", "ln_pn") for seed in (0, 1)})
    code = subprocess_of_stand_in(launch)
    assert code == [0, 0] and starts(table := launch()[2]) == [1] * 4 and len(table) == 4


def subprocess_of_stand_in(launch):
    """Two processes launch the same table, the second once the first has a run."""
    first = os.fork()
    if first == 0:
        os._exit(launch(jobs=1)[0])
    time.sleep(0.5)
    second = launch(jobs=1)[0]
    return [os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]), second]


def test_a_signal_is_passed_on_and_nothing_more_is_started(launch, stand_in):
    stand_in(bn__s0={"seconds": 30}, ln_pn__s0={"seconds": 30})
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begun = time.monotonic()
    code, lines, runs = launch()
    assert (
        code == 75 and time.monotonic() - begun < 15 and lines[-1].startswith("stopped by SIGTERM")
    )
    assert starts(runs)[2:] == [0, 0] and [run_status(run).state for run in runs] == ["missing"] * 4


@pytest.mark.parametrize("word", ["jobs=0", "threads=-1", "launcher=pbs"])
def test_wrong_options_of_the_launchers_are_refused(word):
    with pytest.raises(ConfigError, match=f"{word}: "):
        parse_options(Options, ["command=run", word])


def test_the_status_shows_step_loss_and_eta(tiny, tmp_path):
    run = table_runs(tiny, tmp_path / "runs")[0]
    write_run(run, 50.0, epochs=3)
    (run.folder / "summary.json").unlink()
    now = run_status(run)
    assert (now.state, now.describe()) == ("stopped", "step 4/12  loss 1.9000")
    (run.folder / ".lock").write_text("node17 pid 4711")
    now = run_status(run)
    left = f"0:00:0{8 * 64 / 100:.0f}"
    assert (now.state, now.describe()) == ("running", f"step 4/12  loss 1.9000  ETA {left}")


def test_plan_estimates_the_remaining_time_from_measured_runs(tiny, tmp_path):
    runs = table_runs(tiny, tmp_path / "runs")
    results = tmp_path / "results"
    assert "4 runs to do, 24 s (estimate for one CPU core)" in plan_text(tiny, runs, results, 1)
    write_run(runs[0], 50.0)
    text = plan_text(tiny, runs, results, 2)
    assert (
        "4 runs; 1 done" in text
        and "3 runs to do, 75 s (estimate for one CPU core; measured)" in text
    )
    assert "; 37 s with jobs=2" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["bn", "1/2", "0.02", "0.02"],
        ["ln_pn", "0/2", "0.00", "0.00"],
    ]
    text = plan_text(tiny, runs, results, verbose=True)
    assert text.count("python train.py") == 4 and "name=ln_pn-s1" in text


def test_the_commands_of_a_plan_are_those_that_run_executes(tiny, tmp_path):
    runs = table_runs(tiny, tmp_path / "runs", overrides=["data.root=/a b"])
    commands = [
        line
        for line in plan_text(tiny, runs, tmp_path, verbose=True).splitlines()
        if "train.py" in line
    ]
    assert len(commands) == 4 and all(line.endswith(" 'data.root=/a b'") for line in commands)


@pytest.fixture
def one_kept(tiny, tmp_path):
    """The tiny table's runs, the first of them kept in results/ alone."""
    runs, results = table_runs(tiny, tmp_path / "runs"), tmp_path / "results"
    write_run(runs[0], 50.0)
    assert collect(runs[0], results)
    shutil.rmtree(runs[0].folder)
    return runs, results


def test_a_run_with_only_an_archive_counts_as_done(tiny, one_kept):
    runs, results = one_kept
    assert f"kept in {results}" in status_text(
        runs, results
    ) and "1 done, 3 missing" in status_text(runs, results)
    assert "4 runs; 1 done" in plan_text(tiny, runs, results, 1)
    runs[0].folder.mkdir()
    assert kept_status(runs[0], results) is None


def test_an_archived_run_is_trained_again_once_its_archive_is_gone(
    tiny, one_kept, tmp_path, stand_in, capsys
):
    runs, results = one_kept

    def run() -> str:
        words = (
            "run",
            f"table={tmp_path}/tiny.yaml",
            f"root={tmp_path}/runs",
            f"results={results}",
        )
        assert main(parse_options(Options, [f"command={words[0]}", *words[1:]])) == 0
        return capsys.readouterr().out

    assert f"bn-s0: finished, kept in {results}" in run() and starts(runs) == [0, 1, 1, 1]
    archive_path(runs[0], results).unlink()
    assert "bn-s0: starting" in run() and starts(runs) == [1, 1, 1, 1]


def test_an_archived_failure_is_reported_and_tried_again(tiny, one_kept, tmp_path, stand_in):
    runs, results = one_kept
    runs[1].log.parent.mkdir(exist_ok=True)
    runs[1].log.write_text("NonFiniteError: no\n# exit status 1\n")
    assert collect(runs[1], results)
    runs[1].log.unlink()
    assert kept_status(runs[1], results).state == "failed"
    assert f"NonFiniteError: no (kept in {results})" in status_text(runs, results)
    words = ["command=run", f"table={tiny.file}", f"root={tmp_path}/runs", f"results={results}"]
    assert main(parse_options(Options, words)) == 0 and starts(runs) == [0, 1, 1, 1]


@pytest.mark.slow
def test_a_real_table_from_run_to_report(tmp_path):
    """Interrupted, run again, reported: with the real train.py and paths that need quoting."""
    path, root = tmp_path / "it's tiny.yaml", tmp_path / "the runs"
    path.write_text(TINY.replace("seeds: 2", "seeds: 1"))
    first = subprocess.Popen(
        reproduce("run", f'table="{path}"', f"root={root}", "jobs=2"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline().endswith("-s0: starting\n")
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 75
    table = load_table(str(path))
    runs = table_runs(table, root)
    assert run_locally(runs, jobs=2) == 0
    write_report(gather(table, runs, tmp_path), tmp_path / "report")
    summary = json.loads((root / "it's tiny" / "bn-s0" / "summary.json").read_text())
    assert f"| bn | {summary['top1']:.2f} | 1 |" in (tmp_path / "report" / "report.md").read_text()
