"""Scores of a study as curves: over one key of the grid, for each arm and each value of the other keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tell.names import arm_order
from tell.number_text import is_number
from tell.studies.results import Outcome, Study, frozen
from tell.studies.stats.seed_means import Bootstrap, Draws


@dataclass(frozen=True)
class Curve:
    """One arm over one key of the grid.

    Attributes:
        rest: the other keys that vary, and their values here; without those that have no effect on the arm, and
            texts that come with the curve's own key.
        x: values of the key, ascending where they are numbers.
        draws: the metric at each.
        groups: the outcomes at each, one a seed.
        flat: the arm does not depend on the key: it is the same cells everywhere.
    """

    arm: str
    rest: dict[str, Any]
    x: list[Any]
    draws: list[Draws]
    groups: list[list[Outcome]]
    flat: bool

    @property
    def values(self) -> np.ndarray:
        """(n,) means over seeds."""
        return np.array([d.value for d in self.draws])

    @property
    def samples(self) -> np.ndarray:
        """(samples, n) of the bootstrap."""
        return np.stack([d.draws for d in self.draws], axis=1)

    @property
    def numeric(self) -> bool:
        return all(is_number(v) for v in self.x)


def curves(
    study: Study,
    bootstrap: Bootstrap,
    *,
    x: str,
    y: str,
    arms: Sequence[str] | None = None,
    within: Mapping[str, object] | None = None,
) -> list[Curve]:
    """Every curve of a metric over a key.

    Args:
        x: a key of the grid.
        y: a metric; points that do not have it are left out.
        arms: default: all.
        within: only points with these values.
    """
    found: list[Curve] = []
    chosen = [o for o in study.outcomes if (arms is None or o.arm in arms) and x in o.point and o.has(within or {})]
    others = [key for key in study.keys if key != x and not _comes_with(study, x, key)]
    for arm in arm_order(o.arm for o in chosen):
        mine, idle = [o for o in chosen if o.arm == arm], _without_effect(study, arm)
        own = [key for key in others if key not in idle]
        for context in _ordered([{k: o.point.get(k) for k in own} for o in mine]):
            # Keys without effect lead to one cell several times.
            once = {(frozen(o.point[x]), o.cell): o for o in mine if o.has(context)}
            curve = _curve(arm, context, list(once.values()), bootstrap, x, y)
            if curve is not None:
                found.append(curve)
    return found


def _without_effect(study: Study, arm: str) -> set[str]:
    """Keys that take several values in one cell of the arm, and never alone lead to different cells."""
    found = set()
    for key in study.keys:
        values, cells = defaultdict(set), defaultdict(set)
        for o in study.outcomes:
            if o.arm == arm:
                values[o.cell].add(frozen(o.point.get(key)))
                cells[frozen([o.seed, {k: v for k, v in o.point.items() if k != key}])].add(o.cell)
        if any(len(v) > 1 for v in values.values()) and all(len(c) == 1 for c in cells.values()):
            found.add(key)
    return found


def _comes_with(study: Study, x: str, key: str) -> bool:
    """Whether a text has one value at each value of another text, ``x``: data sets come with their own anchors."""
    points = [row["point"] for row in study.rows if x in row["point"]]
    found: dict[str, set[str]] = defaultdict(set)
    for point in points:
        found[frozen(point[x])].add(frozen(point.get(key)))
    texts = all(isinstance(point.get(k), str) for point in points for k in (x, key))
    return texts and len(found) > 1 and all(len(values) == 1 for values in found.values())


def _curve(
    arm: str, context: dict[str, Any], outcomes: Sequence[Outcome], bootstrap: Bootstrap, x: str, y: str
) -> Curve | None:
    at, draws, groups = [], [], []
    for value in (p["x"] for p in _ordered([{"x": o.point[x]} for o in outcomes])):
        group = [o for o in outcomes if frozen(o.point[x]) == frozen(value)]
        if (found := bootstrap.of(group, y)) is not None:
            at.append(value)
            draws.append(found)
            groups.append(group)
    if not at:
        return None
    most = max(range(len(at)), key=lambda i: len(groups[i]))
    cells = {o.cell for o in groups[most]}
    flat = len(at) > 1 and all({o.cell for o in group} <= cells for group in groups)
    if flat:  # a point with fewer seeds shares numbers with the others
        draws, groups = [draws[most]] * len(at), [groups[most]] * len(at)
    return Curve(arm, context, at, draws, groups, flat)


def _ordered(mappings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each mapping once, ascending in values that are numbers, otherwise as they came."""
    found = list({frozen(m): m for m in mappings}.values())
    numeric = [key for key in found[0] if all(is_number(m[key]) for m in found)] if found else []
    return sorted(found, key=lambda m: [m[key] for key in numeric])
