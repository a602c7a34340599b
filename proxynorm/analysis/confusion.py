"""The confusion matrix: counts, accuracy per class, CSV files and a figure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from proxynorm.analysis.style import save_figure
from proxynorm.analysis.tables import csv_table
from proxynorm.data import Batch
from proxynorm.files import write_text

MOST_LABELS = 40  # more class names do not fit into the figure


def counted(
    outputs: Iterable[tuple[Batch, Tensor]], columns: Tensor, matrix: Tensor
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch with the selected logits, and add its images to a confusion matrix.

    columns: int64 (K,); matrix: int64 (K, K), number of images by class and prediction.
    """
    for batch, logits in outputs:
        logits = logits[:, columns]
        counts = batch.valid.to(matrix)  # 1, or 0 for padding and damaged images
        matrix.index_put_((batch.targets, logits.argmax(1)), counts, accumulate=True)
        yield batch, logits


def write_confusion(folder: str | Path, classes: Sequence[str], matrix: np.ndarray) -> None:
    """Write per_class.csv, confusion.csv and confusion.png. Rows of `matrix` are true classes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[object, ...]] = [("class", "images", "correct", "top1")]
    rows += [
        (name, n, hits, f"{100 * hits / n:.2f}" if n else "")
        for name, n, hits in zip(classes, matrix.sum(1).tolist(), matrix.diagonal().tolist())
    ]
    write_text(folder / "per_class.csv", csv_table(rows))
    rows = [("class", *classes), *((name, *row) for name, row in zip(classes, matrix.tolist()))]
    write_text(folder / "confusion.csv", csv_table(rows))
    plot_confusion(folder / "confusion.png", classes, matrix)


def plot_confusion(path: Path, classes: Sequence[str], matrix: np.ndarray) -> None:
    """Draw the share of each true class (row) that is predicted as each class (column)."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(4 + 0.3 * len(classes), 12)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= MOST_LABELS:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    save_figure(figure, path)
