"""Gain against cost: which points and arms no other beats in both, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tell.names import arm_order
from tell.studies.labels import SFT, arm_name, arm_point_name, canonical, metric_term
from tell.studies.results import Outcome, Study
from tell.studies.stats.results_table import merged
from tell.studies.stats.seed_means import Bootstrap

CHUNK = 200  # resamples compared at once


def front(
    study: Study, bootstrap: Bootstrap, *, gain: str, cost: str, within: dict[str, Any] | None = None
) -> list[dict]:
    """Every point and arm with its gain and cost, best gain first.

    Args:
        gain, cost: metrics; each counts in the direction in which it is better (higher for scores, lower for losses).
        within: only points with these values.

    Returns:
        ``{"name", "point", "arm", "alone", "gain", "cost", "on_front", "front_share"}`` each: ``alone`` is TELL without
        general rows, ``on_front`` by the means, ``front_share`` the part of the resamples in which it is on the front.
        A point is on it where no other is at least as good in both and better in one.
    """
    gain, cost = canonical(gain), canonical(cost)
    found = []
    for arm, points, group in merged(study):
        here = [p for p in points if all(p.get(k) == v for k, v in (within or {}).items())]
        sides = [bootstrap.of(group, metric) for metric in (gain, cost)]
        if here and all(sides):
            found.append((arm, here, group, *sides))
    if not found:
        return []
    signs = [1.0 if metric_term(gain).higher_is_better else -1.0, 1.0 if metric_term(cost).higher_is_better else -1.0]
    means = np.array([[[signs[0] * g.value, signs[1] * c.value] for *_, g, c in found]])
    draws = np.stack([np.stack([signs[0] * g.draws, signs[1] * c.draws], axis=-1) for *_, g, c in found], axis=1)
    draws = draws[np.isfinite(draws).all(axis=(1, 2))]
    on = undominated(means)[0]
    share = np.mean(
        np.concatenate([undominated(d) for d in np.array_split(draws, max(1, len(draws) // CHUNK))]), axis=0
    )
    varying = [key for key in study.keys if key not in (within or {})]
    same = [{k: p[0].get(k) for k in varying if len({str(q.get(k)) for q in p}) == 1} for _, p, *_ in found]
    entries = [
        {
            "name": arm_point_name(arm, same[i], alone=alone(arm, group)),
            "point": same[i],
            "arm": arm,
            "alone": alone(arm, group),
            "gain": g.summary(),
            "cost": c.summary(),
            "on_front": bool(on[i]),
            "front_share": round(float(share[i]), 4),
        }
        for i, (arm, _, group, g, c) in enumerate(found)
    ]
    return sorted(entries, key=lambda e: -signs[0] * e["gain"]["value"])


def alone(arm: str, group: Sequence[Outcome]) -> bool:
    """Whether these are TELL's arm without general rows, which is SFT."""
    return arm == "tell" and all(outcome.measured.alone for outcome in group)


def undominated(values: np.ndarray) -> np.ndarray:
    """(b, n) bool: which of n candidates are on the front.

    Args:
        values: (b, n, 2), more is better in both.
    """
    other, own = values[:, :, None], values[:, None]
    beats = (other >= own).all(axis=-1) & (other > own).any(axis=-1)
    return ~beats.any(axis=1)


def verdict(entries: Sequence[dict]) -> str:
    """Which arms stand on the front, in a sentence."""
    on = [e for e in entries if e["on_front"]]
    sure = [e for e in on if e["front_share"] >= 0.95]
    kinds = [SFT if e["alone"] else e["arm"] for e in on]
    arms = [f"{kinds.count(a)} of {arm_name(a)}" for a in arm_order(kinds)]
    text = f"{len(on)} of {len(entries)} are on the front ({', '.join(arms)})"
    return f"{text}; {len(sure)} of these in at least 95 % of resamples." if on else ""
