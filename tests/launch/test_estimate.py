"""How long runs take: measured, or as the table states."""

from __future__ import annotations

import pytest

from proxynorm.launch import estimate as module
from proxynorm.launch.estimate import describe, duration, estimator
from proxynorm.launch.runs import Estimate, Run
from proxynorm.paper.table import load_table, table_runs
from tests.tiny_table import write_run

MEASURED = 256 / 100 + module.START_SECONDS  # seconds of write_run's runs


@pytest.fixture
def runs(tiny, tmp_path):
    return table_runs(tiny, tmp_path / "runs")


def test_times_come_from_runs_of_the_kind_else_from_the_table(tiny, runs):
    stated = Estimate(6, "estimate for one CPU core")
    assert estimator(runs)(runs[0]) == stated
    write_run(runs[0], 50.0)
    assert estimator(runs)(runs[2]) == Estimate(pytest.approx(MEASURED), "measured")
    assert estimator(runs)(runs[1]) == stated
    unknown = Estimate(None, "nothing like it was measured")
    assert estimator(runs)(Run(runs[1].folder, runs[1].arguments)) == unknown


def test_runs_with_another_number_of_processes_are_ignored(runs):
    write_run(runs[0], 50.0)
    assert estimator(runs)(runs[0]).origin == "measured"
    assert estimator(runs, 8)(runs[0]) == runs[0].stated


def test_stated_times_follow_the_network_and_the_image_size():
    """By epochs and activations; millions of activations as in arXiv 2003.13678."""

    def hours(name):
        table = load_table(name)
        return {cell.name: table.estimate(cell).seconds / 3600 for cell in table.expand()}

    norms, sizes = hours("imagenet_norms"), hours("efficientnet_g16")
    share = norms["efficientnet_b0-bn-baseline"] / norms["resnet50-bn-baseline"]
    assert share == pytest.approx(350 / 65 * 6.75 / 11.11, rel=0.01)
    assert sizes["b0-native-gn"] == pytest.approx(7500 / 60)
    assert sizes["b0-half-gn"] == pytest.approx(sizes["b0-native-gn"] / 2)
    assert 10 < sizes["b5-native-gn"] / sizes["b0-native-gn"] < 20


def fixed(seconds):
    return lambda run: Estimate(seconds, "measured")


def test_times_are_shown_in_a_suitable_unit(runs):
    assert [duration(seconds) for seconds in (40, 1500, 27000)] == ["40 s", "25 min", "7.5 h"]
    assert describe(runs, fixed(11)) == "4 runs to do, 44 s (measured)"
    assert "time unknown (measured)" in describe(runs, fixed(None))
    mixed = iter([Estimate(None, "unknown"), *[Estimate(60.0, "measured")] * 3])
    assert "at least 3 min (measured; unknown)" in describe(runs, lambda run: next(mixed))
