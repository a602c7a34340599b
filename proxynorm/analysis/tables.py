"""The same cells as an aligned text table, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

Grid = Sequence[Sequence[str]]


def text_table(grid: Grid) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    header, *rows = grid
    lines = []
    for first, *others in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def markdown_table(grid: Grid) -> str:
    """A header and its rows as a Markdown table, numbers to the right."""
    header, *rows = [[text.replace("|", "\\|") for text in row] for row in grid]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def latex_table(grid: Grid) -> str:
    r"""A header and its rows as a LaTeX tabular in booktabs' style (\usepackage{booktabs})."""
    header, *rows = [" & ".join(map(_latex, row)) + r" \\" for row in grid]
    columns = "l" + "r" * (len(grid[0]) - 1)
    body = [r"\toprule", header, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def _latex(text: str) -> str:
    escaped = re.sub(r"([_%&#$])", r"\\\1", text)
    return escaped.replace("±", r"$\pm$").replace("−", "$-$").replace("–", "--")


def csv_table(grid: Sequence[Sequence[object]]) -> str:
    """A header and its rows as CSV; None is an empty field."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(grid)
    return stream.getvalue()
