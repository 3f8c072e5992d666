"""Drawing: a frame with axes, and lines, points and bars in it. Numbers in, SVG out; style.css has the colors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gora_serve.report.markup import Html, join, tag
from gora_serve.report.numbers import SMALLEST, Point, log_ticks, tick, ticks

WIDTH, HEIGHT = 380.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 10.0, 28.0, 40.0
DASHES = (None, "7 3", "2 3", "9 3 2 3")
COLORS = 8


@dataclass(frozen=True)
class Scale:
    """From values low to high to pixels first to last, linear or logarithmic."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._on(self.low), self._on(self.high)
        return self.first + (self._on(value) - low) / ((high - low) or 1.0) * (self.last - self.first)

    def _on(self, value: float) -> float:
        return math.log10(max(value, SMALLEST)) if self.log else value

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def scale_of(values: Sequence[float], first: float, last: float, *, log: bool = False, zero: bool = False) -> Scale:
    """Return a scale with a little air around these values; zero: from zero on."""
    low, high = min(values), max(values)
    if log:
        low, high = max(low, SMALLEST), max(high, SMALLEST)
        air = (high / low) ** 0.06 if high > low else 2.0
        return Scale(low / air, high * air, first, last, log=True)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(0.0 if zero and low >= 0 else low - air, high + air, first, last)


@dataclass(frozen=True)
class Frame:
    """A plot: its two scales, how high the drawing is, and whether x counts something, steps or ranks."""

    x: Scale
    y: Scale
    height: float = HEIGHT
    counts: bool = True

    def axes(self, x_name: str, y_name: str) -> Html:
        """Draw grid, numbers and names; the y axis is named above itself, where phones have room for it."""
        bottom = self.height - BOTTOM
        parts = []
        for value in self.y.ticks():
            y = self.y(value)
            parts.append(
                tag("line", x1=f"{LEFT:g}", x2=f"{WIDTH - RIGHT:g}", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid")
            )
            parts.append(words(tick(value), LEFT - 6, y + 4, "end"))
        for value in (value for value in self.x.ticks() if not self.counts or value == int(value)):
            x = self.x(value)
            parts.append(
                tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=f"{bottom:g}", y2=f"{bottom + 4:g}", class_="tick")
            )
            parts.append(words(tick(value), x, bottom + 17, "middle"))
        parts.append(
            tag("line", x1=f"{LEFT:g}", x2=f"{WIDTH - RIGHT:g}", y1=f"{bottom:g}", y2=f"{bottom:g}", class_="axis")
        )
        parts.append(words(y_name, 4, 13, "start", "name"))
        parts.append(words(x_name, WIDTH - RIGHT, self.height - 5, "end", "name"))
        return join(parts)

    def line(self, points: Sequence[Point], index: int, kind: str = "line") -> Html:
        """Draw a line through the points, broken where there is no number."""
        path, open_ = [], False
        for x, y in points:
            if y is not None:
                path.append(f"{'L' if open_ else 'M'}{self.x(x):.1f} {self.y(y):.1f}")
            open_ = y is not None
        dash = DASHES[mark_of(index)] if kind == "line" else None
        return (
            tag("path", d="".join(path), class_=f"{kind} {color_of(index)}", stroke_dasharray=dash) if path else Html()
        )

    def level(self, value: float, index: int, says: str) -> Html:
        """Draw a level across the whole frame."""
        y = f"{self.y(value):.1f}"
        return tag("line", tag("title", says), x1=f"{LEFT:g}", x2=f"{WIDTH - RIGHT:g}", y1=y, y2=y,
                   class_=f"level {color_of(index)}")  # fmt: skip

    def marks(self, points: Sequence[tuple[float, float, str]], index: int, size: float = 3.6) -> Html:
        """Draw a mark at each (x, y), with what a pointer over it says."""
        return join(mark(index, self.x(x), self.y(y), size, says) for x, y, says in points)

    def missing(self, x: float, index: int, says: str) -> Html:
        """Draw a cross at the upper edge: there is no finite number at x."""
        at, top, arm = self.x(x), TOP - 2.0, 3.5
        left, right = f"{at - arm:.1f}", f"{at + arm:.1f}"
        strokes = f"M{left} {top - arm}L{right} {top + arm}M{right} {top - arm}L{left} {top + arm}"
        return tag("path", tag("title", says), d=strokes, class_=f"line {color_of(index)}")


def color_of(index: int) -> str:
    return f"s{index % COLORS}"


def mark_of(index: int) -> int:
    """Which of the four marks and dashes: with the colour, it tells 32 series apart."""
    return (index + index // COLORS) % len(DASHES)


def mark(index: int, x: float, y: float, size: float, says: str | None = None) -> Html:
    """Draw a disc, square, triangle or diamond."""
    shapes = (
        ((0.0, 0.0),),
        ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        ((0.0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
        ((0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)),
    )
    corners = shapes[mark_of(index)]
    title = tag("title", says) if says else ""
    if len(corners) == 1:
        return tag("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{size:g}", class_=f"mark {color_of(index)}")
    points = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return tag("polygon", title, points=points, class_=f"mark {color_of(index)}")


def words(
    text: str, x: float, y: float, anchor: str = "start", kind: str | None = None, says: str | None = None
) -> Html:
    title = tag("title", says) if says else ""
    return tag("text", title, text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=kind)


def box(x: float, y: float, width: float, height: float, kind: str, says: str) -> Html:
    """Draw a filled rectangle, with what a pointer over it says."""
    return tag("rect", tag("title", says), x=f"{x:.1f}", y=f"{y:.1f}", width=f"{max(width, 0.0):.1f}",
               height=f"{height:.1f}", class_=kind)  # fmt: skip


def swatch(index: int, *, line: bool = True) -> Html:
    """The sign of a series in legends and tables: its colour, dash and mark."""
    stroke = tag("path", d="M1 7H27", class_=f"line {color_of(index)}", stroke_dasharray=DASHES[mark_of(index)])
    parts = (stroke if line else "", mark(index, 14, 7, 4.2))
    view = "0 0 28 14" if line else "7 0 14 14"
    return tag("svg", *parts, viewBox=view, class_="swatch" if line else "swatch dot", aria_hidden="true")


def legend(names: Sequence[tuple[int, str]], *, line: bool = True) -> Html:
    """List series by their index and name."""
    return tag("ul", *(tag("li", swatch(index, line=line), name) for index, name in names), class_="legend")
