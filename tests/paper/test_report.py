"""From finished runs to the report: statistics, verdicts, bytes."""

import filecmp
import json
import shlex
import shutil
from dataclasses import replace

import pytest
from mpmath import betainc
from scipy import stats

from proxynorm.cli import parse_options
from proxynorm.commands.reproduce import Options, main
from proxynorm.errors import ConfigError, DataError
from proxynorm.paper.compare import Sample, Spread, cell_status, outcome, seed_spread, t_test
from proxynorm.paper.compare import compare as compare_table
from proxynorm.paper.findings import Findings, against_batch, gather, loss_ratio
from proxynorm.paper.records import Record, archive_path, collect, kept_record, read_record
from proxynorm.paper.report import wide_table, write_report
from proxynorm.paper.search import choose, protocol
from proxynorm.paper.table import Cell, Comparison, Search, cell_name, load_table, table_runs
from tests.helpers import ROOT
from tests.tiny_table import SEARCH, write_run


def sample(*values):
    return Sample(tuple(values))


def compare(expect, first, second, spread=None):
    return outcome(Comparison("a", "b", expect, "claim"), first, second, spread)


def test_mean_and_standard_deviation_over_seeds():
    assert (
        str(sample(90.0, 91.0, 92.0)) == "91.00 ± 1.00"
        and str(sample(90.0)) == "90.00"
        and str(sample()) == ""
    )


def test_welch_by_its_textbook_formula():
    a, b = sample(1.0, 2.0, 3.0, 4.0), sample(2.0, 6.0, 10.0)
    found = compare("lower", a, b)
    t = (a.mean - b.mean) / (a.std**2 / 4 + b.std**2 / 3) ** 0.5
    assert found.difference == pytest.approx(-3.5) and t == pytest.approx(-1.459, abs=1e-3)
    freedom = (a.std**2 / 4 + b.std**2 / 3) ** 2 / (
        (a.std**2 / 4) ** 2 / 3 + (b.std**2 / 3) ** 2 / 2
    )
    assert found.p == pytest.approx(
        float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + t**2), regularized=True))
    )
    assert found.interval[0] + found.interval[1] == pytest.approx(2 * found.difference)


@pytest.mark.parametrize(
    "expect, first, second, verdict",
    [
        ("higher", (92.0, 92.1, 91.9), (90.0, 90.1, 89.9), "shown"),
        ("higher", (90.0, 90.1, 89.9), (92.0, 92.1, 91.9), "contradicted"),
        ("higher", (90.0, 92.0, 91.0), (90.1, 91.8, 91.0), "not shown"),
        ("lower", (90.0, 90.1, 89.9), (92.0, 92.1, 91.9), "shown"),
        ("equal", (91.9, 92.0, 91.95), (92.0, 92.1, 92.05), "shown"),
        ("equal", (93.0, 93.1, 92.9), (92.0, 92.1, 91.9), "shown"),
        ("equal", (90.0, 90.1, 89.9), (92.0, 92.1, 91.9), "contradicted"),
        ("equal", (90.0, 93.0, 91.5), (92.0, 92.1, 91.9), "not shown"),
    ],
)
def test_verdicts(expect, first, second, verdict):
    assert compare(expect, sample(*first), sample(*second)).verdict == verdict


def test_a_single_seed_is_measured_against_the_known_spread():
    assert (
        compare("higher", sample(91.0), sample(90.9), spread=Spread(0.2, 4)).verdict
        == "single seed, below the seed spread"
    )
    far = sample(92.0), sample(90.0)
    beyond = compare("higher", *far, spread=Spread(0.2, 4))
    assert beyond.verdict == "single seed, beyond the seed spread"
    assert compare("higher", *far).verdict == "single seed, spread unknown"


def test_two_seeds_are_tested_with_the_spread_of_the_table():
    """Student's t-test of two samples is that of a table with two cells."""
    a, b = sample(1.0, 3.0), sample(6.0, 10.0)
    spread = seed_spread(None, {"a": a, "b": b})
    assert spread == pytest.approx((5**0.5, 2))
    student = stats.ttest_ind(a.values, b.values)
    interval, p = t_test(a, b, spread)
    assert p == pytest.approx(student.pvalue) and interval == pytest.approx(
        student.confidence_interval()
    )
    more = sample(1.0, 2.0, 3.0)  # with three, by Welch's
    assert t_test(more, more, spread) == t_test(more, more)


