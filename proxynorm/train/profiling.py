"""A torch.profiler trace of a few training steps, to be opened in Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def profiled(steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Trace `steps` steps, after one that is left out and one of warm-up, to folder/trace.json.

    Yields what is to be called after each step; with steps 0 it does nothing.
    """
    if not steps:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    path = folder / "trace.json"
    with torch.profiler.profile(schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(path))) as profiler:
        yield profiler.step
