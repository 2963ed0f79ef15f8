"""Amounts (task tokens, task rows) that each arm needs for the same score, and their ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tell.metric_names import metric
from tell.number_text import show
from tell.report.svg import nice
from tell.studies.labels import arm_name, key_name, value_name
from tell.studies.stats.curves import Curve
from tell.studies.study_folder import needs

SAFE = 0.99  # share of resamples in which both arms reach a score that the mean factor is taken over
LEVELS = 9  # approximate number of scores to compare at


def efficiency(curves: Sequence[Curve], *, x: str, y: str, reference: str) -> dict[str, Any] | None:
    """Amounts for equal scores, and their factors against one arm.

    Each arm's means are made monotone (isotonic regression) and interpolated between the measured amounts linearly in
    the logarithm. A score that an arm has not reached at its largest amount is "not reached", and enters factors as
    infinity; one that it already has at its smallest counts as needing that amount. Both can happen in single
    resamples, so an interval may end in "not reached" (None).

    Args:
        curves: one for each arm, over ``x``, of one context.
        reference: the arm whose amount the others' are divided by.

    Returns:
        ``{"levels": [...], "arms": {arm: {"amounts", "ci", "not_reached"}}, "factors": {arm: {"by_level", "mean"}},
        "reference", "verdict"}``; None where the reference or every other arm has fewer than two amounts. ``mean`` is
        geometric, over the scores that both arms reach in at least 99 % of the resamples. A factor's end of 0 means
        that the reference does not reach the score.

    Raises:
        TellError: scipy is not installed.
    """
    usable = {c.arm: c for c in curves if c.numeric and not c.flat and sum(v > 0 for v in c.x) > 1}
    if reference not in usable or len(usable) < 2:
        return None
    sign = 1.0 if metric(y).higher_is_better else -1.0
    fitted = {arm: _monotone(c, sign) for arm, c in usable.items()}
    levels = _levels([means for _, means, _ in fitted.values()])
    needs = {
        arm: (_amounts(u, means[None], levels)[0], _amounts(u, draws, levels))
        for arm, (u, means, draws) in fitted.items()
    }
    arms = {
        arm: {
            "amounts": [_finite(10**v) for v in own],
            "ci": [_interval(draws[:, i]) for i in range(len(levels))],
            "not_reached": [round(float(np.isinf(draws[:, i]).mean()), 4) for i in range(len(levels))],
        }
        for arm, (own, draws) in needs.items()
    }
    factors = {arm: _factor(needs[arm], needs[reference], sign * levels) for arm in usable if arm != reference}
    result = {"levels": [float(sign * s) for s in levels], "arms": arms, "factors": factors, "reference": reference}
    return {**result, "verdict": _verdict(result, x, y, {arm: max(c.x) for arm, c in usable.items()})}


def _factor(own: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray], scores: np.ndarray) -> dict:
    """Amounts of one arm over those of the reference, each as logarithms (levels,) and (samples, levels)."""
    logs, sample = _minus(own[0], reference[0]), _minus(own[1], reference[1])
    both = np.isfinite(logs)
    safe = both & (np.isfinite(sample).mean(axis=0) >= SAFE)
    mean = None
    if safe.any():
        factor = _finite(10 ** logs[safe].mean())
        mean = {"scores": scores[safe].tolist(), "factor": factor, "ci": _interval(sample[:, safe].mean(axis=1))}
    by_level = [
        {"score": float(s), "factor": _finite(10 ** logs[i]) if both[i] else None, "ci": _interval(sample[:, i])}
        for i, s in enumerate(scores)
    ]
    return {"by_level": by_level, "mean": mean}


def _monotone(curve: Curve, sign: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of the amounts above 0 (n,), and the non-decreasing means (n,) and draws (samples, n) there."""
    try:
        from scipy.optimize import isotonic_regression  # on short rows 20 times as fast as scikit-learn's
    except ImportError as error:
        raise needs("token efficiency needs scipy") from error
    keep = [i for i, v in enumerate(curve.x) if v > 0]
    draws = sign * curve.samples[:, keep]
    steady = np.array([isotonic_regression(row).x if np.isfinite(row).all() else row for row in draws])
    means = isotonic_regression(sign * curve.values[keep]).x
    return np.log10([curve.x[i] for i in keep]), means, steady


