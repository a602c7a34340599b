"""Fixtures shared by all tests: one thread, and small training runs in this process."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from proxynorm.train.config import compose_config, settings_from
from tests.helpers import SMALL

torch.set_num_threads(1)

# `-m quick`: the folders of unit tests, without the files that start processes or read many images.
QUICK_FOLDERS = ("nn", "models", "conversion", "data", "analysis", "paper")
NOT_QUICK = ("test_fashion_mnist", "test_import", "test_opening", "test_power", "test_writer")
# Kept on one worker of pytest-xdist: they share a cluster or an expensive fixture, or measure time.
ON_ONE_WORKER = (
    "acceptance/slurm",
    "acceptance/test_claims.py",
    "acceptance/test_examples.py",
    "benchmarks",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "need(condition, reason): tests.helpers.need")
    # Under nohup SIGHUP is ignored, here and in every process that tests start; they test it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if "gpu" not in config.option.markexpr:
        # Results are the CPU's, on a machine with a GPU too. CUDA looks here when first used.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Assign markers by the place of a test's file; leave out tests/gpu unless `-m gpu` asks."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        if path.parts[0] == "gpu":
            item.add_marker("gpu")
        slow = item.get_closest_marker("slow") or path.stem in NOT_QUICK
        if path.parts[0] in QUICK_FOLDERS and not slow:
            item.add_marker("quick")
    if "gpu" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.hookimpl(optionalhook=True)  # pytest-xdist asks for it
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give out tests one by one, but those of a place in ON_ONE_WORKER to the same worker."""
    # --dist loadgroup has no effect under pytest 9.2: it sets an attribute that is gone.
    from xdist.scheduler import LoadScopeScheduling

    class ByPlace(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            places = (place for place in ON_ONE_WORKER if nodeid.startswith(f"tests/{place}"))
            return next(places, nodeid)

    return ByPlace(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose needs are not met, or fail it in continuous integration."""
    for mark in item.iter_markers("need"):
        condition, reason = mark.args
        if not condition:
            pytest.fail(reason, pytrace=False) if os.environ.get("CI") == "true" else pytest.skip(
                reason
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew-golden", action="store_true", help="write the golden losses anew, on purpose"
    )


@pytest.fixture
def run_small(tmp_path: Path):
    """Train a small network in this process.

    run_small(*overrides) returns its status, folder, settings, rows and last checkpoint.
    """
    from proxynorm.train import checkpoint
    from proxynorm.train.run import train
    from proxynorm.train.run_folder import read_metrics
    from proxynorm.train.settings import run_name

    def run(*overrides: str) -> SimpleNamespace:
        config = compose_config([*SMALL, f"runs_dir={tmp_path}", *overrides])
        settings = settings_from(config)
        status = train(settings, OmegaConf.to_container(config, resolve=True))
        folder = tmp_path / run_name(settings)
        last = folder / "checkpoints" / "last.pt"
        return SimpleNamespace(
            status=status,
            folder=folder,
            settings=settings,
            rows=read_metrics(folder / "metrics.jsonl"),
            last=checkpoint.load(last) if last.exists() else None,
        )

    return run
