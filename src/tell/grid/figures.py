"""Pictures of a study, by matplotlib: curves with intervals, maps, gain against cost. SVG and PNG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tell.errors import TellError
from tell.grid.curves import Curve
from tell.grid.results import CHANGE
from tell.grid.words import arm_name, axis_label, key_name, metric_term, point_name, value_name
from tell.run import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, HAIR, PAPER = "#1a1d1f", "#565e64", "#dcdfdf", "#ffffff"
# Okabe and Ito's colours, darkened or lightened to 3:1 against white and against the page's dark ground.
COLOURS = {
    "base": "#7d858a",
    "base+anchor": "#7d858a",
    "icl": "#94771c",
    "sft": "#d55e00",
    "sft-matched": "#c8609a",
    "general": "#009e73",
    "tell": "#1a7fc4",
    "tell-anchor": "#1a7fc4",
}
MARKERS = {"sft": "s", "sft-matched": "D", "general": "^", "tell": "o", "icl": "v", "base": "X", "base+anchor": "P"}
DASHES: dict[str, Any] = {"base": (0, (1.5, 2)), "base+anchor": (0, (4, 2)), "tell-anchor": (0, (4, 2))}
CYCLE = ("#1a7fc4", "#d55e00", "#009e73", "#c8609a", "#94771c", "#7d858a")
STYLES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
RULES = {
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "svg.fonttype": "path",  # looks the same everywhere
    "svg.hashsalt": "tell",
}


@dataclass(frozen=True)
class Mark:
    """A fitted curve to draw over a measured one.

    Attributes:
        x, y: (n,) points of the fit.
        threshold: where it takes off, as ``(value, low, high)``; None where that is not known.
    """

    x: np.ndarray
    y: np.ndarray
    threshold: tuple[float, float, float] | None


class Axis:
    """Places of a key's values on a horizontal axis: logarithmic with 0 set apart, linear, or one after the other."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)
        self.numeric = bool(values) and all(isinstance(v, int | float) for v in values)
        positive = sorted(v for v in values if self.numeric and v > 0)
        self.log = len(positive) > 1 and positive[-1] >= 4 * positive[0]
        self.zero: float | None = None
        if self.log and len(positive) < len(values):
            steps = np.diff(np.log10(positive))
            self.zero = math.log10(positive[0]) - max(0.35, float(np.median(steps)))

    def at(self, value: Any) -> float:
        if not self.numeric:
            return float(self.values.index(value))
        if not self.log:
            return float(value)
        return math.log10(value) if value > 0 else float(self.zero or 0.0)

    def dress(self, axes: Axes, key: str) -> None:
        """Ticks at the measured values, fewer where they would touch, and a break before 0."""
        places = [self.at(v) for v in self.values]
        room = (max(places) - min(places)) / 11 if len(places) > 1 else 0
        ticks: list[tuple[float, str]] = []
        for place, value in sorted(zip(places, self.values, strict=True)) if self.numeric else zip(places, self.values):  # noqa: B905
            if not self.numeric or not ticks or place - ticks[-1][0] >= room:
                ticks.append((place, brief(value) if self.numeric else value_name(value)))
        axes.set_xticks([t for t, _ in ticks], [label for _, label in ticks])
        axes.minorticks_off()
        axes.set_xlabel(key_name(key).capitalize())
        if self.zero is not None:
            first = min(self.at(v) for v in self.values if v > 0)
            middle = (self.zero + first) / 2
            for shift in (-0.02, 0.02):
                axes.plot(
                    [middle + shift - 0.02, middle + shift + 0.02],
                    [-0.018, 0.018],
                    transform=axes.get_xaxis_transform(),
                    color=SOFT,
                    lw=1,
                    clip_on=False,
                )


def brief(value: float) -> str:
    """1k, 30k, 1M: a tick of an axis."""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{sign}"
    return f"{value:g}"


def draw_curves(
    panels: Sequence[tuple[str, Sequence[Curve]]],
    *,
    x: str,
    y: str,
    title: str,
    lines: str = "arm",
    marks: Sequence[Sequence[Mark]] = (),
) -> Figure:
    """A metric over a key: a line an arm (or a value of another key), its interval as a band, a panel a value.

    Arms that the key has no effect on are level lines. Where the key is no number, points stand side by side with
    their intervals as bars.

    Args:
        panels: (heading, its curves).
        marks: fits to draw, for each panel.
    """
    with _drawing(len(panels), height=3.6) as (figure, every):
        scale = 100.0 if metric_term(y).unit == "share" else 1.0
        values = list(dict.fromkeys(v for _, curves in panels for curve in curves for v in curve.x))
        axis = Axis(sorted(values) if all(isinstance(v, int | float) for v in values) else values)
        names = list(dict.fromkeys(_line(curve, lines) for _, curves in panels for curve in curves))
        for i, ((heading, curves), axes) in enumerate(zip(panels, every, strict=True)):
            for curve in curves:
                name = _line(curve, lines)
                width = 0.72 / max(1, len(names))
                offset = (names.index(name) - (len(names) - 1) / 2) * width
                look = _look(curve, name, names, lines)
                if axis.numeric:
                    _line_and_band(axes, axis, curve, scale, look)
                else:
                    _bars(axes, axis, curve, scale, look, offset)
            for mark in marks[i] if i < len(marks) else ():
                _mark(axes, axis, mark, scale)
            axis.dress(axes, x)
            axes.set_title(heading)
            axes.grid(axis="y", color=HAIR, lw=0.7)
            axes.set_axisbelow(True)
            if scale == 100.0:
                axes.set_ylim(-3, 103)
        every[0].set_ylabel(axis_label(y))
        _legend(figure, every, title)
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
    what = metric_term(value)
    scale = 100.0 if what.unit == "share" else 1.0
    known = np.concatenate([v[np.isfinite(v)] for _, v, _ in panels])
    colours = "YlGnBu" if what.higher else "OrRd"
    low, high = (0.0, 1.0) if what.unit == "share" else (known.min(), known.max())
    if value.endswith(CHANGE):  # around 0, the untuned model
        high = max(0.01, np.abs(known).max())
        colours, low = "RdBu" if what.higher else "RdBu_r", -high
    with _drawing(len(panels), height=1.1 + 0.52 * len(y[1]), width=1.5 + 0.95 * len(x[1])) as (figure, every):
        for (heading, values, intervals), axes in zip(panels, every, strict=True):
            image = axes.pcolormesh(
                np.ma.masked_invalid(values),
                cmap=colours,
                vmin=low,
                vmax=high,
                lw=1.5,
                edgecolors=PAPER,
            )
            for row, column in np.ndindex(values.shape):
                number = values[row, column]
                if not np.isfinite(number):
                    axes.text(column + 0.5, row + 0.5, "–", ha="center", va="center", color=SOFT)
                    continue
                dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), image.to_rgba(number)[:3], strict=True)) < 0.55
                ends = intervals[row, column] * scale
                decimals = 0 if scale == 100.0 else 2
                ink = "#fefefe" if dark else "#010101"
                axes.text(
                    column + 0.5, row + 0.62, f"{number * scale:.{decimals}f}", ha="center", va="center", color=ink
                )
                if np.isfinite(ends).all():
                    text = f"{ends[0]:.{decimals}f} – {ends[1]:.{decimals}f}"
                    axes.text(column + 0.5, row + 0.26, text, ha="center", va="center", color=ink, fontsize=7)
            for (_, names), dress in ((x, axes.set_xticks), (y, axes.set_yticks)):
                labels = [brief(v) if isinstance(v, int | float) else value_name(v) for v in names]
                dress(np.arange(len(names)) + 0.5, labels)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(heading)
            axes.set_xlabel(key_name(x[0]).capitalize())
        every[0].set_ylabel(key_name(y[0]).capitalize())
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def draw_front(panels: Sequence[tuple[str, Sequence[dict]]], *, gain: str, cost: str, title: str) -> Figure:
    """Gain against cost of every candidate, with intervals; those on the front are filled, joined and named.

    Args:
        panels: (heading, candidates as `pareto.fronts` gives them).
    """
    with _drawing(len(panels), height=4.2, width=5.2) as (figure, every):
        scale = 100.0 if metric_term(gain).unit == "share" else 1.0
        for (heading, candidates), axes in zip(panels, every, strict=True):
            front = sorted((c for c in candidates if c["on_front"]), key=lambda c: c["cost"]["value"])
            if front:
                steps = [(c["cost"]["value"], c["gain"]["value"] * scale) for c in front]
                axes.step(*zip(*steps, strict=True), where="post", color=SOFT, lw=1, zorder=1)
            for c in candidates:
                colour, at = COLOURS.get(c["arm"], CYCLE[0]), (c["cost"]["value"], c["gain"]["value"] * scale)
                bars = [
                    [[abs(v - e)] for e, v in zip(c[k]["ci"], [c[k]["value"]] * 2, strict=True)]
                    for k in ("cost", "gain")
                ]
                axes.errorbar(
                    *at,
                    xerr=bars[0],
                    yerr=[[e[0] * scale] for e in bars[1]],
                    fmt=MARKERS.get(c["arm"], "o"),
                    ms=6 if c["on_front"] else 4.5,
                    color=colour,
                    mfc=colour if c["on_front"] else PAPER,
                    elinewidth=0.8,
                    alpha=1.0 if c["on_front"] else 0.6,
                    zorder=3 if c["on_front"] else 2,
                    label=arm_name(c["arm"]),
                )
            axes.set_title(heading)
            axes.set_xlabel(axis_label(cost))
            axes.grid(color=HAIR, lw=0.7)
            axes.set_axisbelow(True)
            if scale == 100.0:
                axes.set_ylim(-3, 103)
            _name_points(axes, front, scale)
        every[0].set_ylabel(axis_label(gain))
        _legend(figure, every, title)
    return figure


