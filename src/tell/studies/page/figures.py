"""Figures of a study, by matplotlib: curves with intervals, maps, gain against cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tell.metric_names import CHANGE, metric
from tell.names import ARMS
from tell.number_text import factor
from tell.report.palette import ARM_COLOURS, CYCLE, HAIR, INK, PAPER, SOFT
from tell.studies.labels import SFT, arm_name, key_name, point_name, rounded, value_name
from tell.studies.page.drawing import STYLES, TURNS, Axis, brief, drawing, label_left, legend
from tell.studies.results import frozen
from tell.studies.stats.curve_fit import Mark
from tell.studies.stats.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curves(
    panels: Sequence[tuple[str, Sequence[Curve]]],
    *,
    x: str,
    y: str,
    title: str,
    lines: str = "arm",
    marks: Sequence[Sequence[Mark]] = (),
) -> Figure:
    """A metric over a key: a line for each arm (or value of another key) with its interval as a band.

    Arms independent of the key are level lines. Where the key is not a number, points are side by side with their
    intervals as bars.

    Args:
        panels: (heading, its curves).
        marks: fits to draw, for each panel.
    """
    with drawing(len(panels), height=3.6) as (figure, every):
        scale = factor(metric(y).unit)
        values = list(dict.fromkeys(v for _, curves in panels for curve in curves for v in curve.x))
        axis = Axis(sorted(values) if all(isinstance(v, int | float) for v in values) else values)
        named = [_names(curves, lines) for _, curves in panels]
        flat = [name for names in named for name in names]
        looks = _looks([c for _, curves in panels for c in curves], flat, lines)
        order = list(looks)
        for i, ((heading, curves), axes) in enumerate(zip(panels, every, strict=True)):
            for curve, name in zip(curves, named[i], strict=True):
                if axis.numeric:
                    _line_and_band(axes, axis, curve, scale, looks[name])
                else:
                    offset = (order.index(name) - (len(order) - 1) / 2) * 0.72 / len(order)
                    _bars(axes, axis, curve, scale, looks[name], offset)
            for mark in marks[i] if i < len(marks) else ():
                _mark(axes, axis, mark, scale)
            axis.dress(axes, x)
            axes.set_title(heading)
            axes.grid(axis="y", color=HAIR, lw=0.7)
            axes.set_axisbelow(True)
            if metric(y).unit == "share":
                axes.set_ylim(-3, 103)
        label_left(every, metric(y).axis_label)
        legend(figure, every, title)
    return figure


def draw_maps(
    panels: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    x: tuple[str, list],
    y: tuple[str, list],
    value: str,
    title: str,
) -> Figure:
    """A metric over two keys: a coloured field for each pair of values, with the number and its interval in it.

    Args:
        panels: (heading, (ny, nx) values, (ny, nx, 2) intervals); NaN where nothing was measured.
        x, y: key and its values.
        value: the metric.
    """
    spec = metric(value)
    known = np.concatenate([v[np.isfinite(v)] for _, v, _ in panels])
    colours = "YlGnBu" if spec.higher_is_better else "OrRd"
    low, high = (0.0, 1.0) if spec.unit == "share" else (known.min(), known.max())
    if value.endswith(CHANGE):  # around 0, the untuned model
        high = max(0.01, np.abs(known).max())
        colours, low = "RdBu" if spec.higher_is_better else "RdBu_r", -high
    with drawing(len(panels), height=1.1 + 0.52 * len(y[1]), width=1.5 + 0.95 * len(x[1])) as (figure, every):
        for (heading, values, intervals), axes in zip(panels, every, strict=True):
            masked = np.ma.masked_invalid(values)
            image = axes.pcolormesh(masked, cmap=colours, vmin=low, vmax=high, lw=1.5, edgecolors=PAPER)
            for row, column in np.ndindex(values.shape):
                colour = image.to_rgba(values[row, column])[:3] if np.isfinite(values[row, column]) else None
                _field(
                    axes, (row, column), float(values[row, column]), intervals[row, column], colour, factor(spec.unit)
                )
            for (key, names), set_ticks in ((x, axes.set_xticks), (y, axes.set_yticks)):
                labels = [brief(v) if isinstance(v, int | float) else value_name(v, key) for v in names]
                set_ticks(np.arange(len(names)) + 0.5, labels)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(heading)
            axes.set_xlabel(key_name(x[0]).capitalize())
        label_left(every, key_name(y[0]).capitalize())
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _field(
    axes: Axes, at: tuple[int, int], value: float, ci: np.ndarray, colour: np.ndarray | None, scale: float
) -> None:
    """The number and interval of one field of a map, legible on its colour; a dash where nothing was measured."""
    row, column = at
    centred: dict[str, Any] = {"ha": "center", "va": "center"}
    if colour is None:
        axes.text(column + 0.5, row + 0.5, "–", color=SOFT, **centred)
        return
    dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), colour, strict=True)) < 0.55
    ink, decimals = "#fefefe" if dark else "#010101", 0 if scale == 100.0 else 2
    axes.text(column + 0.5, row + 0.62, _fixed(value * scale, decimals), color=ink, **centred)
    if np.isfinite(ci).all():
        text = " to ".join(_fixed(end, decimals) for end in ci * scale)
        axes.text(column + 0.5, row + 0.26, text, color=ink, fontsize=7, **centred)


def _fixed(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


def draw_front(panels: Sequence[tuple[str, Sequence[dict]]], *, gain: str, cost: str, title: str) -> Figure:
    """Gain against cost of every candidate, with intervals; those on the front are large, joined and numbered.

    Args:
        panels: (heading, candidates as `pareto.front` gives them).
    """
    most = max(sum(c["on_front"] for c in candidates) for _, candidates in panels)
    with drawing(len(panels), height=4.2 + 0.16 * most, width=5.2) as (figure, every):
        scale, across = factor(metric(gain).unit), factor(metric(cost).unit)
        for (heading, candidates), axes in zip(panels, every, strict=True):
            front = sorted((c for c in candidates if c["on_front"]), key=lambda c: c["cost"]["value"])
            for c in candidates:
                if not c["on_front"]:
                    _candidate(axes, c, (across, scale), None)
            spots = [(c["cost"]["value"] * across, c["gain"]["value"] * scale) for c in front]
            axes.step(*zip(*spots, strict=True), where="post", color=SOFT, lw=1, zorder=4)
            for n, (c, spot) in enumerate(zip(front, spots, strict=True), 1):
                _candidate(axes, c, (across, scale), n)
                axes.text(*spot, str(n), ha="center", va="center_baseline", fontsize=7, color="#fefefe", zorder=5.5 + n)
            axes.set_title(heading)
            axes.set_xlabel(metric(cost).axis_label)
            axes.grid(color=HAIR, lw=0.7)
            axes.set_axisbelow(True)
            if metric(gain).unit == "share":
                axes.set_ylim(-4, 104)
            names = [f"{n}  {c['name']}" for n, c in enumerate(front, 1)]
            axes.text(0, -0.17, "\n".join(names), transform=axes.transAxes, va="top", fontsize=8, color=INK)
        label_left(every, metric(gain).axis_label)
        legend(figure, every, title)
    return figure


def _candidate(axes: Axes, candidate: dict, scales: tuple[float, float], number: int | None) -> None:
    """One point with the bars of its intervals; a disc where it has a number on the front."""
    on, arm, name = number is not None, candidate["arm"], arm_name(candidate["arm"])
    if candidate["alone"]:
        arm, name = "sft", SFT
    colour = ARM_COLOURS.get(arm, CYCLE[0])
    cost, gain = candidate["cost"], candidate["gain"]
    (x, left, right), (y, low, high) = (
        np.array([side["value"], *side["ci"]]) * scale for side, scale in zip((cost, gain), scales, strict=True)
    )
    axes.errorbar(
        x,
        y,
        xerr=[[max(0.0, x - left)], [max(0.0, right - x)]],
        yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
        fmt="o" if on or arm not in ARMS else ARMS[arm].marker,
        ms=11 if on else 4.5,
        color=colour,
        mfc=colour if on else PAPER,
        mec=PAPER if on else colour,
        elinewidth=0.8,
        alpha=1.0 if on else 0.6,
        zorder=5 + number if number is not None else 2,
        label=name,
    )


def _names(curves: Sequence[Curve], lines: str) -> list[str]:
    """The legend's name for each curve of a panel: its arm or value, and other keys as far as they make it unique."""
    named = [(arm_name(c.arm), {k: v for k, v in c.rest.items() if k != lines}) for c in curves]
    if lines != "arm":
        several = len({c.arm for c in curves if lines in c.rest}) > 1
        values = [point_name({lines: c.rest[lines]}) if lines in c.rest else "" for c in curves]
        named = [
            (", ".join(filter(None, (arm if several or not name else "", name))), rest)
            for name, (arm, rest) in zip(values, named, strict=True)
        ]
    out = []
    for own, rest in named:
        alike = [r for o, r in named if o == own]
        telling = {k: v for k, v in rest.items() if any(frozen(r.get(k)) != frozen(v) for r in alike)}
        out.append(", ".join(filter(None, (own, point_name(telling)))))
    return out


