"""The kinds of figure for recipes (``figures: [{kind: map, ...}]``). To add one, name it in
`tell.studies.recipe.Figure` and write a function here::

    @figure("mine")
    def mine(page: Contents, asked: Mapping[str, Any]) -> tuple[Figure, str] | None: ...  # and its title
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from tell.metric_names import metric
from tell.registry import Registry
from tell.studies import recipe
from tell.studies.labels import arm_name, key_name, point_name
from tell.studies.page.figures import draw_curves, draw_maps
from tell.studies.results import Study, as_drawn, frozen
from tell.studies.stats.analyses import Analyses, panels
from tell.studies.stats.curves import curves
from tell.studies.stats.results_table import Line
from tell.studies.stats.seed_means import Bootstrap, groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Contents:
    """The input of a page."""

    study: Study
    bootstrap: Bootstrap
    found: Analyses
    table: Sequence[Line]
    gaps: Sequence[Line]


Drawn = tuple["Figure", str]
Kind = Callable[[Contents, Mapping[str, Any]], Drawn | None]
figure = Registry[Kind]("figure kind")  # each returns a figure and its title, None where no cell has the metric


@figure("curves")
def curves_figure(page: Contents, asked: Mapping[str, Any]) -> Drawn | None:
    """A metric over a key."""
    x, by = asked["x"], asked.get("lines") or "arm"
    shown = as_drawn(page.study, asked["y"])
    drawn = [
        (heading, lines)
        for heading, within in panels(page.study, asked.get("panels"))
        if (lines := curves(page.study, page.bootstrap, x=x, y=shown, within=within))
    ]
    if not drawn:
        return None
    # A panel with only level lines has no finished cell yet.
    drawn = [entry for entry in drawn if not all(line.flat for line in entry[1])] or drawn
    marks = [[mark for line in lines if (mark := page.found.mark(line, x, shown)) is not None] for _, lines in drawn]
    title = f"{metric(shown).label} over {key_name(x)}"
    return draw_curves(drawn, x=x, y=shown, title=title, lines=by, marks=marks), title


@figure("map")
def map_figure(page: Contents, asked: Mapping[str, Any]) -> Drawn | None:
    """A metric of one arm over two keys; a panel for each value of every other key that varies."""
    x, y, shown = asked["x"], asked["y"], as_drawn(page.study, asked["value"])
    arm = asked.get("arm") or "tell"
    found = [g for g in groups(o for o in page.study.outcomes if o.arm == arm).values() if {x, y} <= g[0].point.keys()]
    axes = {key: sorted({g[0].point[key] for g in found}, key=lambda v: (v is None, v)) for key in (x, y)}
    shape = (len(axes[y]), len(axes[x]))
    drawn: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
    for group in found:
        point, draws = group[0].point, page.bootstrap.of(group, shown)
        if draws is None:
            continue
        context = {key: point.get(key) for key in page.study.keys if key not in (x, y)}
        empty = (point_name(context), np.full(shape, np.nan), np.full((*shape, 2), np.nan))
        _, values, intervals = drawn.setdefault(frozen(context), empty)
        at = axes[y].index(point[y]), axes[x].index(point[x])
        values[at], intervals[at] = draws.value, draws.summary()["ci"]
    if not drawn:
        return None
    title = f"{metric(shown).label}, {arm_name(arm)}"
    return draw_maps(list(drawn.values()), x=(x, axes[x]), y=(y, axes[y]), value=shown, title=title), title


if figure.keys() != set(get_args(recipe.Figure.model_fields["kind"].annotation)):
    raise ValueError("the kinds of figure are not those of a recipe")
