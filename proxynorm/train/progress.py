"""What the terminal shows: a moving line on a terminal, plain lines elsewhere, and a table that grows a row an epoch."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_SECONDS = 10.0
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
            columns = (TextColumn("epoch {task.fields[epoch]:.2f}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                       TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=total_steps, text="", epoch=0.0)
            self.bar.start()

    def say(self, text: str) -> None:
        if self.visible:
            self.console.print(text, markup=False)
            self.console.file.flush()

    def header(self) -> None:
        self.say(ROW.format(*COLUMNS))

    def update(self, row: dict, eta_seconds: float) -> None:
        """Show a training row; off a terminal at most every ten seconds."""
        if not self.visible:
            return
        text = (f"loss {row['loss']:.4f}  lr {row['lr']:.4g}  {row['images_per_second']:.0f} images/s  "
                f"data {100 * row['data_wait']:.0f}%  ETA {timedelta(seconds=round(eta_seconds))}")
        if self.bar:
            self.bar.update(self.task, completed=row["step"], text=text, epoch=row["epoch"])
        elif time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.say(f"  step {row['step']}/{self.total_steps}  {text}")

    def epoch(self, row: dict, train_loss: float, images_per_second: float, seconds: float) -> None:
        """Add the row of an evaluation; the training figures are left out if they are not a number (just resumed)."""
        trained = ("", "") if train_loss != train_loss else (f"{train_loss:.4f}", f"{images_per_second:.0f}")
        self.say(ROW.format(f"{row['epoch']:g}/{self.epochs}", row["step"], trained[0], f"{row['loss']:.4f}",
                            f"{row['top1']:.2f}", f"{row['top5']:.2f}", trained[1], f"{seconds:.0f}"))

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
