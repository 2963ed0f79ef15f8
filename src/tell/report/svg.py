"""Drawings as inline SVG. Positions are in per cent of the width, so that text keeps its size from phone to desktop.

Every value passes through ``Markup.format``, which escapes it. Colours are classes of the stylesheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from tell.number_text import has_interval, is_number, show_count
from tell.report.html_text import plain

SPREAD_COLUMNS = 400
"""Most columns drawn one by one; more are binned."""
BINS = 160
POINTS = 300
"""Most raw loss points drawn; more are averaged in equal groups of steps."""
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Scale:
    """A linear axis with its ticks; ``at`` gives per cent of the width, ``up`` of the height from the top."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)

    def up(self, value: float) -> float:
        return round(100 - self.at(value), 2)

    @classmethod
    def over(cls, values: Sequence[float], *, number: int = 4, hold: Sequence[float] = ()) -> Scale:
        """The axis with round ticks that covers the values and those to include."""
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


def element(name: str, *content: str, **attributes: object) -> Markup:
    """``<name key="value">content</name>``; in keys, ``_`` becomes ``-``, and ``class_`` becomes ``class``."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    shown = "".join(f' {escape(key)}="{escape(value)}"' for key, value in pairs)
    return Markup(f"<{name}{shown}>{Markup('').join(content)}</{name}>")  # not Markup.format: charts have many elements


def picture(kind: str, key: str, title: str, said: str, *content: Markup, height: int) -> Markup:
    """A drawing with a title and a description for screen readers; ``key`` is unique in the page."""
    labels = element("title", title, id=f"{key}-t"), element("desc", said, id=f"{key}-d")
    named = {"aria_labelledby": f"{key}-t {key}-d"}
    return element("svg", *labels, *content, class_=kind, role="img", height=height, **named)


def _text(label: str, place: float, y: object, **more: object) -> Markup:
    """A label of a horizontal axis; the first and the last stay inside."""
    anchor = "start" if place < 4 else "end" if place > 96 else "middle"
    return element("text", label, x=f"{place}%", y=y, text_anchor=anchor, **more)


def interval_strip(value: object, ci: object, scale: Scale, *, style: str = "", zero: float | None = None) -> Markup:
    """One row of a dot-and-interval plot. Hidden from screen readers: the cells next to it hold the numbers."""
    parts = []
    for tick in scale.ticks:
        kind = "zero" if zero is not None and abs(tick - zero) < 1e-12 else "grid"
        parts.append(element("line", class_=kind, x1=f"{scale.at(tick)}%", x2=f"{scale.at(tick)}%", y1=0, y2="100%"))
    if has_interval(ci):
        left, right = (f"{scale.at(limit)}%" for limit in ci)
        parts.append(element("line", class_="span", x1=left, x2=right, y1="50%", y2="50%"))
    if is_number(value):
        parts.append(element("circle", class_="dot", cx=f"{scale.at(value)}%", cy="50%", r=5))
    return element("svg", *parts, class_=f"strip {style}", aria_hidden="true", focusable="false")


def axis_strip(scale: Scale, label: Callable[[float], str]) -> Markup:
    """The axis under a column of interval strips."""
    ticks = scale.ticks if len(scale.ticks) <= 5 else scale.ticks[:: math.ceil(len(scale.ticks) / 5)]
    parts = [_text(label(tick), scale.at(tick), 14) for tick in ticks]
    return element("svg", *parts, class_="axis", aria_hidden="true", focusable="false")


def bar_strip(parts: Iterable[tuple[str, float]]) -> Markup:
    """A stacked bar of (class, share of the full width). Hidden from screen readers: the cells next to it hold the
    numbers."""
    bars, x = [], 0.0
    for name, share in parts:
        place = {"x": f"{100 * x:.3f}%", "width": f"{100 * share:.3f}%", "height": "100%"}
        bars.append(element("rect", class_=name, **place))
        x += share
    return element("svg", *bars, class_="bars", aria_hidden="true", focusable="false")


def histogram(counts: Sequence[int], last: float, limit: float, *, title: str, said: str, height: int = 140) -> Markup:
    """Counts of equal ranges from 0 to ``last``, and a line at ``limit`` where it is in the picture."""
    width, top = 100 / max(1, len(counts)), max(1, *counts)
    bars = [_rect((i + 0.06) * width, 100 - 100 * n / top, 0.88 * width, 100 * n / top) for i, n in enumerate(counts)]
    x = Scale.over([], number=5, hold=[0, max(1.0, last)])
    x = Scale(0, max(1.0, last), tuple(tick for tick in x.ticks if tick <= last))
    labels = [_text(f"{tick:,.0f}{'' if tick else ' tokens'}", x.at(tick), height - 4) for tick in x.ticks]
    line = []
    if limit <= last:
        at = f"{x.at(limit)}%"
        line = [element("line", class_="limit", x1=at, x2=at, y1=0, y2=height - 20)]
    drawn = _stretched(bars, height - 20, (100, 100))
    return picture("histogram", "lengths-figure", title, said, drawn, *line, *labels, height=height)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twelfth of the steps, at least 3; shorter at the ends."""
    half = max(1, len(values) // 24)
    total = np.concatenate([[0.0], np.cumsum(values)])
    left = np.maximum(np.arange(len(values)) - half, 0)
    right = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[right] - total[left]) / (right - left)


