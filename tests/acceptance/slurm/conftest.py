"""A SLURM for the session, and slurm/train.sbatch submitted to it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.acceptance.slurm.cluster import Cluster, lacking
from tests.helpers import ROOT, need

needs_slurm = need(
    not lacking(),
    f"SLURM is not installed ({', '.join(lacking())} not found): apt-get install slurm-wlm munge",
)


@pytest.fixture(scope="session")
def slurm():
    """A running SLURM."""
    folder = Path(
        tempfile.mkdtemp(prefix="slurm-")
    )  # a short path: that of a socket may have 107 characters
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
    """submit(*options, overrides=…) submits slurm/train.sbatch; returns the job's id."""

    def go(*options: str, overrides=(), environment=None) -> str:
        log = tmp_path / "job-%j.log"
        command = [
            "sbatch",
            "--parsable",
            f"--output={log}",
            *options,
            str(ROOT / "slurm/train.sbatch"),
            *overrides,
        ]
        return slurm.check(*command, cwd=ROOT, extra=environment or {}).strip()

    return go
