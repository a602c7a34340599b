"""What runs would take: counted from the configuration, timed by what was measured; and what cannot end is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from proxynorm.errors import ConfigError
from proxynorm.launch import estimate as module
from proxynorm.launch.estimate import (
    Estimate,
    Estimator,
    checkpoint_bytes,
    describe,
    duration,
    planned_settings,
    probe_runs,
    refuse_impossible,
    total_steps,
)
from proxynorm.launch.runs import table_runs
from proxynorm.launch.slurm import SlurmOptions
from proxynorm.launch.sweep import as_entry
from proxynorm.paper.records import collect
from proxynorm.paper.table import load_table
from proxynorm.train import checkpoint
from tests.tiny_table import write_run

STATED = "estimate for one CPU core; scaled by epochs, network and image size"


@pytest.fixture
def runs(tiny, tmp_path):
    return table_runs(tiny, tmp_path / "runs")


def test_steps_and_bytes_are_those_of_a_run(run_small):
    run = run_small("regularization.ema_decay=0.9")
    assert total_steps(run.settings) == run.rows[-1]["step"] == 20
    sizes = [path.stat().st_size for path in (run.folder / "checkpoints").iterdir()]
    estimated = checkpoint_bytes(run.settings)
    last = (run.folder / "checkpoints/last.pt").stat().st_size
    assert sum(sizes) < estimated + 4 * 65536 and estimated > 2 * last - 4 * 65536
    assert checkpoint.load(run.folder / "checkpoints/last.pt")["ema"] is not None


def test_data_that_is_not_here_leaves_the_steps_open():
    settings = planned_settings(["experiment=imagenet_resnet50"])
    assert total_steps(settings) is None and settings.data.root is None


def estimator(table, runs, results="no kept runs", **options):
    """Of the table's runs, by name."""
    estimate = Estimator(runs[0].folder.parent, Path(results), table, **options)
    return lambda run: estimate(as_entry(run))


def test_times_come_from_runs_of_the_kind_then_from_the_others_then_from_the_table(tiny, runs):
    assert estimator(tiny, runs)(runs[0]).origin == STATED
    write_run(runs[0], 50.0)
    own, other = estimator(tiny, runs)(runs[0]), estimator(tiny, runs)(runs[1])
    assert (own.origin, other.origin) == ("measured", "mean of 1 measured kinds of runs")
    assert (own.steps, own.images) == (4, 256)
    assert own.seconds == other.seconds == pytest.approx(256 / 100 + module.START_SECONDS)


def test_a_probe_is_a_short_run_of_each_cell_and_counts_as_measured(tiny, runs):
    probes = probe_runs(runs)
    assert [probe.folder.name for probe in probes] == ["bn", "ln_pn"]
    assert (
        total_steps(planned_settings(probes[0].arguments())) == 4
        and "max_steps=20" in probes[0].arguments()
    )
    write_run(probes[1], 50.0)
    assert estimator(tiny, runs)(runs[1]).origin == "measured"


def hours(name, *cells):
    """Of a run of each of these cells, as the table states them."""
    table = load_table(name)
    runs = table_runs(replace(table, seeds=1), "no runs")
    estimate = estimator(table, runs)
    return {run.cell.name: estimate(run).seconds / 3600 for run in runs if run.cell.name in cells}


def test_stated_times_follow_the_recipe_s_epochs():
    """860 minutes are of 100 epochs of a ResNet-50; its recipe has 65, EfficientNet-B0's 350."""
    found = hours("imagenet_norms", "resnet50-bn-baseline", "efficientnet_b0-bn-baseline")
    assert found["resnet50-bn-baseline"] == pytest.approx(860 / 60 * 65 / 100)
    share = found["efficientnet_b0-bn-baseline"] / found["resnet50-bn-baseline"]
    assert share == pytest.approx(
        350 / 65 * 6.75 / 11.11, rel=0.01
    )  # millions of activations, as in arXiv 2003.13678
    assert hours("imagenet_batch", "bn-norm_batch2") == {
        "bn-norm_batch2": pytest.approx(860 / 60 * 65 / 100)
    }


