"""The geometry of the report's charts: numbers in, places in a drawing of fixed width out. Templates draw them as SVG.

Colours and fonts are in style.css: a line only has the number of its colour and of its dash. Panels are narrow (360 units),
so that text keeps its size on a phone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 34
LOG_RATIO = 30  # values above 0 whose largest is this many times the least get a logarithmic axis
POINTS = 160  # of a curve; more could not be told apart


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve: `label` in the legend, values `ys` at `xs`; NaN leaves a gap.

    errors: half the height of a bar at each point. dots: a mark at each point. reference: a constant to compare with, drawn
    over the whole width; it does not decide whether the axis is logarithmic.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    dash: int = 0
    errors: Sequence[float] | None = None
    dots: bool = False
    reference: bool = False


@dataclass(frozen=True, kw_only=True)
class Path:
    """A drawn line: SVG path data, bars of its errors as (x, top, bottom), and (x, y) of its dots."""

    label: str
    data: str
    colour: int
    dash: int
    bars: tuple[tuple[float, float, float], ...] = ()
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart, ready to be drawn. Ticks are (place, label); `alt` says in words what it shows."""

    title: str
    alt: str
    x_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    paths: tuple[Path, ...]
    rules: tuple[float, ...] = ()  # places on the x axis where a vertical line stands
    is_log: bool = False


def panel(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    percent: bool = False,
    x_ticks: Sequence[tuple[float, str]] = (),
    rules: Sequence[float] = (),
) -> Panel | None:
    """Place lines in a chart; None if no line has a finite value.

    Args:
        percent: values are shares, and the axis runs from 0 to 1.
        x_ticks: (value, label) in place of round values. rules: values where a vertical line stands.
    """
    lines = [line for line in lines if any(map(math.isfinite, line.ys))]
    if not lines:
        return None
    xs = [x for line in lines if not line.reference for x in line.xs] or [0.0, 1.0]
    x_low, x_high = min(xs), max(xs)
    across = _scale(x_low, x_high if x_high > x_low else x_low + 1, LEFT, WIDTH - RIGHT)
    low, high, is_log = (0.0, 1.0, False) if percent else _value_range(lines)
    up = _scale(low, high, HEIGHT - BOTTOM, TOP, is_log)
    y_ticks = _log_ticks(low, high) if is_log else round_ticks(low, high, 4)
    return Panel(
        title=title,
        alt=alt_text(title, lines, percent=percent),
        x_label=x_label,
        x_ticks=tuple(
            (across(value), label)
            for value, label in x_ticks or [(value, f"{value:.4g}") for value in round_ticks(x_low, x_high, 5)]
            if x_low <= value <= x_high
        ),
        y_ticks=tuple((up(value), f"{value:.0%}" if percent else f"{value:.4g}") for value in y_ticks),
        paths=tuple(_path(line, across, up, low, high) for line in lines),
        rules=tuple(across(value) for value in rules if x_low < value < x_high),
        is_log=is_log,
    )


def _scale(low: float, high: float, start: float, end: float, is_log: bool = False) -> Callable[[float], float]:
    """Values from `low` to `high` -> places from `start` to `end`; NaN for what a logarithmic axis cannot show."""

    def place(value: float) -> float:
        if is_log and value <= 0:
            return math.nan
        bottom, top, at = (math.log10(v) if is_log else v for v in (low, high, value))
        return round(start + (at - bottom) / (top - bottom) * (end - start), 1)

    return place


def _value_range(lines: Sequence[Line]) -> tuple[float, float, bool]:
    """The ends of the value axis, and whether it is logarithmic."""
    everything = [y for line in lines for y in line.ys if math.isfinite(y)]
    curves = [y for line in lines if not line.reference for y in line.ys if math.isfinite(y)] or everything
    if min(curves) > 0 and max(curves) > LOG_RATIO * min(curves):
        above = [y for y in everything if y > 0]
        return min(above) / 1.1, max(above) * 1.1, True
    low, high = min(0.0, *everything), max(0.0, *everything)
    high = high if high > low else low + 1.0
    step = round_step((high - low) / 4)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, False


def round_step(step: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values from `low` to `high`, about `count` of them."""
    step = round_step((high - low) / count if high > low else 1.0)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [number * step for number in numbers]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or finer where there are fewer than three; five at most."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**e for e in exponents for m in steps if low <= m * 10.0**e <= high]
        if len(found) >= 3:
            break
    return found[:: -(-len(found) // 5)]


def _path(line: Line, across: Callable[[float], float], up: Callable[[float], float], low: float, high: float) -> Path:
    points = [
        (across(x), up(y), y) if math.isfinite(y) else (0.0, math.nan, y) for x, y in zip(line.xs, line.ys, strict=True)
    ]
    if line.reference:
        data = f"M{LEFT} {up(line.ys[0]):g}H{WIDTH - RIGHT}"
        return Path(label=line.label, data=data, colour=line.colour, dash=line.dash)
    pieces, before = [], math.nan
    for x, y, _ in points:
        if math.isfinite(y):
            pieces.append(f"{'L' if math.isfinite(before) else 'M'}{x:g} {y:g}")
        before = y
    bars = tuple(
        (x, up(min(high, value + error)), up(max(low, value - error)))
        for (x, y, value), error in zip(points, line.errors or (), strict=False)
        if math.isfinite(y) and math.isfinite(error) and error > 0
    )
    places = tuple((x, y) for x, y, _ in points if math.isfinite(y))
    dots = places if line.dots or len(places) == 1 else ()
    return Path(label=line.label, data="".join(pieces), colour=line.colour, dash=line.dash, bars=bars, dots=dots)


def alt_text(title: str, lines: Sequence[Line], *, percent: bool = False) -> str:
    """What a chart of lines shows, in words: where each begins and ends."""
    parts = []
    for line in lines:
        ys = [f"{y:.1%}" if percent else f"{y:.4g}" for y in line.ys if math.isfinite(y)]
        parts.append(f"{line.label}: {ys[0]}" + ("" if line.reference or len(ys) == 1 else f" to {ys[-1]}"))
    return f"{title}. {'; '.join(parts)}."


def thinned(xs: Sequence[float], ys: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """A curve of at most `points`: means over equal pieces. Shorter ones stay as they are."""
    if len(xs) <= points:
        return list(xs), list(ys)
    first, second = ([float(piece.mean()) for piece in np.array_split(values, points)] for values in (xs, ys))
    return first, second
