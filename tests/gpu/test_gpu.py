"""On a GPU (`pytest -m gpu`): what scripts/gpu_check.py checks, a test each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch

from benchmarks.gpu_speed import Machine, Skipped
from tests.gpu import layers, training
from tests.gpu.training import Runs


@pytest.fixture
def machine() -> Machine:
    return Machine(torch.device("cuda"), deadline=float("inf"))


@pytest.mark.parametrize(("mode", "dtype"), product(("eager", "compiled"), layers.DTYPES))
@pytest.mark.parametrize("norm", layers.NORMS)
def test_a_layer_is_the_formula(machine, mode, dtype, norm):
    for layout, activation in product(layers.FORMATS, layers.ACTIVATIONS):
        layers.norm_case(machine, mode, dtype, layout, norm, activation)
    assert machine.failures == []


def test_a_bare_step_waits_for_nothing(machine):
    list(layers.syncs(machine))
    assert machine.failures == []


@pytest.mark.parametrize("check", training.CHECKS)
def test_of_a_run(machine, tmp_path, check: Callable[[Runs], tuple[str, bool]]):
    what, holds = check(Runs(machine, tmp_path))
    assert holds, what


def test_two_gpus(machine):
    checks: Iterator[dict] = training.processes(machine)
    try:
        list(checks)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert machine.failures == []