def test_stated_times_follow_the_network_and_the_image_size():
    found = hours("efficientnet_g16", "b0-native-gn", "b0-half-gn", "b5-native-gn")
    assert found["b0-native-gn"] == pytest.approx(7500 / 60)
    assert found["b0-half-gn"] == pytest.approx(found["b0-native-gn"] * (160 / 224) ** 2, rel=0.01)
    assert 10 < found["b5-native-gn"] / found["b0-native-gn"] < 20


@pytest.fixture
def kept(runs, tmp_path):
    """results/ with the first run kept as an archive; its folder is gone."""
    write_run(runs[0], 50.0)
    assert collect(runs[0], tmp_path / "results")
    shutil.rmtree(runs[0].folder)
    return tmp_path / "results"


def test_kept_runs_of_the_kind_tell_the_speed(tiny, runs, kept, monkeypatch):
    """Of the same table on whatever processor, of another table only on this one's; never for another number of processes."""
    other = replace(tiny, name="other")
    assert estimator(tiny, runs, kept)(runs[0]).origin == "kept runs on CPU"
    assert estimator(tiny, runs, kept)(runs[0]).seconds == pytest.approx(
        256 / 100 + module.START_SECONDS
    )
    assert estimator(tiny, runs, kept)(runs[1]).origin == STATED
    assert estimator(other, runs, kept)(runs[0]).origin == STATED
    monkeypatch.setattr(module, "processor_here", lambda: "CPU")
    assert estimator(other, runs, kept)(runs[0]).origin == "kept runs on CPU"
    assert estimator(other, runs, kept, processes=8)(runs[0]).origin == STATED


def test_a_damaged_archive_does_not_hinder_an_estimate(tiny, runs, kept):
    next(kept.glob("*/runs/*")).write_bytes(b"no archive")
    assert estimator(tiny, runs, kept)(runs[0]).origin == STATED


def test_the_cell_that_cannot_be_built_is_named(tiny, runs):
    wrong = replace(
        runs[1], cell=replace(runs[1].cell, overrides=(*runs[1].cell.overrides, "micro_batch=7"))
    )
    with pytest.raises(ConfigError, match="^cell ln_pn: .*micro_batch"):
        estimator(tiny, runs)(wrong)


def fixed(seconds: float, disk: int = 10**6):
    return lambda entry: Estimate(100, 1000, seconds, "measured", disk)


def test_what_cannot_end_within_its_limits_is_refused(runs):
    entries = [as_entry(run) for run in runs]
    refuse_impossible(entries, fixed(3600), SlurmOptions())
    refuse_impossible(entries, fixed(3600), SlurmOptions(time="1:10:00"))
    refuse_impossible(entries, fixed(36000), SlurmOptions(time="UNLIMITED"))
    refuse_impossible(entries, fixed(None), SlurmOptions(time="30"))
    with pytest.raises(
        ConfigError,
        match=r"takes about 60 min \(measured\) and cannot end within its time limit of 30 min.*requeues=2 .*or force=true",
    ):
        refuse_impossible(entries, fixed(3600), SlurmOptions(time="30"))
    with pytest.raises(ConfigError, match="cannot end within its time limit of 30 min"):
        refuse_impossible(entries, fixed(3600), SlurmOptions(sbatch=("--time=30",)))
    refuse_impossible(entries, fixed(3600), SlurmOptions(time="30", requeues=2))
    with pytest.raises(ConfigError, match="cannot end within 10 time limits of 3 min"):
        refuse_impossible(entries, fixed(3600), SlurmOptions(time="3", requeues=9))
    with pytest.raises(ConfigError, match="the checkpoints of 4 runs take 4000000000.0 GB"):
        refuse_impossible(entries, fixed(3600, disk=10**18), SlurmOptions())


def test_times_are_told_in_the_unit_that_suits_them(runs):
    assert [duration(seconds) for seconds in (40, 1500, 27000)] == ["40 s", "25 min", "7.5 h"]
    entries = [as_entry(run) for run in runs]
    assert "4,000 images, 44 s (measured)" in describe(entries, fixed(11))
    assert "time unknown (measured)" in describe(entries, fixed(None))
    mixed = iter([Estimate(1, 1, None, "unknown", 0), *[Estimate(1, 1, 60.0, "measured", 0)] * 3])
    assert "3 min and 1 runs of unknown time (measured; unknown)" in describe(
        entries, lambda entry: next(mixed)
    )
