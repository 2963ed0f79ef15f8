"""Drawings as inline SVG. Places are per cent of the width, so text keeps its size from phone to desktop.

Every value that is not ours goes through ``Markup.format``, which escapes. Colours are classes of the stylesheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from tell.names import has_interval, is_number, show_count
from tell.report.html_text import plain

SPREAD_COLUMNS = 400
"""Most columns drawn one by one; more are binned."""
BINS = 160
POINTS = 300
"""Most raw loss points drawn; more are averaged in equal groups of steps."""


@dataclass(frozen=True)
class Scale:
    """A linear axis with its ticks; ``at`` gives per cent of the width."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)

    @classmethod
    def over(cls, values: Sequence[float], *, number: int = 4, hold: Sequence[float] = ()) -> Scale:
        """The axis with round ticks that covers the values and those to hold."""
        known = [float(v) for v in (*values, *hold) if is_number(v)] or [0.0, 1.0]
        low, high = min(known), max(known)
        if high - low < 1e-9 * max(1.0, abs(low), abs(high)):  # all one value
            around = 0.1 * abs(low) if abs(low) > 1e-6 else 0.5
            low, high = low - around, high + around
        step = nice((high - low) / number)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks)


def nice(step: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten at or above ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


SHARE = Scale(0.0, 1.0, (0.0, 0.5, 1.0))


def _anchor(place: float) -> str:
    return "start" if place < 4 else "end" if place > 96 else "middle"


def interval_strip(value: object, ci: object, scale: Scale, *, style: str = "", zero: float | None = None) -> Markup:
    """One row of a dot-and-interval plot. Hidden from screen readers: the cells beside it hold the numbers."""
    parts = [
        Markup('<line class="{}" x1="{}%" x2="{}%" y1="0" y2="100%"/>').format(
            "zero" if zero is not None and abs(t - zero) < 1e-12 else "grid", scale.at(t), scale.at(t)
        )
        for t in scale.ticks
    ]
    if has_interval(ci):
        left, right = scale.at(ci[0]), scale.at(ci[1])
        parts.append(Markup('<line class="span" x1="{}%" x2="{}%" y1="50%" y2="50%"/>').format(left, right))
    if is_number(value):
        parts.append(Markup('<circle class="dot" cx="{}%" cy="50%" r="5"/>').format(scale.at(float(value))))
    return Markup('<svg class="strip {}" aria-hidden="true" focusable="false">{}</svg>').format(
        style, Markup("").join(parts)
    )


def axis_strip(scale: Scale, label: Callable[[float], str]) -> Markup:
    """The axis under a column of interval strips."""
    ticks = scale.ticks if len(scale.ticks) <= 5 else tuple(scale.ticks[:: math.ceil(len(scale.ticks) / 5)])
    parts = [
        Markup('<text x="{}%" y="14" text-anchor="{}">{}</text>').format(scale.at(t), _anchor(scale.at(t)), label(t))
        for t in ticks
    ]
    return Markup('<svg class="axis" aria-hidden="true" focusable="false">{}</svg>').format(Markup("").join(parts))


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twelfth of the steps, at least 3; ends use what lies within."""
    half = max(1, len(values) // 24)
    total = np.concatenate([[0.0], np.cumsum(values)])
    left = np.maximum(np.arange(len(values)) - half, 0)
    right = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[right] - total[left]) / (right - left)


def loss_chart(
    series: dict[str, tuple[Sequence[float], Sequence[float]]], *, key: str, title: str, y: Scale, height: int = 190
) -> Markup:
    """Loss over steps, a line per source: raw values as points, the smoothed value as a line.

    Args:
        series: source to (steps, losses), both of length n; not finite values are left out.
        key: unique in the page, for the ids of title and description.
        y: the axis of losses, shared by charts that are to be compared.
    """
    every = [s for steps, _ in series.values() for s in steps]
    last = max(every, default=1)
    x = Scale.over([], number=6, hold=[0, max(last, 1)])
    x = Scale(0, max(last, 1), tuple(t for t in x.ticks if t <= last and t == int(t)))
    grid, marks, lines, says = [], [], [], []
    for t in y.ticks:
        up = round(100 - y.at(t), 2)
        grid.append(Markup('<line class="grid" x1="0" x2="100%" y1="{}%" y2="{}%"/>').format(up, up))
        grid.append(Markup('<text x="-8" y="{}%" dy="4" text-anchor="end">{:g}</text>').format(up, t))
    for t in x.ticks:
        place = x.at(t)
        grid.append(
            Markup('<text x="{}%" y="100%" dy="16" text-anchor="{}">{}{:,.0f}</text>').format(
                place, _anchor(place), "step " if t == 0 else "", t
            )
        )
    for source, (steps, losses) in series.items():
        pair = np.array([(s, v) for s, v in zip(steps, losses, strict=True) if is_number(v)], dtype=float)
        if not len(pair):
            continue
        if len(pair) > POINTS:
            pair = np.array([part.mean(axis=0) for part in np.array_split(pair, POINTS)])
        name = series_class(source)
        for step, loss in pair:
            marks.append(
                Markup('<circle class="raw {}" cx="{}%" cy="{}%" r="{}"/>').format(
                    name, x.at(step), round(100 - y.at(loss), 2), 1.8 if len(pair) > 3 else 4
                )
            )
        if len(pair) > 3:
            shape = " ".join(
                f"{x.at(s)},{round(100 - y.at(v), 2)}" for s, v in zip(pair[:, 0], smooth(pair[:, 1]), strict=True)
            )
            lines.append(Markup('<polyline class="line {}" points="{}"/>').format(name, shape))
        says.append(f"{plain(source)}: {pair[0, 1]:.2f} at step {pair[0, 0]:.0f}, {pair[-1, 1]:.2f} at the end.")
    return Markup(
        '<svg class="chart" role="img" height="{height}" aria-labelledby="{key}-t {key}-d">'
        '<title id="{key}-t">{title}</title><desc id="{key}-d">{desc}</desc>'
        '<svg y="18" width="100%" height="{inner}" overflow="visible">{grid}{marks}'
        '<svg width="100%" height="100%" viewBox="0 0 100 100" preserveAspectRatio="none" overflow="visible">{lines}'
        "</svg></svg></svg>"
    ).format(
        key=key,
        title=title,
        desc=" ".join(says),
        height=height,
        inner=height - 40,
        grid=Markup("").join(grid),
        marks=Markup("").join(marks),
        lines=Markup("").join(lines),
    )


def series_class(source: str) -> str:
    """Stylesheet class of a source's marks."""
    return {"task": "s-task", "general": "s-general"}.get(source, "s-other")


def stream_figure(task: np.ndarray, step: np.ndarray) -> tuple[Markup, str]:
    """Where the task rows fall in the training stream.

    Args:
        task: (n,) bool, True for a task row, in training order.
        step: (n,) int, optimiser step of each row.

    Returns:
        The drawing, and one sentence on how to read it. Up to 400 steps each step is a column and each row a
        cell; beyond, a bar for each of up to 160 equal stretches of the stream, as high as its task rows.
    """
    n, steps = len(task), step - step.min()
    columns = int(steps.max()) + 1
    new = np.concatenate([[True], steps[1:] != steps[:-1]])
    starts = np.flatnonzero(new)
    row = np.arange(n) - starts[np.cumsum(new) - 1]
    deep = int(row.max()) + 1
    first, last = int(step.min()), int(step.max())
    if columns <= SPREAD_COLUMNS and deep <= 64:
        width = 100 / columns
        cells = []
        for up in range(deep):
            places = np.sort(steps[task & (row == up)])
            for left, length in [(int(p), 1) for p in places] if columns <= BINS else _runs(places):
                cells.append(
                    Markup('<rect x="{}" y="{}" width="{}" height="0.9"/>').format(
                        round((left + 0.06) * width, 3), up, round((length - 0.12) * width, 3)
                    )
                )
        back = Markup('<rect class="back" width="100" height="{}"/>').format(deep)
        if len(starts) and n < columns * deep:  # the last batch is not full
            short = n - starts[-1]
            blank = (round((columns - 1) * width, 3), short, round(width, 3), deep - short)
            back += Markup('<rect class="blank" x="{}" y="{}" width="{}" height="{}"/>').format(*blank)
        inner, box, height = Markup("").join([back, *cells]), deep, min(160, max(48, deep * 9))
        how = f"A column is one step, a cell one row of its batch of {deep}; the coloured cells are task rows."
    else:
        bins = min(BINS, n)
        totals = np.array([part.sum() for part in np.array_split(task, bins)])
        top = max(1, int(totals.max()))
        bars = [
            Markup('<rect x="{}" y="{}" width="{}" height="{}"/>').format(
                round(i * 100 / bins, 3), round(100 - 100 * t / top, 2), round(88 / bins, 3), round(100 * t / top, 2)
            )
            for i, t in enumerate(totals)
            if t
        ]
        inner = Markup("").join([Markup('<rect class="back" width="100" height="100"/>'), *bars])
        box, height = 100, 120
        how = f"A bar is a stretch of about {show_count(round(n / bins))} rows; the highest holds {top} task rows."
    ends = [(0.0, first), (50.0, (first + last) // 2), (100.0, last)] if columns > 2 else [(0.0, first)]
    labels = [
        Markup('<text x="{}%" y="{}" text-anchor="{}">{}</text>').format(
            x, height + 16, _anchor(x), f"step {s:,}" if x == 0 else f"{s:,}"
        )
        for x, s in ends
    ]
    picture = Markup(
        '<svg class="stream" role="img" height="{total}" aria-labelledby="stream-t stream-d">'
        '<title id="stream-t">Where the task rows fall in the training stream</title>'
        '<desc id="stream-d">{desc}</desc>'
        '<svg width="100%" height="{height}" viewBox="0 0 100 {box}" preserveAspectRatio="none">{inner}</svg>{labels}'
        "</svg>"
    ).format(
        total=height + 22,
        desc=f"{int(task.sum()):,} task rows among {n:,} rows in {columns:,} steps. {gaps(task)}",
        height=height,
        box=box,
        inner=inner,
        labels=Markup("").join(labels),
    )
    return picture, how


def _runs(columns: np.ndarray) -> list[tuple[int, int]]:
    """Neighbouring columns as (first, length)."""
    if not len(columns):
        return []
    parts = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    return [(int(part[0]), len(part)) for part in parts]


def gaps(task: np.ndarray) -> str:
    """One sentence on how evenly the task rows lie; ``task`` is (n,) bool in training order."""
    places = np.flatnonzero(task)
    if not len(places):
        return "No task row is in the stream."
    if len(places) == len(task):
        return "Every row is a task row."
    between = np.diff(places) - 1
    edges = [int(places[0]), int(len(task) - 1 - places[-1])]
    longest = max([*edges, *(int(b) for b in between)])
    return (
        f"One row in {len(task) / len(places):.1f} is a task row; "
        f"the longest stretch without one is {longest:,} row{'s' * (longest != 1)}."
    )


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def outcome_figure(values: dict[str, np.ndarray], title: str) -> Markup:
    """A line per arm, a column per test row, as dark as the row's score; NaN stays empty.

    Args:
        values: arm to (n,) scores in [0, 1], the same rows in the same order.
    """
    bins = min(len(next(iter(values.values()))), SPREAD_COLUMNS)
    lines, line = [], 34
    for i, (arm, scores) in enumerate(values.items()):
        means = [_mean(part) for part in np.array_split(scores, bins)]
        cells = [
            Markup('<rect x="{}" width="{}" height="1" opacity="{}"/>').format(
                round(j * 100 / bins, 3), round(86 / bins, 3), round(0.15 + 0.85 * mean, 2)
            )
            for j, mean in enumerate(means)
            if mean
        ]
        lines.append(
            Markup(
                '<text x="0" y="{}">{}</text><svg y="{}" width="100%" height="14" viewBox="0 0 100 1" '
                'preserveAspectRatio="none"><rect class="back" width="100" height="1"/>{}</svg>'
            ).format(line * i + 12, plain(arm), line * i + 17, Markup("").join(cells))
        )
    means = {arm: _mean(scores) for arm, scores in values.items()}
    said = (f"{plain(arm)}: mean {'none' if mean is None else f'{mean:.3f}'}." for arm, mean in means.items())
    return Markup(
        '<svg class="stream" role="img" height="{}" aria-labelledby="outcome-t outcome-d">'
        '<title id="outcome-t">{}</title><desc id="outcome-d">{}</desc>{}</svg>'
    ).format(line * len(values), title, " ".join(said), Markup("").join(lines))
