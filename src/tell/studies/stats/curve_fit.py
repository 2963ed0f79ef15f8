"""The shape of a learning curve: an S-curve in log tokens against a line, a power law and a constant.

With u = log10 of the amount x, the shapes are

    logistic   floor + (ceiling - floor) / (1 + exp(-slope (u - middle)))       4 numbers
    line       a + b u                                                          2
    power law  limit + a x^-b, b > 0                                            3
    constant   a                                                                1

An amount of 0 has no logarithm: it is left out of every fit, and the verdict says so. The threshold, where the curve
takes off, is where the tangent at the logistic's steepest point leaves its floor, 10^(middle - 2 / slope): the end of
the lag phase of growth curves (Zwietering et al. 1990, Applied and Environmental Microbiology 56, 1875-1881); there the
curve has covered 12 % of its rise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tell.metric_names import metric as metric_of
from tell.score.intervals import estimate_from, percentiles
from tell.studies.labels import rounded
from tell.studies.stats.curves import Curve
from tell.studies.study_folder import needs

LEAST = 4  # amounts above 0 below which no shapes are compared
RESAMPLES = 1000  # of the study's that are fitted
GRID = 41  # values tried for each nonlinear parameter
RIVALS = ("line", "power law", "constant")
NAMES = {"logistic": "S-curve", "line": "straight line in log amount", "power law": "power law", "constant": "constant"}


Limits = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """A family of curves, linear in two parameters (one for the constant) once the others are set.

    Attributes:
        numbers: of parameters in all.
        tried: the nonlinear parameters, in values to try, from the amounts.
        basis: from these (m, k) and u (n,), what the linear parameters multiply: (m, n, 1 or 2).
    """

    numbers: int
    tried: Callable[[np.ndarray], np.ndarray]
    basis: Callable[[np.ndarray, np.ndarray], np.ndarray]


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


def _ones(u: np.ndarray, m: int = 1) -> np.ndarray:
    return np.ones((m, len(u)))


def _logistic_tried(u: np.ndarray) -> np.ndarray:
    """(m, 2) of middle and slope: the middle within what was measured, the rise from 10 % to 90 % at least a third of
    the smallest step (a sharper one cannot be told from it) and at most four times the whole range."""
    rise = 2 * math.log(9)
    slopes = np.geomspace(rise / (4 * np.ptp(u)), rise / (np.diff(u).min() / 3), GRID)
    return np.array(list(itertools.product(np.linspace(u[0], u[-1], 2 * GRID), slopes)))


def _logistic_basis(tried: np.ndarray, u: np.ndarray) -> np.ndarray:
    part = 1 / (1 + np.exp(-np.clip(tried[:, 1:] * (u - tried[:, :1]), -60, 60)))
    return np.stack([1 - part, part], axis=-1)  # the linear parameters are floor and ceiling


def _power_basis(tried: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.stack([_ones(u, len(tried)), 10 ** (-tried * (u - u[0]))], axis=-1)


SHAPES = {
    "logistic": Shape(4, _logistic_tried, _logistic_basis),
    "line": Shape(2, lambda u: np.zeros((1, 0)), lambda t, u: np.stack([_ones(u), u[None]], axis=-1)),
    "power law": Shape(3, lambda u: np.geomspace(0.02, 5, 2 * GRID)[:, None], _power_basis),
    "constant": Shape(1, lambda u: np.zeros((1, 0)), lambda t, u: _ones(u)[..., None]),
}


@dataclass
class Fits:
    """The fits of one curve: ``facts`` is its entry in fits.json, ``mark`` what a figure shows."""

    facts: dict[str, Any] = field(default_factory=dict)
    mark: Mark | None = None


def fit_curve(curve: Curve, metric: str) -> Fits:
    """Fit every shape to a curve's means over seeds, and compare them by held-out error.

    The held-out error is the root mean square, over the amounts, of how far a shape fitted to all other amounts misses
    the mean there. Its interval, and that of every parameter, comes from fitting every resample of the study's
    bootstrap: they cover seeds and test rows, not the choice of amounts. A shape is compared where the amounts left
    are at least as many as its parameters.

    Args:
        metric: shares keep floor and ceiling between 0 and 1.

    Raises:
        TellError: scipy is not installed.
    """
    spec = metric_of(metric)
    keep = [i for i, x in enumerate(curve.x) if x > 0]
    x = np.array([curve.x[i] for i in keep], dtype=float)
    y, draws = curve.values[keep], curve.samples[:, keep]
    draws = draws[np.isfinite(draws).all(axis=1)][:RESAMPLES]
    facts: dict[str, Any] = {"amounts": x.tolist(), "left_out": [v for v in curve.x if v == 0]}
    facts["seeds"] = max(len(d.by_seed) for d in curve.draws)
    facts["points"] = [{"x": v, **d.summary()} for v, d in zip(curve.x, curve.draws, strict=True)]
    if len(x) < LEAST:
        few = f"{len(x)} amounts above 0 are too few for a curve to be fitted (at least {LEAST} are needed)."
        return Fits({**facts, "verdict": few})
    if len(draws) < 100:
        lost = f"Too few resamples have a value at each of the {len(x)} amounts for a curve to be fitted."
        return Fits({**facts, "verdict": lost})
    u = np.log10(x)
    limits = (0.0, 1.0) if spec.unit == "share" else (-np.inf, np.inf)
    errors = {name: held_out(shape, u, y[None], limits)[0] for name, shape in SHAPES.items() if shape.numbers < len(u)}
    spread = {name: held_out(SHAPES[name], u, draws, limits) for name in errors}
    facts["held_out_error"] = {n: estimate_from(errors[n], *percentiles(spread[n]), len(u)) for n in errors}
    if "logistic" not in errors:
        return Fits({**facts, "verdict": verdict(facts)})
    facts["against"] = {
        name: estimate_from(errors[name] - errors["logistic"], *percentiles(spread[name] - spread["logistic"]), len(u))
        for name in RIVALS
    }
    facts["logistic"], drawn = _logistic(u, y, draws, limits)
    rises = facts["logistic"]["ceiling"]["value"] > facts["logistic"]["floor"]["value"]
    facts["improves"] = bool(rises) == spec.higher_is_better
    facts["verdict"] = verdict(facts)
    moves = facts["against"]["constant"]["ci"][0] > 0  # a curve that may be level has no threshold
    threshold = facts["logistic"]["threshold"]
    known = moves and facts["improves"] and x[0] <= threshold["value"] <= x[-1]
    return Fits(facts, Mark(*drawn, (threshold["value"], *threshold["ci"]) if known else None) if moves else None)


def held_out(shape: Shape, u: np.ndarray, y: np.ndarray, limits: Limits) -> np.ndarray:
    """(b,) root mean square error at amounts left out one by one.

    Args:
        u: (n,) logarithms of the amounts, ascending.
        y: (b, n) curves.
        limits: what floor and ceiling may be.
    """
    misses = []
    for i in range(len(u)):
        rest = np.delete(np.arange(len(u)), i)
        tried, numbers = profile(shape, u[rest], y[:, rest], limits)
        basis = _at(shape, tried, u, rest)[:, i]
        misses.append(np.einsum("bk,bk->b", basis, numbers) - y[:, i])
    return np.sqrt(np.mean(np.square(misses), axis=0))


def _at(shape: Shape, tried: np.ndarray, u: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """(b, n, k) basis of each curve's own parameters at all amounts; a power law counts from the first of ``rest``."""
    return shape.basis(tried, np.concatenate([u[rest][:1], u]))[:, 1:]


