"""A torch.profiler trace of a few training steps, to be opened in Perfetto or chrome://tracing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def profiled(steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Trace `steps` steps, after one that is left out and one of warm-up, to folder/trace.json.

    Yields what is to be called after each step; with steps 0 it does nothing. Says where the trace lies.
    """
    if not steps:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    path = folder / "trace.json"

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(path))
        print(f"trace in {path}: open it in https://ui.perfetto.dev", flush=True)

    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # or it reports its own steps, and a missing GPU as an error
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
