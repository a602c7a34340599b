"""What is freed after a step is there for the next one: no page is asked of the system again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from proxynorm.train.memory import keep_freed_memory
from tests.helpers import need

STEPS = """
import resource, sys, torch
from proxynorm.train.memory import keep_freed_memory

def step():
    maps = [torch.ones(5_000_000) for _ in range(4)]

told = len(sys.argv) > 1 and keep_freed_memory(torch.device("cpu"))
for _ in range(10):  # until all of them have found their places
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def told_and_faults(*words: str, **variables: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", STEPS, *words], env={"PYTHONPATH": ":".join(sys.path), **variables},
                          capture_output=True, text=True, check=True)
    told, faults = done.stdout.split()
    return told, int(faults)


@need(platform.libc_ver()[0] == "glibc", "the C library is not glibc")
def test_pages_are_kept_from_step_to_step():
    told, faults = told_and_faults("keep")
    assert told == "True" and faults < 100
    assert told_and_faults()[1] > 5 * 1000  # what malloc does by itself


@pytest.mark.parametrize("name, value", [("MALLOC_TRIM_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")])
def test_settings_of_the_environment_are_left(name, value):
    assert told_and_faults("keep", **{name: value})[0] == "False"


def test_a_gpus_memory_is_not_mallocs():
    assert not keep_freed_memory(torch.device("cuda"))