def loss_chart(series: Series, *, key: str, title: str, y: Scale, height: int = 190) -> Markup:
    """Loss over steps, a line per source: raw values as points, the smoothed value as a line.

    Args:
        series: source to (steps, losses), both of length n; values that are not finite are left out.
        key: unique in the page.
        y: the axis of losses, shared by charts that are to be compared.
    """
    last = max((step for steps, _ in series.values() for step in steps), default=1)
    x = Scale.over([], number=6, hold=[0, max(last, 1)])
    x = Scale(0, max(last, 1), tuple(t for t in x.ticks if t <= last and t == int(t)))
    marks, lines, said = [], [], []
    for tick in y.ticks:
        up = f"{y.up(tick)}%"
        marks.append(element("line", class_="grid", x1=0, x2="100%", y1=up, y2=up))
        marks.append(element("text", f"{tick:g}", x=-8, y=up, dy=4, text_anchor="end"))
    for tick in x.ticks:
        marks.append(_text(f"{'' if tick else 'step '}{tick:,.0f}", x.at(tick), "100%", dy=16))
    for source, (steps, losses) in series.items():
        points = np.array([(s, v) for s, v in zip(steps, losses, strict=True) if is_number(v)], dtype=float)
        if not len(points):
            continue
        if len(points) > POINTS:
            points = np.array([part.mean(axis=0) for part in np.array_split(points, POINTS)])
        name, many = series_class(source), len(points) > 3
        for step, loss in points:
            place = {"cx": f"{x.at(step)}%", "cy": f"{y.up(loss)}%", "r": 1.8 if many else 4}
            marks.append(element("circle", class_=f"raw {name}", **place))
        if many:
            line = zip(points[:, 0], smooth(points[:, 1]), strict=True)
            shape = " ".join(f"{x.at(step)},{y.up(loss)}" for step, loss in line)
            lines.append(element("polyline", class_=f"line {name}", points=shape))
        (begin, first), (_, final) = points[0], points[-1]
        said.append(f"{plain(source)}: {first:.2f} at step {begin:.0f}, {final:.2f} at the end.")
    stretched = _stretched(lines, "100%", (100, 100), overflow="visible")
    inner = element("svg", *marks, stretched, y=18, width="100%", height=height - 40, overflow="visible")
    return picture("chart", key, title, " ".join(said), inner, height=height)


def _stretched(parts: Iterable[Markup], height: object, box: tuple[int, int], **more: object) -> Markup:
    """A drawing in its own units, as wide as the page permits."""
    size = {"width": "100%", "height": height, "viewBox": f"0 0 {box[0]} {box[1]}", "preserveAspectRatio": "none"}
    return element("svg", *parts, **size, **more)


def series_class(source: str) -> str:
    """Stylesheet class of a source's marks."""
    return {"task": "s-task", "general": "s-general"}.get(source, "s-other")


