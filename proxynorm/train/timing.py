"""Step times, throughput, waiting for data, memory; and a profiler trace."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles

import torch


class StepTimer:
    """Times of the steps since the last row."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm = False  # the first step compiles and allocates: no row counts it
        self.reset()

    def reset(self) -> None:
        self.waits: list[float] = []
        self.steps: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Start the next step now: leave out an evaluation or a save."""
        self.started = time.perf_counter()

    def since_step(self) -> float:
        """Return the seconds since the last step ended, or the timer was restarted."""
        return time.perf_counter() - self.started

    def data_arrived(self) -> None:
        self.waits.append(time.perf_counter() - self.started)

    def step_done(self) -> float:
        """End the step; return its seconds, including the wait for data."""
        now = time.perf_counter()
        self.steps.append(now - self.started)
        self.started = now
        return self.steps[-1]

    def row(self, batch: int, steps_left: int) -> dict[str, float]:
        """Return images/s, the share of time spent waiting for data, step-time percentiles (ms),
        training time left (s, without evaluations) and peak GPU memory (GiB), and reset.

        The times are left out if there was only the first step.
        """
        first = 0 if self.warm else 1
        steps, waits, self.warm = self.steps[first:], self.waits[first:], True
        row = rates(steps, waits, batch, steps_left) if steps else {}
        if self.device.type == "cuda":
            row["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        self.reset()
        return row


def rates(steps: list[float], waits: list[float], batch: int, steps_left: int) -> dict[str, float]:
    """Summarize the seconds of the steps, and of the waiting in them."""
    total = sum(steps)
    times = quantiles(steps, n=20, method="inclusive") if len(steps) > 1 else steps * 19
    return {
        "images_per_second": round(batch * len(steps) / total, 1),
        "data_wait": round(sum(waits) / total, 4),
        "step_ms_p50": round(1e3 * times[9], 3),
        "step_ms_p95": round(1e3 * times[18], 3),
        "eta_seconds": round(steps_left * total / len(steps), 3),
    }


@contextmanager
def profiled(steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Write a torch.profiler trace of `steps` steps to folder/trace.json.

    Yields a function to call after each step. The first step is left out, the second is warm-up.
    With steps=0, does nothing.
    """
    if not steps:
        yield lambda: None
        return
    path = folder / "trace.json"

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(path))
        print(f"trace in {path}: open it in https://ui.perfetto.dev", flush=True)

    # Otherwise Kineto logs its own steps, and a missing GPU as an error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
