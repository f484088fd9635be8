"""Plots of the report as inline SVG, drawn from plain numbers; colours come from the page's style sheet.

Every function returns a string of SVG, or "" where there is nothing to draw. All text passes through `escape`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

CHARACTER = 7.0
"""Mean width of a character of 12 px, in px; generous, so that labels are not clipped."""
WIDTH = 1100.0
"""Of plots that stand alone, in px."""
NUM_COLOURS = 7
DASHES = ("", "7 3", "2 3", "9 3 2 3")


def text_width(text: str) -> float:
    """Estimated width in px; wide scripts count double."""
    return CHARACTER * sum(2 if ord(c) > 0x2E80 else 1 for c in text)


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def text(x: float, y: float, content: str, anchor: str = "start", style: str = "", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}" {extra}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def rectangle(x: float, y: float, width: float, height: float, style: str, extra: str = "") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{style}" {extra}/>'


def svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img"'
    return f'{head} aria-label="{escape(label)}">{"".join(body)}</svg>'


def titled(title: str, *parts: str) -> str:
    """Shapes with a tooltip."""
    return f"<g><title>{escape(title)}</title>{''.join(parts)}</g>"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every power of ten within [low, high]; powers alone where that would be too many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    inside = [m for m in marks if low <= m <= high]
    if len(inside) < 3:
        return ticks(low, high, 5)
    return inside if len(inside) <= 8 else [m for m in inside if abs(math.log10(m) % 1) < 1e-9]


def number(value: float) -> str:
    """A tick as people write it."""
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.6g}"


@dataclass
class Axis:
    """Maps values to px. `log` needs positive values."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count)