def _looks(curves: Sequence[Curve], names: Sequence[str], lines: str) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash by name: an arm has its own colour; where lines are values of a key, values have
    colours, and arms markers and dashes."""
    arms = dict(zip(names, (c.arm for c in curves), strict=True))
    values = list(dict.fromkeys(frozen(c.rest[lines]) for c in curves if lines in c.rest))
    turns = [arm for arm in ("tell", *arms.values()) if arm in arms.values()]
    others = [arm for arm in dict.fromkeys(arms.values()) if arm not in ARMS]  # contrasts of hidden states
    looks: dict[str, dict[str, Any]] = {}
    for name, curve in zip(names, curves, strict=True):
        arm = curve.arm
        nth = [n for n, a in arms.items() if a == arm].index(name)
        look: dict[str, Any] = {"lw": 2.2, "zorder": 4} if arm == "tell" else {"lw": 1.5, "zorder": 3}
        if lines in curve.rest:
            around, place = divmod(values.index(frozen(curve.rest[lines])), len(CYCLE))
            look["color"] = CYCLE[place]  # more values than colours: change the marker when colours repeat
            look |= {
                "marker": TURNS[around % 7] if around or arm not in ARMS else ARMS[arm].marker,
                "ls": STYLES[turns.index(arm) % len(STYLES)],
            }
        else:
            look |= _own_look(arm, others)
            if nth:
                look |= {"marker": TURNS[nth % 7], "ls": STYLES[nth % len(STYLES)]}
        looks.setdefault(name, {**look, "label": name})
    return looks


def _own_look(name: str, others: Sequence[str]) -> dict[str, Any]:
    """Colour, marker and line style of an arm, or of one of the ``others``, in turn."""
    if (arm := ARMS.get(name)) is not None:
        return {
            "color": ARM_COLOURS[name],
            "marker": arm.marker,
            "ls": STYLES[0] if arm.dashes is None else (0, arm.dashes),
        }
    turn = others.index(name) % len(CYCLE)
    return {"color": CYCLE[turn], "marker": TURNS[turn], "ls": STYLES[0]}


def _line_and_band(axes: Axes, axis: Axis, curve: Curve, scale: float, look: dict[str, Any]) -> None:
    ends = np.array([d.summary()["ci"] for d in curve.draws], dtype=float) * scale
    values = curve.values * scale
    places = np.array([axis.at(v) for v in curve.x])
    if curve.flat:
        axes.axhline(values[0], **{k: v for k, v in look.items() if k != "marker"})
        axes.axhspan(*ends[0], color=look["color"], alpha=0.12, lw=0)
        return
    axes.plot(places, values, ms=5, mec=PAPER, mew=0.6, **look)
    axes.fill_between(places, ends[:, 0], ends[:, 1], color=look["color"], alpha=0.15, lw=0)
    if len(places) == 1:
        axes.vlines(places, ends[:, 0], ends[:, 1], color=look["color"])


def _bars(axes: Axes, axis: Axis, curve: Curve, scale: float, look: dict[str, Any], offset: float) -> None:
    ends = np.array([d.summary()["ci"] for d in curve.draws], dtype=float) * scale
    values = curve.values * scale
    places = np.array([axis.at(v) for v in curve.x]) + offset
    reach = np.abs(ends.T - values)
    axes.errorbar(
        places, values, yerr=reach, fmt=look["marker"], ms=6, color=look["color"], elinewidth=1.6, label=look["label"]
    )
    axes.set_xlim(-0.6, len(axis.values) - 0.4)


def _mark(axes: Axes, axis: Axis, mark: Mark, scale: float) -> None:
    axes.plot(
        [axis.at(v) for v in mark.x], mark.y * scale, color=INK, lw=1, ls=(0, (3, 2)), zorder=5, label="fitted S-curve"
    )
    if mark.threshold is None:
        return
    value, low, high = (axis.at(v) for v in mark.threshold)
    axes.axvspan(low, high, color=INK, alpha=0.06, lw=0)
    axes.axvline(value, color=INK, lw=0.9, ls=(0, (1, 2)), label=f"takes off at {rounded(mark.threshold[0])}")
