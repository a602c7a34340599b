"""The terminal's output: a progress line, and a table with a row per evaluation."""

from __future__ import annotations

import math
import time
from datetime import timedelta

from rich.console import Console

PLAIN_SECONDS = 10.0
COLUMNS = ("epoch", "step", "train loss", "loss", "top-1", "top-5", "images/s", "seconds")
ROW = "{:>9} {:>9} {:>10} {:>8} {:>7} {:>7} {:>9} {:>8}"
FIGURES = {  # the most wanted first: a narrow terminal shows the first ones
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
    """Progress of one run: a moving line on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, epochs: int, visible: bool = True) -> None:
        self.total_steps, self.epochs, self.visible = total_steps, epochs, visible
        self.console = Console(highlight=False, soft_wrap=True)
        self.last_line = time.monotonic()
        self.status = None
        if visible and self.console.is_terminal:
            self.status = self.console.status("starting")
            self.status.start()

    def print(self, text: str) -> None:
        if self.visible:
            self.console.print(text, markup=False)
            self.console.file.flush()

    def header(self) -> None:
        self.print(ROW.format(*COLUMNS))

    def update(self, row: dict) -> None:
        """Show a training row; without a terminal at most every ten seconds."""
        if self.status:
            self.status.update(self.line(row))
        elif self.visible and time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.print(f"  step {row['step']}/{self.total_steps}  {'  '.join(figures(row))}")

    def line(self, row: dict) -> str:
        """Format epoch and step, and as many figures as the terminal is wide."""
        line = f"epoch {row['epoch']:.2f}  {row['step']}/{self.total_steps}"
        for part in figures(row):
            if len(line) + len(part) + 4 > self.console.width:  # the spinner takes two columns
                break
            line += f"  {part}"
        return line

    def epoch(self, row: dict, train_loss: float, images_per_second: float, seconds: float) -> None:
        """Print an evaluation's row; NaN training figures (just resumed) are left blank."""
        values = (
            f"{row['epoch']:g}/{self.epochs}",
            row["step"],
            "" if math.isnan(train_loss) else f"{train_loss:.4f}",
            f"{row['loss']:.4f}",
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
            "" if math.isnan(images_per_second) else f"{images_per_second:.0f}",
            f"{seconds:.0f}",
        )
        self.print(ROW.format(*values))

    def close(self) -> None:
        if self.status:
            self.status.stop()
            self.status = None


def figures(row: dict) -> list[str]:
    """Format a training row's figures; the first row has no times."""
    left = timedelta(seconds=round(row.get("eta_seconds", 0)))
    return [part.format(**row, eta=left) for key, part in FIGURES.items() if key in row]
