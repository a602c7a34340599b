"""A SLURM for the session, and small runs whose metrics tell when a signal can fall into their middle."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from tests.slurm.cluster import Cluster, lacking

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def slurm():
    """A running SLURM; where it is not installed the tests are skipped, but fail in continuous integration."""
    missing = lacking()
    if missing:
        text = f"SLURM is not installed ({', '.join(missing)} not found): apt-get install slurm-wlm munge"
        pytest.fail(text) if os.environ.get("CI") == "true" else pytest.skip(text)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: that of a socket may have 107 characters
    cluster = Cluster(folder / "cluster")
    cluster.environment |= {"PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"}
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit(slurm, tmp_path):
    """submit(*options, overrides=…) puts slurm/train.sbatch into the queue, its log in tmp_path; returns the job's id."""

    def go(*options: str, overrides=(), environment=None) -> str:
        log = tmp_path / "job-%j.log"
        command = ["sbatch", "--parsable", f"--output={log}", *options, str(ROOT / "slurm/train.sbatch"), *overrides]
        return slurm.check(*command, cwd=ROOT, extra=environment or {}).strip()

    return go
