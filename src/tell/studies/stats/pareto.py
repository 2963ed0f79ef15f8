"""Gain against cost: points and arms that no other beats in both, and how certain that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tell.metric_names import metric
from tell.names import arm_order
from tell.studies.labels import SFT, arm_name, arm_point_name
from tell.studies.results import Outcome, Study
from tell.studies.stats.results_table import merged
from tell.studies.stats.seed_means import Bootstrap

CHUNK = 200  # resamples compared at once


def front(
    study: Study, bootstrap: Bootstrap, *, gain: str, cost: str, within: Mapping[str, object] | None = None
) -> list[dict[str, Any]]:
    """Every point and arm with its gain and cost, best gain first.

    Args:
        gain, cost: metrics; each counts in the direction in which it is better (higher for scores, lower for losses).
        within: only points with these values.

    Returns:
        ``{"name", "point", "arm", "alone", "gain", "cost", "on_front", "front_share"}`` each: ``alone`` is TELL without
        general rows, ``on_front`` by the means, ``front_share`` the share of resamples in which it is on the front.
        A point is on it where no other is at least as good in both and better in one.
    """
    within = within or {}
    found = []
    for arm, points, group in merged(study):
        here = [p for p in points if all(p.get(k) == v for k, v in within.items())]
        gains, costs = (bootstrap.of(group, name) for name in (gain, cost))
        if here and gains and costs:
            same = {
                k: here[0].get(k) for k in study.keys if k not in within and len({str(q.get(k)) for q in here}) == 1
            }
            found.append((arm, same, alone(arm, group), gains, costs))
    if not found:
        return []
    signs = np.array([1.0 if metric(name).higher_is_better else -1.0 for name in (gain, cost)])
    means = np.array([[(g.value, c.value) for *_, g, c in found]]) * signs
    draws = np.stack([np.stack([g.draws, c.draws], axis=-1) for *_, g, c in found], axis=1) * signs
    draws = draws[np.isfinite(draws).all(axis=(1, 2))]
    on = undominated(means)[0]
    parts = np.array_split(draws, max(1, len(draws) // CHUNK))
    share = np.mean(np.concatenate([undominated(part) for part in parts]), axis=0)
    entries = [
        {
            "name": arm_point_name(arm, same, alone=sft),
            "point": same,
            "arm": arm,
            "alone": sft,
            "gain": g.summary(),
            "cost": c.summary(),
            "on_front": bool(on[i]),
            "front_share": round(float(share[i]), 4),
        }
        for i, (arm, same, sft, g, c) in enumerate(found)
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
    beats = np.logical_and((other >= own).all(axis=-1), (other > own).any(axis=-1))
    return np.logical_not(beats.any(axis=1))


def verdict(entries: Sequence[dict[str, Any]]) -> str:
    """Which arms are on the front, in a sentence."""
    on = [e for e in entries if e["on_front"]]
    sure = [e for e in on if e["front_share"] >= 0.95]
    kinds = [SFT if e["alone"] else e["arm"] for e in on]
    arms = [f"{kinds.count(a)} of {arm_name(a)}" for a in arm_order(kinds)]
    text = f"{len(on)} of {len(entries)} are on the front ({', '.join(arms)})"
    return f"{text}; {len(sure)} of these in at least 95 % of resamples." if on else ""