def _levels(means: Sequence[np.ndarray]) -> np.ndarray:
    """Round scores between the best at any smallest amount and the best of all (all rows right is luck)."""
    low, high = max(m[0] for m in means), max(m[-1] for m in means)
    if high - low < 1e-9:
        return np.zeros(0)
    step = nice((high - low) / LEVELS)
    levels = np.round(np.arange(np.floor(low / step) + 1, np.ceil(high / step) + 1) * step, 12)
    return levels[(levels > low) & (levels < high)]


def _amounts(u: np.ndarray, y: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """(b, levels) log amounts at which curves (b, n) over u (n,) reach each score; infinity where they do not."""
    out = np.full((len(y), len(levels)), np.inf)
    for j, level in enumerate(levels):
        above = y >= level
        first = above.argmax(axis=1)
        before = np.maximum(first - 1, 0)
        rows = np.arange(len(y))
        rise = np.maximum(y[rows, first] - y[rows, before], 1e-12)
        share = np.where(first > 0, (level - y[rows, before]) / rise, 0.0)
        reached = above.any(axis=1)
        out[reached, j] = (u[before] + share * (u[first] - u[before]))[reached]
    return np.where(np.isnan(y).any(axis=1)[:, None], np.nan, out)


def _minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # neither reached: no factor
        return a - b


def _interval(logs: np.ndarray) -> list[float | None]:
    """95 % interval of 10**logs, where infinity (None) is a value like any other and NaN none."""
    known = np.sort(logs[~np.isnan(logs)])
    if not len(known):
        return [None, None]
    ends = known[[int(0.025 * (len(known) - 1)), int(np.ceil(0.975 * (len(known) - 1)))]]
    return [_finite(10 ** ends[0]), _finite(10 ** ends[1])]


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _verdict(result: dict[str, Any], x: str, y: str, largest: dict[str, float]) -> str:
    """The verdict in sentences; a factor whose interval contains 1 is not significant."""
    what, unit, label = key_name(x), metric(y).unit, metric(y).label.lower()
    own, reference = arm_name(result["reference"]), result["arms"][result["reference"]]
    if not result["levels"]:
        return f"No score of {label} is above every arm's at its smallest amount, so no amounts can be compared."
    parts = []
    for arm, factor in result["factors"].items():
        name, mean = arm_name(arm), factor["mean"]
        if mean is not None:
            low, high = mean["ci"]
            ends = f"{low:.2g} to " + (f"{high:.2g}" if high is not None else "not reached")
            told = ", not significantly different from 1" if low <= 1 and (high is None or high >= 1) else ""
            scores = " to ".join(show(mean["scores"][i], unit) for i in (0, -1))
            parts.append(
                f"{name} needs {mean['factor']:.2g} times the {what} that {own} needs for the same {label} "
                f"(95 % interval {ends}{told}; mean over scores from {scores})"
            )
        elif any(entry["factor"] is not None for entry in factor["by_level"]):
            parts.append(f"{name} reaches the same {label} in too few resamples for a factor")
        lost = [i for i, entry in enumerate(factor["by_level"]) if entry["factor"] is None]
        if lost:
            score, theirs = show(factor["by_level"][lost[0]]["score"], unit), reference["amounts"][lost[0]]
            end = f"{own} does at about {value_name(round(theirs))}" if theirs else f"nor does {own}"
            if result["arms"][arm]["amounts"][lost[0]] is None:
                parts.append(f"{name} does not reach {score} with {value_name(largest[arm])} {what}; {end}")
            else:
                parts.append(f"{own} does not reach {score}; {name} does")
    return ". ".join(f"{p[0].upper()}{p[1:]}" for p in parts) + "."
