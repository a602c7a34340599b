"""What one watches while a run goes: throughput, waiting for data, step times, memory."""

from __future__ import annotations

import time
from statistics import quantiles

import torch


class Watch:
    """Times of the steps since the last row."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm = False  # the first step compiles and allocates: no row counts it
        self.reset()

    def reset(self) -> None:
        self.waits: list[float] = []
        self.steps: list[float] = []
        self.started = time.perf_counter()

    def waited(self) -> None:
        """The step's data has come."""
        self.waits.append(time.perf_counter() - self.started)

    def stepped(self) -> float:
        """The step is done; its seconds, the wait included."""
        now = time.perf_counter()
        self.steps.append(now - self.started)
        self.started = now
        return self.steps[-1]

    def resume(self) -> None:
        """Leave out what happened since the last step: evaluation, saving."""
        self.started = time.perf_counter()

    def row(self, batch: int, steps_left: int) -> dict[str, float]:
        """images/s, share of the time spent waiting for data, step-time percentiles (ms), training time left at this rate
        (s, without evaluations), peak GPU memory (GiB). Without the times if there was only the first step."""
        first = 0 if self.warm else 1
        steps, waits, self.warm = self.steps[first:], self.waits[first:], True
        row = rates(steps, waits, batch, steps_left) if steps else {}
        if self.device.type == "cuda":
            row["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        self.reset()
        return row


def rates(steps: list[float], waits: list[float], batch: int, steps_left: int) -> dict[str, float]:
    """What the seconds of the steps, and of the waiting in them, come to."""
    total = sum(steps)
    times = quantiles(steps, n=20, method="inclusive") if len(steps) > 1 else steps * 19
    return {
        "images_per_second": round(batch * len(steps) / total, 1),
        "data_wait": round(sum(waits) / total, 4),
        "step_ms_p50": round(1e3 * times[9], 3),
        "step_ms_p95": round(1e3 * times[18], 3),
        "eta_seconds": round(steps_left * total / len(steps), 3),
    }
