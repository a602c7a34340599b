"""The display of a run: a progress line, a table with a row per evaluation, step times."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

PLAIN_SECONDS = 10.0  # between two lines, without a terminal
COLUMNS = ("epoch", "step", "train loss", "loss", "top-1", "top-5", "images/s", "seconds")
ROW = "{:>9} {:>9} {:>10} {:>8} {:>7} {:>7} {:>9} {:>8}"
METRICS = {  # the most important first: a narrow terminal cuts off the end
    "epoch": "epoch {epoch:.2f}",
    "loss": "loss {loss:.4f}",
    "eta_seconds": "ETA {eta}",
    "images_per_second": "{images_per_second:.0f} images/s",
    "lr": "lr {lr:.4g}",
    "data_wait": "data {data_wait:.0%}",
    "step_ms_p50": "step {step_ms_p50:.0f}, p95 {step_ms_p95:.0f} ms",
    "gradient_norm": "gradient {gradient_norm:.3g}",
    "gpu_memory_gib": "GPU {gpu_memory_gib:.1f} GiB",
}


class Display:
    """The progress of one run: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, epochs: int, visible: bool = True) -> None:
        self.total_steps, self.epochs, self.visible = total_steps, epochs, visible
        self.console = Console(highlight=False, soft_wrap=True)
        self.last_line = time.monotonic()
        self.bar = Progress(
            MofNCompleteColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1)),
            console=self.console,
            transient=True,
            disable=not (visible and self.console.is_terminal),
            expand=True,
        )
        self.task = self.bar.add_task("starting", total=total_steps)
        self.training: dict[str, Any] = {}  # the latest training metrics

    def start(self) -> None:
        """Print the table's header and start the progress bar."""
        self.print(ROW.format(*COLUMNS))
        self.bar.start()

    def close(self) -> None:
        self.bar.stop()

    def print(self, text: str) -> None:
        if self.visible:
            self.console.print(text, markup=False)
            self.console.file.flush()

    def update(self, row: dict[str, Any]) -> None:
        """Show a training row; without a terminal, at most one every PLAIN_SECONDS."""
        self.training |= row
        text = "  ".join(format_metrics(row))
        self.bar.update(self.task, completed=row["step"], description=text)
        if not self.console.is_terminal and time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.print(f"  step {row['step']}/{self.total_steps}  {text}")

    def epoch(self, row: dict[str, Any]) -> None:
        """Print an evaluation's row, with the latest training metrics if there are any."""
        loss, rate = (self.training.get(key) for key in ("loss", "images_per_second"))
        values = (
            f"{row['epoch']:g}/{self.epochs}",
            row["step"],
            "" if loss is None else f"{loss:.4f}",
            f"{row['loss']:.4f}",
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
            "" if rate is None else f"{rate:.0f}",
            f"{row['train_seconds']:.0f}",
        )
        self.print(ROW.format(*values))


def format_metrics(row: dict[str, Any]) -> list[str]:
    """Format a training row's metrics; the first row may have no times."""
    left = timedelta(seconds=round(row.get("eta_seconds", 0)))
    return [part.format(**row, eta=left) for key, part in METRICS.items() if key in row]


class StepTimer:
    """Times the steps since the last row of metrics.jsonl."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm = False  # the first step compiles and allocates, so no row counts it
        self.waits: list[float] = []
        self.steps: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Start the next step now, so that an evaluation or a save is not counted."""
        self.started = time.perf_counter()

    def since_step(self) -> float:
        """Return the seconds since the last step ended or the timer was restarted."""
        return time.perf_counter() - self.started

    def data_arrived(self) -> None:
        self.waits.append(self.since_step())

    def step_done(self) -> float:
        """End the step and return its seconds, including the wait for data."""
        self.steps.append(self.since_step())
        self.restart()
        return self.steps[-1]

    def row(self, batch: int, steps_left: int) -> dict[str, float]:
        """Return the metrics since the last row, and start over.

        They are images/s, the share of time spent waiting for data, step times (ms), the training
        time left (s, without evaluations) and the peak GPU memory (GiB). A row for the first step
        alone has no times.
        """
        first = 0 if self.warm else 1
        steps, waits, row = self.steps[first:], self.waits[first:], {}
        self.steps, self.waits, self.warm = [], [], True
        if steps:
            total = sum(steps)
            p50, p95 = np.percentile(steps, [50, 95]).tolist()
            row = {
                "images_per_second": round(batch * len(steps) / total, 1),
                "data_wait": round(sum(waits) / total, 4),
                "step_ms_p50": round(1e3 * p50, 3),
                "step_ms_p95": round(1e3 * p95, 3),
                "eta_seconds": round(steps_left * total / len(steps), 3),
            }
        if self.device.type == "cuda":
            row["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        return row


@contextmanager
def profiled(steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Write a torch.profiler trace of `steps` steps to folder/trace.json; none if steps is 0.

    Yields a function to call after each step. The trace begins with the third step: the first is
    skipped, the second is the profiler's warm-up.
    """
    if not steps:
        yield lambda: None
        return
    path = folder / "trace.json"

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(path))
        print(f"trace in {path}: open it in https://ui.perfetto.dev", flush=True)

    # Kineto would log its own steps, and a missing GPU as an error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