def profile(shape: Shape, u: np.ndarray, y: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """The best of the values tried for the nonlinear parameters, and the linear ones by least squares.

    Args:
        u: (n,); y: (b, n) curves, fitted all at once.
        limits: of the logistic's linear parameters, floor and ceiling.

    Returns:
        (b, k) and (b, 1 or 2).
    """
    tried = shape.tried(u)
    basis = shape.basis(tried, u)
    inverse = np.linalg.pinv(basis, rcond=1e-8)  # (m, k, n)
    best = np.full(len(y), np.inf)
    chosen = np.zeros(len(y), dtype=int)
    numbers = np.zeros((len(y), basis.shape[-1]))
    for m in range(len(tried)):
        linear = y @ inverse[m].T
        if shape.numbers == 4:
            linear = np.clip(linear, *limits)
        loss = np.square(y - linear @ basis[m].T).sum(axis=1)
        better = loss < best - 1e-12
        best[better], chosen[better], numbers[better] = loss[better], m, linear[better]
    return tried[chosen], numbers


def _logistic(
    u: np.ndarray, y: np.ndarray, draws: np.ndarray, limits: Limits
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Floor, ceiling, slope and threshold with intervals: the best of the tried values, then scipy's least squares.

    Returns:
        The parameters, and the curve as (120,) amounts and values.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise needs("fits need scipy") from error
    shape = SHAPES["logistic"]
    start = np.concatenate([part[0] for part in profile(shape, u, y[None], limits)])
    tried = shape.tried(u)
    bounds = ([*tried.min(axis=0), *[limits[0]] * 2], [*tried.max(axis=0), *[limits[1]] * 2])

    def curve(p: np.ndarray, at: np.ndarray) -> np.ndarray:
        return _logistic_basis(p[None, :2], at)[0] @ p[2:]

    inside = np.clip(start, np.array(bounds[0]) + 1e-9, np.array(bounds[1]) - 1e-9)
    best = least_squares(lambda p: curve(p, u) - y, inside, bounds=bounds).x
    others, linear = profile(shape, u, draws, limits)
    parts = {
        "floor": (best[2], linear[:, 0]),
        "ceiling": (best[3], linear[:, 1]),
        "slope": (best[1], others[:, 1]),
        "middle": (10 ** best[0], 10 ** others[:, 0]),
        "threshold": (10 ** (best[0] - 2 / best[1]), 10 ** (others[:, 0] - 2 / others[:, 1])),
    }
    facts = {name: estimate_from(value, *percentiles(sample), len(u)) for name, (value, sample) in parts.items()}
    at = np.linspace(u[0], u[-1], 120)
    return facts, (10**at, curve(best, at))


def verdict(facts: dict[str, Any]) -> str:
    """Sentences on what the held-out errors show."""
    n = len(facts["amounts"])
    given = f"{n} amounts above 0" + ("; 0 itself has no logarithm and is left out" if facts["left_out"] else "")
    if "against" not in facts:
        return f"Too few amounts to tell an S-curve from simpler shapes: it has 4 numbers, so 5 are needed ({given})."
    ends = {NAMES[name]: gap["ci"] for name, gap in facts["against"].items()}
    beaten = [name for name, (low, _) in ends.items() if low > 0]
    ahead = [name for name, (low, high) in ends.items() if low <= 0 and high < 0]
    open_ = [name for name in ends if name not in (*beaten, *ahead)]
    parts = [f"S-curve favoured over {_and(beaten)} by held-out error"] if beaten else []
    parts += [f"{_and(ahead)} favoured over the S-curve by held-out error"] if ahead else []
    parts += [f"S-curve and {_and(open_)} not distinguishable"] if open_ else []
    text = f"{'; '.join(parts)} ({given})."
    if NAMES["constant"] in beaten:
        threshold, first = facts["logistic"]["threshold"], facts["amounts"][0]
        turn = "takes off" if facts["improves"] else "gets worse"
        sure = f"It {turn}" if NAMES["line"] in beaten else f"If it is an S-curve, it {turn}"
        between = " to ".join(rounded(end) for end in threshold["ci"])
        at = (
            f"{'at' if facts['improves'] else 'from'} {rounded(threshold['value'])}"
            if threshold["value"] >= first
            else "below the smallest amount measured"
        )
        text += f" {sure} {at} (95 % interval {between})."
    return text


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