def test_a_verdict_before_the_declared_seeds_holds_so_far():
    table = replace(load_table("mini_norms"), seeds=3)
    for count, words in ((2, "shown so far"), (3, "shown")):
        high, low = sample(*[92.0, 92.1, 91.9][:count]), sample(*[90.0, 90.1, 89.9][:count])
        samples = {cell.name: high if "pn" in cell.name else low for cell in table.expand()}
        found = {item.comparison.claim: str(item) for item in compare_table(table, samples)}
        assert found["PN improves LN"] == words


def test_the_figure_against_batch_size_has_the_batch_of_every_cell():
    def cell(own, **labels):
        return Cell(cell_name(labels), labels, ("norm=…", f"batch={own}"))

    cells = [cell(32, norm="bn", norm_batch=2), cell(32, norm="bn", norm_batch=32)]
    cells += [cell(32, norm="ln"), cell(2, norm="bn", batch=2), cell(2, norm="ln", batch=2)]
    samples = {each.name: sample(90.0 + i) for i, each in enumerate(cells)}
    shared, batch = against_batch(Findings(None, cells, [], samples, [], {}, {}, "")).values()
    assert shared == {"bn": {2: (90.0,), 32: (91.0,)}, "ln": {None: (92.0,)}}
    assert batch == {"bn": {32: (91.0,), 2: (93.0,)}, "ln": {32: (92.0,), 2: (94.0,)}}


def test_equal_values_without_spread_have_p_1():
    assert compare("equal", sample(90.0, 90.0), sample(90.0, 90.0)).p == 1.0


def test_cell_status_words(tiny):
    cases = [(sample(), 0), (sample(90.0), 0), (sample(90.0), 1), (sample(), 2), (sample(1, 2), 0)]
    words = ["not run", "1/2 seeds", "1/2 seeds, 1 failed", "2 failed", "done"]
    assert [cell_status(tiny, *case) for case in cases] == words


@pytest.fixture
def finished(tiny, tmp_path):
    """The tiny table's runs: three finished, one failed."""
    runs = table_runs(tiny, tmp_path / "runs")
    power = {f"p{term}/{layer}": 0.25 for term in (1, 2, 3, 4) for layer in ("a", "b")}
    for run, top1 in zip(runs, (90.0, 91.0, 90.2), strict=False):
        write_run(run, top1, power=power)
    fail(runs[3], "NonFiniteError: step 3: loss nan")
    return runs


def fail(run, line):
    """The log of a failed run."""
    run.log.parent.mkdir(exist_ok=True)
    run.log.write_text(f"{line}\n# exit status 1\n")


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_the_report_is_the_same_bytes_from_folders_and_from_archives(tiny, finished, tmp_path):
    results = tmp_path / "results"
    first, second = results / "first", results / "second"
    write_report(gather(tiny, finished, results), first)
    assert [collect(run, results) for run in finished] == [True] * 4
    assert [collect(run, results) for run in finished] == [False] * 4
    shutil.rmtree(tmp_path / "runs")
    write_report(gather(tiny, finished, results), second)
    figures = ("cells", "curves", "power", "power_epochs")
    drawn = [f"{name}.{suffix}" for name in figures for suffix in ("pdf", "png")]
    assert files(first) == sorted([*drawn, "cells.csv", "report.md", "table.tex"])
    match, mismatch, errors = filecmp.cmpfiles(first, second, files(first), shallow=False)
    assert sorted(match) == files(second) and not mismatch + errors


def test_equal_runs_give_equal_archives(tiny, finished, tmp_path):
    for results in ("one", "two"):
        collect(finished[0], tmp_path / results)
    one, two = (
        archive_path(finished[0], tmp_path / results).read_bytes() for results in ("one", "two")
    )
    assert one == two


def test_an_archived_configuration_has_no_local_path(tiny, finished, tmp_path):
    path = finished[0].folder / "config.yaml"
    path.write_text(f"seed: 0\nruns_dir: {tmp_path}/runs/tiny\nepochs: 1\n")
    collect(finished[0], tmp_path / "results")
    kept = kept_record(finished[0], tmp_path / "results").files["config.yaml"]
    assert kept == b"seed: 0\nruns_dir: runs/tiny\nepochs: 1\n" and not collect(
        finished[0], tmp_path / "results"
    )


