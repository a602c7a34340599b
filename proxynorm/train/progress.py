"""What the terminal shows: a moving line on a terminal, plain lines elsewhere, and a table that grows a row an epoch."""

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


class Display:
    """Progress of one run; silent unless `visible`."""

    def __init__(self, total_steps: int, epochs: int, visible: bool = True) -> None:
        self.total_steps, self.epochs, self.visible = total_steps, epochs, visible
        self.console = Console(highlight=False, soft_wrap=True)
        self.last_line = time.monotonic()
        self.bar = None
        if visible and self.console.is_terminal:
            self.columns = (
                TextColumn("{task.fields[head]}"),
                BarColumn(BAR_WIDTHS[1]),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*self.columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=total_steps, head="starting", text="")
            self.bar.start()

    def say(self, text: str) -> None:
        if self.visible:
            self.console.print(text, markup=False)
            self.console.file.flush()

    def header(self) -> None:
        self.say(ROW.format(*COLUMNS))

    def update(self, row: dict) -> None:
        """Show a training row; off a terminal at most every ten seconds."""
        if not self.visible:
            return
        parts = figures(row)
        if self.bar:
            self.move(row, parts)
        elif time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.say(f"  step {row['step']}/{self.total_steps}  {'  '.join(parts)}")

    def move(self, row: dict, parts: list[str]) -> None:
        """Redraw the moving line: epoch and step always, then as many figures as the terminal is wide, then the bar."""
        head = f"epoch {row['epoch']:.2f}  {row['step']}/{self.total_steps}"
        text, room = fit(parts, self.console.width - len(head) - 1)
        left, bar, right = self.columns
        bar.bar_width = min(room - 1, BAR_WIDTHS[1])
        self.bar.columns = (left, bar, right) if bar.bar_width >= BAR_WIDTHS[0] else (left, right)
        self.bar.update(self.task, completed=row["step"], head=head, text=text)

    def epoch(self, row: dict, train_loss: float, images_per_second: float, seconds: float) -> None:
        """Add the row of an evaluation; the training figures are left out if they are not a number (just resumed)."""
        loss = "" if math.isnan(train_loss) else f"{train_loss:.4f}"
        speed = "" if math.isnan(images_per_second) else f"{images_per_second:.0f}"
        self.say(
            ROW.format(
                f"{row['epoch']:g}/{self.epochs}",
                row["step"],
                loss,
                f"{row['loss']:.4f}",
                f"{row['top1']:.2f}",
                f"{row['top5']:.2f}",
                speed,
                f"{seconds:.0f}",
            )
        )

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


def figures(row: dict) -> list[str]:
    """A training row's figures as the progress line shows them, the most wanted first; the first row knows no times."""
    parts = {
        "loss": "loss {loss:.4f}",
        "eta_seconds": "ETA {eta}",
        "images_per_second": "{images_per_second:.0f} images/s",
        "lr": "lr {lr:.4g}",
        "data_wait": "data {data_wait:.0%}",
        "step_ms_p50": "step {step_ms_p50:.0f}, p95 {step_ms_p95:.0f} ms",
        "gradient_norm": "gradient {gradient_norm:.3g}",
        "gpu_memory_gib": "GPU {gpu_memory_gib:.1f} GiB",
    }
    left = timedelta(seconds=round(row.get("eta_seconds", 0)))
    return [part.format(**row, eta=left) for key, part in parts.items() if key in row]


def fit(parts: list[str], width: int) -> tuple[str, int]:
    """The first of `parts` that go into `width` characters, two spaces between, and the characters left over."""
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        if len(longer) > width:
            break
        text = longer
    return text, width - len(text)
