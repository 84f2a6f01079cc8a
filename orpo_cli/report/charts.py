"""Charts as inline SVG: what is drawn is in the file itself, coloured by the classes of the page that holds it.

A series is (x, y) points under a class: `a`, `b`, ... are the page's colours. Every chart has a title and a description
for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import median

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
# Points of a curve, and of a cloud, that are drawn; more cannot be told apart and only swell the file.
CURVE_POINTS, CLOUD_POINTS = 400, 1500

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """Points to be drawn one way: `curve` (faint, with its running median), `line` with `dots`, or `cloud`."""

    name: str
    points: Points
    colour: str
    kind: str = "curve"


def chart(title: str, about: str, series: Iterable[Series], *, x: str, y: str, zero: bool = False) -> str:
    """Series over common axes labelled `x` and `y`; `zero` draws the line y = 0. Without a point: says so."""
    series = [replace(s, points=[p for p in s.points if all(map(math.isfinite, p))]) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return figure(title, about, '<text x="230" y="125" text-anchor="middle">no figures</text>', [])
    xs = [px for s in series for px, _ in s.points]
    ys = [py for s in series for _, py in s.points] + ([0.0] if zero else [])
    frame = Frame.around(xs, ys)
    parts = [frame.axes(x, y)]
    if zero:
        parts.append(f'<path class="zero" d="M{LEFT} {frame.y(0):.1f}H{WIDTH - RIGHT}"/>')
    for s in series:
        parts += drawn(s, frame)
    return figure(title, about, "".join(parts), [(s.name, s.colour, s.kind) for s in series])


def drawn(series: Series, frame: Frame) -> Iterator[str]:
    """The elements of one series."""
    where, colour = frame.path, series.colour
    if series.kind == "cloud":
        for px, py in thinned(series.points, CLOUD_POINTS):
            yield f'<circle class="cloud {colour}" cx="{frame.x(px):.1f}" cy="{frame.y(py):.1f}" r="2.2"/>'
        return
    if series.kind == "curve":
        if len(series.points) > 20:
            yield f'<path class="line faint {colour}" d="{where(thinned(series.points, CURVE_POINTS))}"/>'
        yield f'<path class="line {colour}" d="{where(thinned(smoothed(series.points), CURVE_POINTS))}"/>'
        return
    yield f'<path class="line dashed {colour}" d="{where(series.points)}"/>'
    for px, py in series.points:
        yield (
            f'<circle class="dot {colour}" cx="{frame.x(px):.1f}" cy="{frame.y(py):.1f}" r="3.5">'
            f"<title>{escape(series.name)}, {px:g}: {py:.4g}</title></circle>"
        )


def histogram(title: str, about: str, sets: Sequence[tuple[str, Sequence[float], str]], *, x: str, y: str) -> str:
    """Sets of values as bars over common bins, one set in front of the other."""
    sets = [(name, [v for v in values if math.isfinite(v)], colour) for name, values, colour in sets]
    sets = [one for one in sets if one[1]]
    if not sets:
        return chart(title, about, [], x=x, y=y)
    everything = [v for _, values, _ in sets for v in values]
    low, high = min(everything), max(everything)
    count = max(8, min(40, round(2 * len(everything) ** 0.5)))
    width = (high - low) / count or 1.0
    heights = []
    for _, values, _ in sets:
        counts = [0] * count
        for value in values:
            counts[min(count - 1, int((value - low) / width))] += 1
        heights.append(counts)
    frame = Frame.around([low, low + count * width], [0, *(h for counts in heights for h in counts)])
    parts = [frame.axes(x, y)]
    for (_, _, colour), counts in zip(sets, heights, strict=True):
        for i, tall in enumerate(counts):
            if tall:
                left, right = frame.x(low + i * width), frame.x(low + (i + 1) * width)
                parts.append(
                    f'<rect class="bar {colour}" x="{left:.1f}" y="{frame.y(tall):.1f}" '
                    f'width="{right - left:.1f}" height="{frame.y(0) - frame.y(tall):.1f}"/>'
                )
    if low < 0 < low + count * width:
        parts.append(f'<path class="zero" d="M{frame.x(0):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    return figure(title, about, "".join(parts), [(name, colour, "bar") for name, _, colour in sets])


def figure(title: str, about: str, inside: str, legend: Sequence[tuple[str, str, str]]) -> str:
    """A titled figure around the inside of an SVG; the legend is `(name, colour, kind)`."""
    keys = "".join(f'<span class="key {colour} {kind}">{escape(name)}</span>' for name, colour, kind in legend)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title><desc>{escape(about)}</desc>'
        f'{inside}</svg><div class="legend">{keys}</div></figure>'
    )


@dataclass(frozen=True)
class Frame:
    """The axes' ranges, and where their values lie in the picture."""

    low: tuple[float, float]
    high: tuple[float, float]

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float]) -> Frame:
        """The frame that has room for all values."""
        (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
        if x0 == x1:
            x0, x1 = x0 - 0.5, x1 + 0.5
        margin = 0.05 * (y1 - y0) or 0.5 * abs(y0) or 0.5
        return cls((x0, y0 - margin if y0 else y0), (x1, y1 + margin))

    def x(self, value: float) -> float:
        """From the left, of a value on the x axis."""
        return LEFT + (value - self.low[0]) / (self.high[0] - self.low[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """From the top, of a value on the y axis."""
        return HEIGHT - BOTTOM - (value - self.low[1]) / (self.high[1] - self.low[1]) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        """A path through points."""
        return "M" + "L".join(f"{self.x(px):.1f} {self.y(py):.1f}" for px, py in points)

    def axes(self, x: str, y: str) -> str:
        """Grid, ticks and labels."""
        parts = []
        for value in ticks(self.low[1], self.high[1]):
            at = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{value:g}</text>')
        for value in ticks(self.low[0], self.high[0]):
            parts.append(
                f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{value:g}</text>'
            )
        parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>')
        parts.append(
            f'<text class="label" transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(y)}</text>'
        )
        return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers within a range."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def smoothed(points: Points) -> Points:
    """Running medians over a thirtieth of the points; few points stay as they are."""
    reach = len(points) // 60
    ys = [y for _, y in points]
    return [(x, median(ys[max(0, i - reach) : i + reach + 1])) for i, (x, _) in enumerate(points)]


def thinned(points: Points, most: int) -> Points:
    """At most so many of the points, evenly spaced; the last one stays."""
    every = -(-len(points) // most)
    return points if every <= 1 else [*points[:-1:every], points[-1]]