def test_the_report_says_what_was_measured(tiny, finished, tmp_path):
    write_report(gather(tiny, finished, tmp_path), tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        "| bn | 90.10 ± 0.14 | 2 |  | done |" in text
        and "| ln_pn | 91.00 | 1 |  | 1/2 seeds, 1 failed |" in text
    )
    assert "single seed, beyond the seed spread" in text
    assert "3 runs, 0.03 hours" in text and "commit 0123456789ab" in text
    assert str(tmp_path) not in text.replace(tiny.file, "tiny.yaml")
    for name in ("cells.png", "curves.png", "power.png"):
        assert f"]({name})" in text and (tmp_path / "report" / name).is_file()


def test_the_wide_table_has_a_place_for_each_cell(tiny, tmp_path):
    """Also where the cells differ in an axis that the table names nowhere."""
    tiny = replace(tiny, cells=[{"norm": ["bn"], "batch": [32, 64]}], rows=["norm"], comparisons=[])
    runs = table_runs(tiny, tmp_path / "runs")
    for run, top1 in zip(runs, (90.0, 91.0)):
        write_run(run, top1)
    rows = wide_table(gather(tiny, runs, tmp_path))
    assert rows == [["", "top1 %"], ["bn, batch 32", "90.00"], ["bn, batch 64", "91.00"]]


@pytest.mark.parametrize("name", ["tiny.yaml", "it's a tiny.yaml"])
def test_the_commands_of_a_file_s_table_name_the_file(tiny, tmp_path, monkeypatch, name):
    """As it was given; in a shell the words are those that the script reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").rename(tmp_path / name)
    table = load_table(name)
    write_report(gather(table, table_runs(table, tmp_path), tmp_path), tmp_path / "report")
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    words = [
        shlex.split(line)[2:] for line in lines if line.startswith("python scripts/reproduce.py ")
    ]
    assert [word for word, _ in words] == ["run", "report"]
    assert {
        parse_options(Options, [argument, "command=report"]).table for _, argument in words
    } == {name}
    assert load_table("mini_norms").argument == "table=mini_norms"


def test_a_selection_keeps_the_full_report_and_prints_its_own_commands(tiny, finished, tmp_path):
    words = [
        "command=report",
        f"table={tmp_path}/tiny.yaml",
        f"root={tmp_path}/runs",
        f"results={tmp_path}/results",
    ]
    main(parse_options(Options, [*words, "wandb=disabled"]))
    text = (tmp_path / "results" / "tiny" / "report.md").read_bytes()
    main(
        parse_options(
            Options, [*words, "wandb=disabled", "cells=[bn]", "seeds=1", "train=[device=cpu]"]
        )
    )
    assert (tmp_path / "results" / "tiny" / "report.md").read_bytes() == text
    part = (tmp_path / "results" / "tiny" / "selection" / "report.md").read_text()
    (line,) = (
        line for line in part.splitlines() if line.startswith("python scripts/reproduce.py report ")
    )
    options = parse_options(Options, ["command=report", *shlex.split(line)[3:]])
    assert (options.cells, options.seeds, options.train) == (
        ["bn"],
        1,
        ["device=cpu"],
    ) and "ln_pn:" not in part


def test_a_table_without_runs_has_a_report(tiny, tmp_path):
    write_report(gather(tiny, table_runs(tiny, tmp_path), tmp_path), tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Nothing has been run yet." in text and "not run" in text


def test_a_damaged_archive_is_named(tiny, finished, tmp_path):
    run = finished[0]
    collect(run, tmp_path)
    shutil.rmtree(run.folder)
    path = archive_path(run, tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="bn-s0.tar.xz is damaged"):
        read_record(run, tmp_path)


def search_table(folder):
    (folder / "search.yaml").write_text(SEARCH)
    return load_table(str(folder / "search.yaml"))


def test_a_search_chooses_the_best_and_warns_at_its_edge(tmp_path):
    table = search_table(tmp_path)
    assert table.search == Search(["optim.base_lr"], "norm")
    runs = [run for run in table_runs(table, tmp_path) if run.cell.name != "ln-base_lr1.6"]
    with pytest.raises(ConfigError, match="12 runs are not done"):
        choose(table, runs, tmp_path / "results")
    for run, top1 in zip(runs, (80, 83, 85, 84, 83, 82, 69, 70, 71, 72, 73, 74), strict=True):
        if run.cell.name != "ln-base_lr0.2":
            write_run(run, float(top1))
    diverged = next(run for run in runs if run.cell.name == "ln-base_lr0.2")
    fail(
        diverged,
        "error: step 3: loss nan, gradient norm nan, learning rate 0.1: not finite, first in fc",
    )
    found = choose(table, runs, tmp_path / "results")
    assert found["chosen"] == {"bn": {"optim.base_lr": 0.1}, "ln": {"optim.base_lr": 0.8}}
    assert (
        found["at_edge"] == {"ln": ["optim.base_lr"]} and found["tried"]["ln"]["0.2"] == "diverged"
    )
    for run in runs:
        assert collect(run, tmp_path / "results")
    kept = table_runs(table, tmp_path / "elsewhere")
    assert (
        choose(
            table,
            [run for run in kept if run.name in {run.name for run in runs}],
            tmp_path / "results",
        )
        == found
    )


def test_a_search_keeps_whole_numbers_and_texts(tmp_path):
    """1e-3 is text to YAML, and a number to whoever writes it."""
    head, tail = SEARCH.split("cells:")[0], SEARCH[SEARCH.index("seeds:") :]
    axes = {
        "norm.groups": [2, 4],
        "optim.weight_decay": ["1e-3", 0.01],
        "optim": ["rmsprop", "sgd"],
    }
    cells = "".join(f"    {axis}: [{', '.join(map(str, tried))}]\n" for axis, tried in axes.items())
    tail = tail.replace("[optim.base_lr]", f"[{', '.join(axes)}]")
    path = tmp_path / "search.yaml"
    path.write_text(f"{head}cells:\n  - norm: [gn]\n{cells}rows: [norm]\n{tail}")
    table = load_table(str(path))
    runs = table_runs(table, tmp_path)
    for top1, run in enumerate(runs):
        write_run(run, float(top1))
    found = choose(table, runs, tmp_path / "results")
    assert str(found["chosen"]["gn"]) == (
        "{'norm.groups': 4, 'optim.weight_decay': 0.01, 'optim': 'sgd'}"
    )
    assert found["at_edge"]["gn"] == ["norm.groups", "optim.weight_decay"]
    assert "2 0.001 rmsprop" in found["tried"]["gn"]


def test_a_report_of_fewer_runs_does_not_replace_a_fuller_one(tiny, finished, tmp_path):
    full = gather(tiny, finished, tmp_path)
    fewer = gather(tiny, finished[:1], tmp_path)
    write_report(full, tmp_path / "report")
    with pytest.raises(ConfigError, match="has 3 runs, this one 1; force=true replaces it"):
        write_report(fewer, tmp_path / "report")
    write_report(full, tmp_path / "report")
    write_report(fewer, tmp_path / "report", force=True)
    assert "1 runs, 0.01 hours" in (tmp_path / "report" / "report.md").read_text()


def test_the_loss_ratio_is_that_of_the_last_two_tenths(tmp_path):
    losses = [3.0] * 16 + [2.0, 2.0, 1.0, 1.5]
    rows = [{"event": "train", "step": step, "loss": v} for step, v in enumerate(losses, 1)]

    def ratio(rows):
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        files = {"summary.json": b'{"steps": 20}', "metrics.jsonl": lines}
        return loss_ratio(Record(None, tmp_path, files))

    assert ratio(rows) == pytest.approx(1.25 / 2)
    assert ratio(rows[:4]) is None


def test_the_protocol_states_whether_every_norm_got_the_same_search(tmp_path):
    equal = protocol(load_table("mini_search"), ROOT / "results")
    unequal = protocol(search_table(tmp_path), ROOT / "results")
    assert equal == (
        "Search mini_search: every norm got the same 8 points of "
        "optim.base_lr × optim.weight_decay, 2 seeds: 16 runs."
    )
    assert unequal.endswith("another grid for ln (7 runs).")
