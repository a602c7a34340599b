"""What runs would take: counted from the configuration, timed by what was measured; and what cannot end is refused."""

from __future__ import annotations

import pytest

from proxynorm.errors import ConfigError
from proxynorm.reproduce import estimate as module
from proxynorm.reproduce.estimate import (
    Estimate,
    Estimator,
    checkpoint_bytes,
    planned_settings,
    probe_runs,
    refuse_impossible,
    total_steps,
)
from proxynorm.reproduce.runs import table_runs
from proxynorm.reproduce.slurm import SlurmOptions
from proxynorm.train import checkpoint
from tests.reproduce.tiny_table import write_run


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


def test_hours_come_from_the_cell_itself_then_from_the_others_then_from_the_table(tiny, runs):
    assert Estimator(tiny, runs)(runs[0]).origin == "estimate for one CPU core"
    write_run(runs[0], 50.0)
    own, other = Estimator(tiny, runs)(runs[0]), Estimator(tiny, runs)(runs[1])
    assert (own.origin, other.origin) == ("measured", "mean of 1 measured cells")
    assert (own.steps, own.images) == (4, 256)
    assert own.hours == other.hours == pytest.approx((256 / 100 + module.START_SECONDS) / 3600)


def test_a_probe_is_a_short_run_of_each_cell_and_counts_as_measured(tiny, runs):
    probes = probe_runs(runs)
    assert [probe.folder.name for probe in probes] == ["bn", "ln_pn"]
    assert total_steps(planned_settings(probes[0].arguments())) == 4 and "max_steps=20" in probes[0].arguments()
    write_run(probes[1], 50.0)
    assert Estimator(tiny, runs)(runs[1]).origin == "measured"


def fixed(hours: float, disk: int = 10**6):
    return lambda run: Estimate(100, 1000, hours, "measured", disk)


def test_what_cannot_end_within_its_limits_is_refused(runs):
    refuse_impossible(runs, fixed(1.0), SlurmOptions())
    refuse_impossible(runs, fixed(1.0), SlurmOptions(time="1:10:00"))
    with pytest.raises(
        ConfigError,
        match=r"takes about 1.00 h \(measured\) and cannot end within its time limit of 30.*requeues=2 .*or force=true",
    ):
        refuse_impossible(runs, fixed(1.0), SlurmOptions(time="30"))
    refuse_impossible(runs, fixed(1.0), SlurmOptions(time="30", requeues=2))
    with pytest.raises(ConfigError, match="cannot end within 10 time limits of 2"):
        refuse_impossible(runs, fixed(1.0), SlurmOptions(time="2", requeues=9))
    with pytest.raises(ConfigError, match="the checkpoints of 4 runs take 4000000000.0 GB"):
        refuse_impossible(runs, fixed(1.0, disk=10**18), SlurmOptions())
