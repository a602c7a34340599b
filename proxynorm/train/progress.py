"""What the terminal shows: a progress line, and a table with a row per evaluation."""

from __future__ import annotations

import math
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_SECONDS = 10.0
BAR_WIDTHS = (8, 24)  # least, most
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
        self.bar = None
        if visible and self.console.is_terminal:
            head, text = TextColumn("{task.fields[head]}"), TextColumn("{task.fields[text]}")
            self.columns = (head, BarColumn(BAR_WIDTHS[1]), text)
            self.bar = Progress(*self.columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=total_steps, head="starting", text="")
            self.bar.start()

    def print(self, text: str) -> None:
        if self.visible:
            self.console.print(text, markup=False)
            self.console.file.flush()

    def header(self) -> None:
        self.print(ROW.format(*COLUMNS))

    def update(self, row: dict) -> None:
        """Show a training row; without a terminal at most every ten seconds."""
        if self.bar:
            self.move(row)
        elif self.visible and time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.print(f"  step {row['step']}/{self.total_steps}  {'  '.join(figures(row))}")

    def move(self, row: dict) -> None:
        """Redraw the moving line: epoch and step, the figures that fit, the bar if it fits."""
        head = f"epoch {row['epoch']:.2f}  {row['step']}/{self.total_steps}"
        text, room = fit(figures(row), self.console.width - len(head) - 1)
        left, bar, right = self.columns
        bar.bar_width = min(room - 1, BAR_WIDTHS[1])
        self.bar.columns = (left, bar, right) if bar.bar_width >= BAR_WIDTHS[0] else (left, right)
        self.bar.update(self.task, completed=row["step"], head=head, text=text)

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
        if self.bar:
            self.bar.stop()
            self.bar = None


def figures(row: dict) -> list[str]:
    """Format a training row's figures; the first row has no times."""
    left = timedelta(seconds=round(row.get("eta_seconds", 0)))
    return [part.format(**row, eta=left) for key, part in FIGURES.items() if key in row]


def fit(parts: list[str], width: int) -> tuple[str, int]:
    """Join the first of `parts` that fit into `width`; return the text and the room left."""
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        if len(longer) > width:
            break
        text = longer
    return text, width - len(text)
