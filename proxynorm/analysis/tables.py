"""Tables as aligned text, Markdown, LaTeX and CSV. The first row of a grid is the header."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

Grid = Sequence[Sequence[str]]


def text_table(grid: Grid) -> str:
    """Align the first column to the left, the others to the right, and underline the header."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    header, *rows = grid
    lines = []
    for first, *others in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def markdown_table(grid: Grid) -> str:
    """Format a grid as a Markdown table, all but the first column aligned to the right."""
    header, *rows = [[text.replace("|", "\\|") for text in row] for row in grid]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def latex_table(grid: Grid) -> str:
    r"""Format a grid as a LaTeX tabular in the style of booktabs (\usepackage{booktabs})."""
    header, *rows = [" & ".join(map(_latex, row)) + r" \\" for row in grid]
    columns = "l" + "r" * (len(grid[0]) - 1)
    body = [r"\toprule", header, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def _latex(text: str) -> str:
    escaped = re.sub(r"([_%&#$])", r"\\\1", text)
    return escaped.replace("±", r"$\pm$").replace("−", "$-$").replace("–", "--")


def csv_table(grid: Sequence[Sequence[object]]) -> str:
    """Format a grid as CSV. None becomes an empty field."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(grid)
    return stream.getvalue()