def stream_figure(task: np.ndarray, step: np.ndarray) -> tuple[Markup, str]:
    """A drawing of where the task rows are in the training stream.

    Args:
        task: (n,) bool, True for a task row, in training order.
        step: (n,) int, optimiser step of each row.

    Returns:
        The drawing, and one sentence on how to read it. Up to 400 steps, each step is a column and each row a cell;
        beyond, a bar for each of up to 160 equal stretches of the stream, as high as its task rows.
    """
    n, first, last = len(task), int(step.min()), int(step.max())
    columns = last - first + 1
    starts = np.flatnonzero(np.concatenate([[True], step[1:] != step[:-1]]))
    sizes = np.diff([*starts, n])
    row = np.arange(n) - np.repeat(starts, sizes)
    deep = int(sizes.max())
    if columns <= SPREAD_COLUMNS and deep <= 64:
        cells = _step_cells(task, step - first, row, columns)
        if n < columns * deep:  # the last batch is not full
            blank = {"x": round(100 - 100 / columns, 3), "width": round(100 / columns, 3)}
            cells.insert(0, element("rect", class_="blank", y=sizes[-1], height=deep - sizes[-1], **blank))
        box, height = deep, min(160, max(48, deep * 9))
        how = f"A column is one step, a cell one row of its batch of {deep}; the coloured cells are task rows."
    else:
        bins = min(BINS, n)
        totals = [int(part.sum()) for part in np.array_split(task, bins)]
        top = max(1, *totals)
        cells = [
            _rect(i * 100 / bins, round(100 - 100 * t / top, 2), 88 / bins, round(100 * t / top, 2))
            for i, t in enumerate(totals)
            if t
        ]
        box, height = 100, 120
        how = f"A bar is a stretch of about {show_count(round(n / bins))} rows; the highest has {top} task rows."
    back = element("rect", class_="back", width=100, height=box)
    ends = [(0.0, first), (50.0, (first + last) // 2), (100.0, last)] if columns > 2 else [(0.0, first)]
    labels = [_text(f"{'' if x else 'step '}{at:,}", x, height + 16) for x, at in ends]
    said = f"{int(task.sum()):,} task rows among {n:,} rows in {columns:,} steps. {gaps(task)}"
    parts = _stretched([back, *cells], height, (100, box)), *labels
    title = "Where the task rows are in the training stream"
    return picture("stream", "stream", title, said, *parts, height=height + 22), how


def _step_cells(task: np.ndarray, column: np.ndarray, row: np.ndarray, columns: int) -> list[Markup]:
    """A cell for each task row; in many columns, one for each run of neighbours."""
    width, cells = 100 / columns, []
    for up in range(int(row.max()) + 1):
        places = np.sort(column[task & (row == up)])
        breaks = np.flatnonzero(np.diff(places) > 1) + 1 if columns > BINS else np.arange(1, len(places))
        for run in np.split(places, breaks):
            if len(run):
                cells.append(_rect((run[0] + 0.06) * width, up, (len(run) - 0.12) * width, 0.9))
    return cells


def _rect(x: float, y: float, width: float, height: float) -> Markup:
    return element("rect", x=round(float(x), 3), y=y, width=round(float(width), 3), height=height)


def gaps(task: np.ndarray) -> str:
    """One sentence on how evenly the task rows are spread; ``task`` is (n,) bool in training order."""
    places = np.flatnonzero(task)
    if not len(places):
        return "No task row is in the stream."
    if len(places) == len(task):
        return "Every row is a task row."
    longest = int(np.diff([-1, *places, len(task)]).max()) - 1
    return (
        f"One row in {len(task) / len(places):.1f} is a task row; "
        f"the longest stretch without one is {longest:,} row{'s' * (longest != 1)}."
    )


def outcome_figure(values: dict[str, np.ndarray], title: str) -> Markup:
    """A line per arm, a column per test row, as dark as the row's score; NaN stays empty.

    Args:
        values: arm to (n,) scores in [0, 1], the same rows in the same order.
    """
    bins, line = min(len(next(iter(values.values()))), SPREAD_COLUMNS), 34
    lines, said = [], []
    for i, (arm, scores) in enumerate(values.items()):
        cells = [element("rect", class_="back", width=100, height=1)]
        for j, mean in enumerate(map(_mean, np.array_split(scores, bins))):
            if mean:
                place = {"x": round(j * 100 / bins, 3), "width": round(86 / bins, 3)}
                cells.append(element("rect", **place, height=1, opacity=round(0.15 + 0.85 * mean, 2)))
        lines.append(element("text", plain(arm), x=0, y=line * i + 12))
        lines.append(_stretched(cells, 14, (100, 1), y=line * i + 17))
        mean = _mean(scores)
        said.append(f"{plain(arm)}: mean {'none' if mean is None else f'{mean:.3f}'}.")
    return picture("stream", "outcome", title, " ".join(said), *lines, height=line * len(values))


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
