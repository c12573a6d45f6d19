"""The geometry of the report's charts: numbers in, places in a picture of fixed width out. Templates draw them as SVG.

Nothing here knows colours or fonts: a line has the number of its colour and of its dash, which style.css gives for light
and dark pages. Panels are narrow (360 units), so that text keeps its size on a phone.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 34
LOG_RATIO = 30  # all values above 0, and the largest this many times the least: a logarithmic axis
POINTS = 160  # of a curve; more would not be told apart


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve: `label` in the legend, values `ys` at `xs`; NaN leaves a gap.

    errors: half the height of a bar at each point. dots: a mark at each point. reference: a constant to compare with, over
    the whole width; whether the axis is logarithmic is not its to say.
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


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values -> places along an axis of a panel, from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, count: int) -> list[float]:
        """Round values on the axis, about `count` of them."""
        if self.is_log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                found = [m * 10.0**e for e in exponents for m in steps if self.low <= m * 10.0**e <= self.high]
                if len(found) >= 3:
                    break
            return found[:: -(-len(found) // (count + 1))] if len(found) > count + 1 else found
        step = round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(step: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def tick_label(value: float) -> str:
    """Short: 0.25, 1500, 2e-05."""
    return "0" if abs(value) < 1e-12 else f"{value:.4g}"


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
    across = Axis(low=x_low, high=x_high if x_high > x_low else x_low + 1, start=LEFT, end=WIDTH - RIGHT)
    up = _value_axis(lines, percent=percent)
    shown = list(x_ticks) or [(value, tick_label(value)) for value in across.ticks(5)]
    return Panel(
        title=title,
        alt=alt_text(title, lines, percent=percent),
        x_label=x_label,
        x_ticks=tuple((across(value), label) for value, label in shown if x_low <= value <= max(x_high, x_low)),
        y_ticks=tuple((up(value), f"{value:.0%}" if percent else tick_label(value)) for value in up.ticks(4)),
        paths=tuple(_path(line, across, up) for line in lines),
        rules=tuple(across(value) for value in rules if x_low < value < x_high),
        is_log=up.is_log,
    )


def _value_axis(lines: Sequence[Line], *, percent: bool) -> Axis:
    place = functools.partial(Axis, start=HEIGHT - BOTTOM, end=TOP)
    if percent:
        return place(low=0.0, high=1.0)
    curves = [line for line in lines if not line.reference] or list(lines)
    values = sorted(y for line in curves for y in line.ys if math.isfinite(y))
    everything = [y for line in lines for y in line.ys if math.isfinite(y)]
    if values[0] > 0 and values[-1] > LOG_RATIO * values[0]:
        above = [y for y in everything if y > 0]
        return place(low=min(above) / 1.1, high=max(above) * 1.1, is_log=True)
    low, high = min(0.0, min(everything)), max(0.0, max(everything))
    if low == high:
        high = low + 1.0
    step = round_step((high - low) / 4)
    return place(low=math.floor(low / step + 1e-9) * step, high=math.ceil(high / step - 1e-9) * step)


def _path(line: Line, across: Axis, up: Axis) -> Path:
    pieces, pen_down = [], False
    places = []
    for x, y in zip(line.xs, line.ys, strict=True):
        if not math.isfinite(y) or (up.is_log and y <= 0):
            pen_down = False
            continue
        at = (LEFT, up(y)) if line.reference else (across(x), up(y))
        pieces.append(f"{'L' if pen_down else 'M'}{at[0]:g} {at[1]:g}")
        places.append((at, y, x))
        pen_down = True
        if line.reference:
            pieces.append(f"H{WIDTH - RIGHT}")
            break
    bars = []
    if line.errors is not None:
        error_at = dict(zip(line.xs, line.errors, strict=True))
        for (x_at, _), y, x in places:
            if math.isfinite(error := error_at[x]) and error > 0:
                bars.append((x_at, up(min(up.high, y + error)), up(max(up.low, y - error))))
    dots = tuple(at for at, *_ in places) if line.dots or len(places) == 1 and not line.reference else ()
    return Path(label=line.label, data="".join(pieces), colour=line.colour, dash=line.dash, bars=tuple(bars), dots=dots)


def alt_text(title: str, lines: Sequence[Line], *, percent: bool = False) -> str:
    """What a chart of lines shows, in words: where each begins and ends."""
    parts = []
    for line in lines:
        ys = [y for y in line.ys if math.isfinite(y)]
        first, last = (f"{y:.1%}" if percent else f"{y:.4g}" for y in (ys[0], ys[-1]))
        parts.append(f"{line.label}: {first}" if line.reference or len(ys) == 1 else f"{line.label}: {first} to {last}")
    return f"{title}. {'; '.join(parts)}."


def thinned(xs: Sequence[float], ys: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """A curve of at most `points`: means over equal pieces of the x axis. Shorter ones stay as they are."""
    if len(xs) <= points:
        return list(xs), list(ys)
    low, width = xs[0], (xs[-1] - xs[0]) / points or 1.0
    pieces: dict[int, list[tuple[float, float]]] = {}
    for x, y in zip(xs, ys, strict=True):
        pieces.setdefault(min(points - 1, int((x - low) / width)), []).append((x, y))
    means = [(mean(x for x, _ in piece), mean(y for _, y in piece)) for piece in pieces.values()]
    return [x for x, _ in means], [y for _, y in means]


def mean(values: Iterable[float]) -> float:
    """NaN of none."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan
