"""Colours, axes, legend and files shared by a study's figures. Uses no pyplot, which has global state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tell.files import atomic_path
from tell.report.palette import INK, PAPER, SOFT
from tell.studies.labels import key_name, value_name
from tell.studies.study_folder import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
TURNS = "osD^vXP"
RULES: dict[Any, Any] = {
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
    "text.parse_math": False,  # a dollar sign in an anchor or name is literal
    "svg.fonttype": "path",  # the same font everywhere
    "svg.hashsalt": "tell",
}


class Axis:
    """Positions of a key's values on a horizontal axis: logarithmic with 0 set apart, linear, or one after the other.

    Args:
        values: ascending where they are numbers.
    """

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
        """Set ticks at the measured values, without a label where two would touch, and a break after 0."""
        places = [self.at(v) for v in self.values]
        room = (max(places) - min(places)) / 11
        labels, last = [], -math.inf
        for place, value in zip(places, self.values, strict=True):
            labelled = not self.numeric or place - last >= room
            labels.append((brief(value) if self.numeric else value_name(value, key)) if labelled else "")
            last = place if labelled else last
        axes.set_xticks(places, labels)
        if self.numeric:
            edge = 0.05 * (max(places) - min(places)) or 0.5
            axes.set_xlim(min(places) - edge, max(places) + edge)
        axes.minorticks_off()
        axes.set_xlabel(key_name(key).capitalize())
        if self.zero is not None:
            first = min(self.at(v) for v in self.values if v > 0)
            middle = (self.zero + first) / 2
            for shift in (-0.02, 0.02):
                ends = [middle + shift - 0.02, middle + shift + 0.02]
                look: dict[str, Any] = {"color": SOFT, "lw": 1, "clip_on": False}
                axes.plot(ends, [-0.018, 0.018], transform=axes.get_xaxis_transform(), **look)


def brief(value: float) -> str:
    """1k, 30k, 1M: a tick of an axis."""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{sign}"
    return f"{value:g}"


@contextmanager
def drawing(panels: int, *, height: float, width: float = 4.6) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with panels that share their vertical axis, at most three side by side.

    Raises:
        TellError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise needs("figures need matplotlib") from error
    with matplotlib.rc_context(RULES):
        rows = max(1, math.ceil(panels / 3))
        across = max(1, math.ceil(panels / rows))
        figure = Figure(figsize=(max(6.4, width * across), height * rows + 0.3), layout="constrained")
        every = list(figure.subplots(rows, across, sharey=True, squeeze=False).flat)
        for axes in every[max(1, panels) :]:
            axes.remove()
        yield figure, every[: max(1, panels)]


def label_left(every: Sequence[Axes], text: str) -> None:
    """Label the vertical axis once in each row of panels."""
    for axes in every:
        spec = axes.get_subplotspec()
        if spec is not None and spec.is_first_col():
            axes.set_ylabel(text)


def legend(figure: Figure, every: Sequence[Axes], title: str) -> None:
    """One legend for all panels, below them; the title above."""
    entries: dict[str, Any] = {}
    for axes in every:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        inches = 0.65 + 0.078 * max(map(len, entries))  # of one column: the sample line and 9 point text
        columns = max(1, int(figure.get_figwidth() / inches))
        figure.set_figheight(figure.get_figheight() + 0.15 + 0.19 * math.ceil(len(entries) / columns))
        look: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 2.6}
        figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=columns, **look)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")


def save(figure: Figure, stem: Path) -> None:
    """Write ``<stem>.svg`` and ``<stem>.png`` atomically; the same numbers give the same files."""
    import matplotlib

    with matplotlib.rc_context(RULES):
        for kind in ("svg", "png"):
            with atomic_path(stem.with_name(f"{stem.name}.{kind}")) as path:
                figure.savefig(path, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