def save(figure: Figure, stem: Path) -> None:
    """Write ``<stem>.svg`` and ``<stem>.png``, each whole or not at all, and the same for the same numbers."""
    import matplotlib

    with matplotlib.rc_context(RULES):
        for kind in ("svg", "png"):
            with atomic_path(stem.with_name(f"{stem.name}.{kind}")) as path:
                figure.savefig(path, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)


@contextmanager
def _drawing(panels: int, *, height: float, width: float = 4.6) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with panels side by side that share their vertical axis; drawn without pyplot and its global state.

    Raises:
        TellError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TellError(
            "figures need matplotlib", where="tell study", remedy='Install it: pip install "tell-llm[study]".'
        ) from error
    with matplotlib.rc_context(RULES):
        figure = Figure(figsize=(max(6.4, width * panels), height + 0.7), layout="constrained")
        every = list(figure.subplots(1, max(1, panels), sharey=True, squeeze=False)[0])
        yield figure, every


def _line(curve: Curve, lines: str) -> str:
    """The name of a curve in the legend: its arm or value, and what else tells it apart."""
    rest = {k: v for k, v in curve.rest.items() if k != lines}
    if lines == "arm":
        return ", ".join(filter(None, (arm_name(curve.arm), point_name(rest))))
    own = point_name({lines: curve.rest[lines]}) if lines in curve.rest else arm_name(curve.arm)
    return ", ".join(filter(None, (own, point_name(rest))))


def _look(curve: Curve, name: str, names: Sequence[str], lines: str) -> dict[str, Any]:
    if lines == "arm":
        same = [n for n in names if n.startswith(arm_name(curve.arm))]
        style = DASHES.get(curve.arm) or STYLES[same.index(name) % len(STYLES)]
        return {
            "color": COLOURS.get(curve.arm, CYCLE[0]),
            "marker": MARKERS.get(curve.arm, "o"),
            "ls": style,
            "lw": 2.2 if curve.arm == "tell" else 1.5,
            "label": name,
            "zorder": 4 if curve.arm == "tell" else 3,
        }
    at = names.index(name)
    look = {"color": CYCLE[at % len(CYCLE)], "marker": "osD^vXP"[at % 7], "ls": STYLES[at // len(CYCLE) % len(STYLES)]}
    return {**look, "lw": 1.6, "label": name, "zorder": 3}


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
    axes.axvline(value, color=INK, lw=0.9, ls=(0, (1, 2)), label=f"takes off at {mark.threshold[0]:,.0f}")


def _legend(figure: Figure, every: Sequence[Axes], title: str) -> None:
    """One legend for all panels, below them; the title above."""
    entries: dict[str, Any] = {}
    for axes in every:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower left",
            ncols=3 if figure.get_figwidth() < 8 else 4,
            frameon=False,
            fontsize=9,
            handlelength=2.6,
        )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")


def _name_points(axes: Axes, front: Sequence[dict], scale: float) -> None:
    """Names beside the points of a front, unless a name before it stands too near."""
    taken: list[tuple[float, float]] = []
    axes.figure.canvas.draw()
    for c in front:
        spot = axes.transData.transform((c["cost"]["value"], c["gain"]["value"] * scale))
        if any(abs(spot[0] - a) < 90 and abs(spot[1] - b) < 13 for a, b in taken):
            continue
        taken.append(tuple(spot))
        axes.annotate(
            c["name"],
            (c["cost"]["value"], c["gain"]["value"] * scale),
            (6, -11),
            textcoords="offset points",
            fontsize=8,
        )