def span(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    """The range of values with a margin; never empty."""
    low, high = min(values), max(values)
    margin = pad * (high - low) or abs(low) * 0.05 or 1.0
    return low - margin, high + margin


def frame(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    """Grid, ticks and labels of a plot with two axes."""
    parts = [
        line(x.start, y(t), x.end, y(t), "grid") + text(x.start - 6, y(t) + 4, number(t), "end", "tick")
        for t in y.ticks(5)
    ]
    parts += [
        line(x(t), y.start, x(t), y.end, "grid") + text(x(t), y.start + 16, number(t), "middle", "tick")
        for t in x.ticks()
    ]
    parts += [line(x.start, y.start, x.end, y.start, "axis"), line(x.start, y.start, x.start, y.end, "axis")]
    parts.append(text((x.start + x.end) / 2, y.start + 36, x_label, "middle", "name"))
    parts.append(
        text(0, 0, y_label, "middle", "name", f'transform="translate(13 {(y.start + y.end) / 2:.1f}) rotate(-90)"')
    )
    return parts


# --- gains ----------------------------------------------------------------------------------------------------


@dataclass
class Bar:
    """One row of a plot of gains: its label, its value with bounds, the verdict in words, and a style."""

    label: str
    value: float
    low: float
    high: float
    words: str
    style: str
    title: str = ""


def gains(bars: Sequence[Bar], unit: str) -> str:
    """Gains with intervals around a zero line."""
    if not bars:
        return ""
    left = 18 + max(text_width(cut(b.label, 34)) for b in bars)
    right = 24 + 1.08 * max(text_width(b.words) for b in bars)
    width, bottom = WIDTH, 8.0 + 24 * len(bars)
    x = Axis(*span([0.0, *(v for b in bars for v in (b.low, b.high, b.value))]), left, width - right)
    parts = [
        line(x(t), 4, x(t), bottom, "grid") + text(x(t), bottom + 16, number(t), "middle", "tick") for t in x.ticks(8)
    ]
    parts += [_bar(b, x, 6 + 24 * i, width - right + 12) for i, b in enumerate(bars)]
    parts += [line(x(0), 2, x(0), bottom, "zero"), line(left, bottom, width - right, bottom, "axis")]
    parts.append(text((left + width - right) / 2, bottom + 34, unit, "middle", "name"))
    return svg(width, bottom + 42, parts, f"Bars with intervals: {unit}")


def _bar(b: Bar, x: Axis, y: float, words_x: float) -> str:
    middle = y + 11
    start, end = sorted((x(0), x(b.value)))
    shapes = [
        text(x.start - 10, middle + 4, cut(b.label, 34), "end"),
        rectangle(start, y + 4, max(end - start, 0.5), 14, f"bar {b.style}"),
        line(x(b.low), middle, x(b.high), middle, "whisker"),
        line(x(b.low), middle - 5, x(b.low), middle + 5, "whisker"),
        line(x(b.high), middle - 5, x(b.high), middle + 5, "whisker"),
        text(words_x, middle + 4, b.words, style=f"word {b.style}"),
    ]
    return titled(b.title or f"{b.label}: {b.words}", *shapes)


# --- quality against cost -------------------------------------------------------------------------------------


@dataclass
class Point:
    """One stage of the scatter. high and low may be equal to the value where there is no interval."""

    label: str
    x: float
    y: float
    low: float
    high: float
    style: str
    title: str


@dataclass
class Room:
    """Boxes (left, top, right, bottom) that are taken, so that labels keep apart."""

    width: float
    height: float
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)

    def free(self, box: tuple[float, float, float, float]) -> bool:
        left, top, right, bottom = box
        if left < 0 or top < 0 or right > self.width or bottom > self.height:
            return False
        return all(right < b[0] or b[2] < left or bottom < b[1] or b[3] < top for b in self.boxes)

    def place(self, x: float, y: float, width: float) -> tuple[float, float] | None:
        """Left and baseline of a label near (x, y), the nearest that is free."""
        for radius in (10, 20, 32, 46, 62, 80, 100, 125):
            for angle in (0, 180, -30, 30, 210, 150, -60, 60, 240, 120, -90, 90):
                dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
                left = x + dx if abs(angle) < 90 else x + dx - width if 90 < abs(angle) < 270 else x - width / 2
                box = (left - 2, y + dy - 8, left + width + 2, y + dy + 7)
                if self.free(box):
                    self.boxes.append(box)
                    return left, y + dy + 4
        return None


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Quality against cost, cost on a logarithmic axis."""
    points = [p for p in points if p.x > 0]
    if not points:
        return ""
    width, height = WIDTH, 480.0
    costs = [p.x for p in points]
    x = Axis(min(costs) / 1.6, max(costs) * 1.6, 64, width - 16, log=True)
    y = Axis(*span([v for p in points for v in (p.low, p.high)], 0.1), height - 50, 10)
    parts = frame(x, y, x_label, y_label)
    room = Room(width - 4, height - 54)
    for p in points:
        room.boxes += [(x(p.x) - 6, y(p.y) - 6, x(p.x) + 6, y(p.y) + 6), (x(p.x) - 1, y(p.high), x(p.x) + 1, y(p.low))]
    for p in sorted(points, key=lambda p: -p.y):
        px, py = x(p.x), y(p.y)
        shown = cut(p.label, 36)
        spot = room.place(px, py, text_width(shown))
        shapes = [
            line(px, y(p.low), px, y(p.high), f"error {p.style}"),
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" class="dot {p.style}"/>',
        ]
        if spot is not None:
            left, base = spot
            near = min(max(px, left), left + text_width(shown))
            if math.hypot(near - px, base - 4 - py) > 14:
                shapes.insert(0, line(px, py, near, base - 4, f"leader {p.style}"))
            end = left + text_width(shown)  # an estimate: what stands on the left of its point must end there
            place = (end, base, shown, "end") if end < px else (left, base, shown, "start")
            shapes.append(text(*place, style=f"halo label {p.style}"))
        parts.append(titled(p.title, *shapes))
    return svg(width, height, parts, "Quality against cost")


# --- curves ---------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """One line: points (x, y), the stage's number, for colour and dashes; faint for one seed among several."""

    label: str
    points: Sequence[tuple[float, float]]
    index: int
    faint: bool = False


def with_mean(label: str, seeds: Sequence[tuple[str, Sequence[tuple[float, float]]]], index: int) -> list[Curve]:
    """The curves of several seeds, faint, and their mean where all have a point."""
    seeds = [(name, points) for name, points in seeds if points]
    if len(seeds) < 2:
        return [Curve(label, points, index) for _, points in seeds]
    lines = [dict(points) for _, points in seeds]
    shared = [x for x in lines[0] if all(x in one for one in lines)]
    mean = [(x, sum(one[x] for one in lines) / len(lines)) for x in shared]
    return [
        *(Curve(name, points, index, True) for name, points in seeds),
        Curve(f"{label}, mean of seeds", mean, index),
    ]


def _look(index: int, faint: bool = False) -> str:
    dash = DASHES[(index // NUM_COLOURS) % len(DASHES)]
    return f'class="curve c{index % NUM_COLOURS}{" faint" if faint else ""}"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def curves(found: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Learning curves, one line per stage and seed. One point alone is drawn as a dot."""
    found = sorted((c for c in found if c.points), key=lambda c: not c.faint)
    if not found:
        return ""
    width, height = 570.0, 320.0
    xs, ys = ([p[i] for c in found for p in c.points] for i in (0, 1))
    x = Axis(min(0.0, *xs) if len(xs) > 1 else 0.0, max(xs) * 1.02 or 1.0, 58, width - 14)
    y = Axis(*span(ys), height - 48, 10)
    parts = frame(x, y, x_label, y_label)
    for c in found:
        places = [(x(a), y(b)) for a, b in c.points]
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        dots = "".join(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" class="dot c{c.index % NUM_COLOURS}"/>' for a, b in places
        )
        last = f"{c.label}: {c.points[-1][1]:.4g} at {c.points[-1][0]:g}"
        parts.append(
            titled(
                last,
                f'<polyline points="{joined}" {_look(c.index, c.faint)}/>',
                dots if len(places) <= 12 and not c.faint else "",
            )
        )
    return svg(width, height, parts, f"{y_label} over {x_label}")


def range_test(rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], chosen: float) -> str:
    """A learning-rate range test: losses faint, their smoothed curve bold, the chosen rate marked. Losses that are far
    above the first ones are drawn at the upper edge."""
    if not rates:
        return ""
    width, height = 570.0, 320.0
    low = min(*losses, *smoothed)
    high = min(max(*losses, *smoothed), smoothed[0] + 0.75 * (smoothed[0] - low) or low + 1)
    x = Axis(min(*rates, chosen), max(*rates, chosen), 58, width - 14, log=True)
    y = Axis(*span([low, max([high, *losses[:3]])]), height - 48, 10)
    parts = frame(x, y, "learning rate (logarithmic)", "training loss")
    for values, faint in ((losses, True), (smoothed, False)):
        places = [(x(a), y(min(b, y.high))) for a, b in zip(rates, values, strict=True)]
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(
            titled("smoothed" if not faint else "each step", f'<polyline points="{joined}" {_look(0, faint)}/>')
        )
    parts += _chosen(x, y, chosen, f"chosen: {chosen:.2e}")
    return svg(width, height, parts, "Loss over learning rate")


def way(points: Sequence[tuple[float, float]], chosen: float, x_label: str, y_label: str) -> str:
    """What each value of a setting gave, and the one that was chosen."""
    width, height = 570.0, 320.0
    xs, ys = ([p[i] for p in points] for i in (0, 1))
    x, y = Axis(min(*xs, chosen), max(*xs, chosen), 58, width - 14), Axis(*span(ys), height - 48, 10)
    places = [(x(a), y(b)) for a, b in points]
    joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    dots = [
        titled(f"{x_label} {a:g}: {b:.4g}", f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" class="dot c0"/>')
        for (a, b), (px, py) in zip(points, places, strict=True)
    ]
    drawn = [f'<polyline points="{joined}" {_look(0)}/>', *dots, *_chosen(x, y, chosen, f"chosen: {chosen:g}")]
    return svg(width, height, [*frame(x, y, x_label, y_label), *drawn], f"{y_label} over {x_label}")


def _chosen(x: Axis, y: Axis, value: float, shown: str) -> list[str]:
    side = "start" if x(value) < (x.start + x.end) / 2 else "end"
    mark = line(x(value), y.start, x(value), y.end, "error c1")
    label = text(x(value) + (6 if side == "start" else -6), y.end + 12, shown, side, "halo label c1")
    return [titled(shown, mark), label]


def legend(names: Sequence[tuple[str, int]]) -> str:
    """Names beside their line, as HTML."""
    items = []
    for name, index in names:
        sample = (
            f'<svg width="30" height="10" aria-hidden="true"><line x1="1" y1="5" x2="29" y2="5" {_look(index)}/></svg>'
        )
        items.append(f"<li>{sample} {escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


# --- confusion ------------------------------------------------------------------------------------------------


def confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Rows are true classes, columns predicted ones; the shade is the share of the row."""
    num = len(labels)
    cell = 34.0 if num <= 12 else max(12.0, 420.0 / num)
    room = min(120.0, 8 + max(text_width(cut(label, 16)) for label in labels))
    left, top = room + 24, room + 26
    # few classes leave less room than the headings beside them need
    heading = 1.2 * text_width("predicted class")
    width = left + max(num * cell, (num * cell + heading) / 2) + 6
    height = top + max(num * cell, 0.6 * heading) + 6
    parts = [text(left + num * cell / 2, 14, "predicted class", "middle", "name")]
    parts.append(
        text(0, 0, "true class", "middle", "name", f'transform="translate(13 {top + num * cell / 2:.1f}) rotate(-90)"')
    )
    size = "" if cell >= 14 else f'style="font-size:{cell * 0.8:.0f}px"'
    for i, label in enumerate(labels):
        middle = (i + 0.5) * cell
        parts.append(text(left - 6, top + middle + 4, cut(label, 16), "end", extra=size))
        parts.append(
            text(
                0,
                0,
                cut(label, 16),
                extra=f'{size} transform="translate({left + middle + 4:.1f} {top - 6:.1f}) rotate(-90)"',
            )
        )
        total = sum(counts[i])
        for j, count in enumerate(counts[i]):
            parts.append(
                _cell(left + j * cell, top + i * cell, cell, count, total, i == j, f"{label} taken for {labels[j]}")
            )
    return svg(width, height, parts, "Confusion matrix")


def _cell(x: float, y: float, size: float, count: int, total: int, right: bool, title: str) -> str:
    share = count / total if total else 0.0
    style = "right" if right else "wrong"
    shapes = [
        rectangle(x, y, size, size, "cell"),
        rectangle(x, y, size, size, style, f'fill-opacity="{share**0.7:.3f}"'),
    ]
    if count and size >= 24:
        strong = "on" if share > 0.45 else ""
        shown = str(count) if count < 10_000 else f"{count / 1000:.0f}k"
        shapes.append(text(x + size / 2, y + size / 2 + 4, shown, "middle", f"count {strong}"))
    return titled(f"{title}: {count} of {total} ({100 * share:.1f} %)", *shapes)
