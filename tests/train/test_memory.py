"""Memory freed after a step is kept for the next one: no page is requested a second time."""

from __future__ import annotations

import platform
import subprocess
import sys

import torch

from proxynorm.train.memory import keep_freed_memory
from tests.helpers import need

STEPS = """
import resource, torch
from proxynorm.train.memory import keep_freed_memory

def step():
    maps = [torch.ones(1_000_000) for _ in range(40)]

told = keep_freed_memory(torch.device("cpu"))
for _ in range(10):  # until all of them have found their places
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def told_and_faults(**variables: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env={"PYTHONPATH": ":".join(sys.path), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    told, faults = done.stdout.split()
    return told, int(faults)


@need(platform.libc_ver()[0] == "glibc", "the C library is not glibc")
def test_pages_are_kept_from_step_to_step():
    told, faults = told_and_faults()
    assert told == "True" and faults < 100


def test_malloc_settings_in_the_environment_have_priority():
    told, faults = told_and_faults(
        MALLOC_MMAP_THRESHOLD_="100000"
    )  # all maps straight from the system
    assert told == "False" and faults > 5 * 30_000
    assert told_and_faults(GLIBC_TUNABLES="glibc.malloc.check=0")[0] == "False"


def test_nothing_is_set_for_a_gpu():
    assert not keep_freed_memory(torch.device("cuda"))
