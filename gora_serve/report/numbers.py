"""Numbers for figures and tables: ticks, thinning, smoothing, rank correlation, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gora_serve.report.markup import MISSING

SMALLEST = 1e-200  # what an axis tells from zero
Point = tuple[float, float | None]  # None: the file has no finite number there


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers between low and high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    if not rough > SMALLEST:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * factor for factor in (1, 2, 5) if power * factor >= rough * 0.999), power * 10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between low and high, or where there are fewer than two, 1, 2 and 5 times those."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
        inside = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(inside) >= 2:
            return inside[:: -(-len(inside) // 6)]
    return ticks(low, high, 3)


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most about `most` points, means over equal stretches; a stretch with a None also keeps one."""
    width = -(-len(points) // most) if points else 1
    if width <= 1:
        return list(points)
    found: list[Point] = []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        known = [y for _, y in part if y is not None]
        if known:
            found.append((sum(x for x, _ in part) / len(part), math.fsum(known) / len(known)))
        found += [point for point in part if point[1] is None][:1]
    return found


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Return the centred moving mean over `window` points, fewer at the ends. What is not finite is left out of it."""
    half = window // 2
    found: list[Point] = []
    for index, (x, y) in enumerate(points):
        near = [value for _, value in points[max(0, index - half) : index + half + 1] if value is not None]
        found.append((x, math.fsum(near) / len(near) if near and y is not None else None))
    return found


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` indices below `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Return Spearman's rho, ties at their mean rank; None where one side does not vary or there are fewer than 3."""
    if len(xs) < 3 or len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    one, other = _places(xs), _places(ys)
    middle = (len(xs) + 1) / 2
    products = math.fsum((a - middle) * (b - middle) for a, b in zip(one, other, strict=True))
    squares = math.fsum((a - middle) ** 2 for a in one) * math.fsum((b - middle) ** 2 for b in other)
    return products / math.sqrt(squares)


def _places(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    places = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            places[index] = (start + end + 1) / 2
        start = end
    return places


def short(value: float | None, digits: int = 4) -> str:
    """Write a number with so many significant digits, without an exponent where it reads well without."""
    if value is None:
        return MISSING
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
        text = f"{value:,.{places}f}"
        return text.rstrip("0").rstrip(".") if "." in text and value == int(value) else text
    return f"{value:.{digits - 1}e}"


def tick(value: float) -> str:
    """Write a round number of an axis."""
    return f"{value:,.10g}" if 1e-4 <= abs(value) < 1e7 else f"{value:g}"


def percent(value: float | None, places: int = 1) -> str:
    return MISSING if value is None else f"{value:.{places}%}"


def duration(seconds: float | None) -> str:
    """Write seconds as people say them: 0.42 s, 12.3 s, 4 min 05 s, 2 h 03 min."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    if count is None:
        return MISSING
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:.2f} {unit}"
    return f"{count:g} B"
