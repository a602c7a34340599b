"""Two small charts as SVG text that depends on the data alone: no fonts measured, no dates, no library's version.

Reports are compared byte for byte, which a plotting library's output does not survive from one version to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

PALETTE = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#777777",
    "#000000",
    "#e69f00",
    "#999933",
    "#882255",
    "#44aa99",
)
FONT = 'font-family="sans-serif" font-size="12"'
Point = tuple[float, float]


def number(value: float) -> str:
    """A coordinate with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high], at most `most` + 1 of them."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


class Frame:
    """Axes in a box of pixels, mapping data to coordinates, collecting SVG elements."""

    def __init__(
        self, size: Point, margins: tuple[float, float, float, float], x: Point, y: Point
    ) -> None:
        self.width, self.height = size
        self.left, self.top, right, bottom = margins
        self.right, self.bottom = self.width - right, self.height - bottom
        self.x_range, self.y_range = padded(x), padded(y)
        self.elements: list[str] = []

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def line(self, start: Point, end: Point, color: str = "#ccc", width: float = 1) -> None:
        (x1, y1), (x2, y2) = start, end
        self.elements.append(
            f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" '
            f'stroke="{color}" stroke-width="{number(width)}"/>'
        )

    def text(
        self, x: float, y: float, words: str, anchor: str = "middle", turn: bool = False
    ) -> None:
        rotation = f' transform="rotate(-90 {number(x)} {number(y)})"' if turn else ""
        self.elements.append(
            f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}" {FONT}{rotation}>{escape(words)}</text>'
        )

    def dot(self, x: float, y: float, color: str, radius: float, opacity: float = 1) -> None:
        self.elements.append(
            f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" fill="{color}" '
            f'fill-opacity="{number(opacity)}"/>'
        )

    def path(self, points: Sequence[Point], color: str) -> None:
        joined = " ".join(f"{number(self.x(x))},{number(self.y(y))}" for x, y in points)
        self.elements.append(
            f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="1.5"/>'
        )

    def x_axis(self, label: str) -> None:
        for value in ticks(*self.x_range):
            self.line((self.x(value), self.top), (self.x(value), self.bottom))
            self.text(self.x(value), self.bottom + 16, f"{value:g}")
        self.text((self.left + self.right) / 2, self.bottom + 34, label)

    def y_axis(self, label: str) -> None:
        for value in ticks(*self.y_range):
            self.line((self.left, self.y(value)), (self.right, self.y(value)))
            self.text(self.left - 6, self.y(value) + 4, f"{value:g}", "end")
        self.text(14, (self.top + self.bottom) / 2, label, turn=True)

    def svg(self) -> str:
        size = f"{number(self.width)} {number(self.height)}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{number(self.width)}" '
            f'height="{number(self.height)}">\n<rect width="100%" height="100%" fill="#fff"/>\n'
            + "\n".join(self.elements)
            + "\n</svg>\n"
        )


def padded(bounds: Point) -> Point:
    """The range a little widened; never empty."""
    low, high = bounds
    space = 0.04 * (high - low) or 0.5
    return low - space, high + space


def dot_chart(
    samples: Mapping[str, Sequence[float]],
    label: str,
    references: Mapping[str, float] | None = None,
) -> str:
    """A row a sample: its values faint, mean and ± one standard deviation bold, its reference a bar across the row."""
    references = references or {}
    values = [value for sample in samples.values() for value in sample] + list(references.values())
    rows, left = len(samples), 24 + 7.2 * max(map(len, samples))
    frame = Frame(
        (860, 60 + 22 * rows), (left, 10, 20, 45), (min(values), max(values)), (0, max(rows - 1, 1))
    )
    frame.x_axis(label)
    for index, (name, sample) in enumerate(samples.items()):
        color, y = (
            PALETTE[index % len(PALETTE)],
            frame.top + (index + 0.5) * (frame.bottom - frame.top) / rows,
        )
        frame.text(left - 8, y + 4, name, "end")
        if name in references:
            x = frame.x(references[name])
            frame.line((x, y - 9), (x, y + 9), "#000", 2)
        for value in sample:
            frame.dot(frame.x(value), y, color, 3, 0.35)
        if sample:
            mean = sum(sample) / len(sample)
            std = (
                math.sqrt(sum((v - mean) ** 2 for v in sample) / (len(sample) - 1))
                if len(sample) > 1
                else 0.0
            )
            frame.line((frame.x(mean - std), y), (frame.x(mean + std), y), color, 2.5)
            frame.dot(frame.x(mean), y, color, 5)
    return frame.svg()


def line_chart(
    series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, y_range: Point | None = None
) -> str:
    """A line a series of (x, y), its name to the right."""
    points = [point for line in series.values() for point in line]
    ys = y_range or (min(y for _, y in points), max(y for _, y in points))
    xs = (min(x for x, _ in points), max(x for x, _ in points))
    space = 44 + 7.2 * max(map(len, series))
    height = max(340, 70 + 18 * len(series))
    frame = Frame((640 + space, height), (60, 10, space, 45), xs, ys)
    frame.x_axis(x_label)
    frame.y_axis(y_label)
    for index, (name, line) in enumerate(series.items()):
        color, y = PALETTE[index % len(PALETTE)], frame.top + 14 + 18 * index
        frame.path(line, color)
        frame.line((frame.right + 10, y - 4), (frame.right + 28, y - 4), color, 2.5)
        frame.text(frame.right + 34, y, name, "start")
    return frame.svg()
