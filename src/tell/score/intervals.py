"""95 % intervals for one arm's metric and for the paired difference of two arms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from tell.score.scored import Metric

Z = NormalDist().inv_cdf(0.975)
_CHUNK = 4_000_000  # weights in memory at once; 32 MB as float64


def estimate(metric: Metric, *, seed: int, samples: int = 2000) -> dict:
    """Value and 95 % interval of one metric: ``{"value", "ci": [low, high], "n"}``.

    Rows of zeros and ones get Wilson's score interval, which is valid even if all rows agree; others the percentile
    bootstrap over rows. Rows that do not apply (NaN) are left out of n; if none is left, value and limits are None.

    Args:
        seed: of the resampling; equal seeds draw equal rows for equal n.
        samples: bootstrap resamples.
    """
    keep = applies(metric)
    stats, n = metric.stats[keep], int(keep.sum())
    if n == 0:
        return estimate_from(math.nan, math.nan, math.nan, 0)
    value = float(metric.combine(stats.sum(axis=0)))
    if _zeros_and_ones(metric, keep):
        low, high = wilson(round(value * n), n)
    else:
        draws = [metric.combine(weights @ stats) for weights in resamples(n, seed, samples)]
        low, high = percentiles(np.concatenate(draws))
    return estimate_from(value, low, high, n)


def difference(a: Metric, b: Metric, *, seed: int, samples: int = 2000) -> dict:
    """``a`` minus ``b`` over the same rows: ``{"value", "ci": [low, high], "n"}``.

    Paired percentile bootstrap: each resample takes the same rows of both. If both are zeros and ones, Newcombe's
    interval for paired proportions (`newcombe_paired`), because the bootstrap is far too narrow near its zero width (no
    discordant pair, or nothing else): with 30 rows and true shares of 97 % and 93 % it covers the truth in 83 % of
    simulated cases, Newcombe's interval in 98 % (tests/score).

    Raises:
        ValueError: the two are not over the same number of rows.
    """
    if len(a.stats) != len(b.stats):
        raise ValueError(f"metrics over {len(a.stats)} and {len(b.stats)} rows cannot be paired")
    keep = applies(a) & applies(b)
    n = int(keep.sum())
    if n == 0:
        return estimate_from(math.nan, math.nan, math.nan, 0)
    left, right = a.stats[keep], b.stats[keep]
    value = float(a.combine(left.sum(axis=0))) - float(b.combine(right.sum(axis=0)))
    if shares(a, b):
        low, high = newcombe_paired(_rows(a, keep), _rows(b, keep))
    else:
        draws = [a.combine(weights @ left) - b.combine(weights @ right) for weights in resamples(n, seed, samples)]
        low, high = percentiles(np.concatenate(draws))
    return estimate_from(value, low, high, n)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a proportion (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212)."""
    p = successes / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half  # exact at the ends, despite rounding
    high = 1.0 if successes == n else centre + half
    return low, high


def is_gain(before: int, after: int, n: int) -> bool:
    """Whether ``after`` instead of ``before`` right rows of n is seen to be a gain, if no row is lost.

    That is: whether the interval of `newcombe_paired` excludes 0. Where rows are lost too, more have to be won.
    """
    return newcombe_paired(np.arange(n) < after, np.arange(n) < before)[0] > 0


def newcombe_paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """95 % interval for mean(a) - mean(b) of paired zeros and ones, both (n,).

    Method 10 of Newcombe 1998, Statistics in Medicine 17, 2635-2650: the Wilson limits of both shares, squared and
    added, with the pairs' correlation phi (continuity corrected).
    """
    both, only_a, only_b = int((a * b).sum()), int((a * (1 - b)).sum()), int((b * (1 - a)).sum())
    return newcombe(both, only_a, only_b, len(a))


def newcombe(both: float, only_a: float, only_b: float, n: int) -> tuple[float, float]:
    """`newcombe_paired` from counts of pairs, whole or expected: both are 1, only the first, only the second, of n."""
    neither = n - both - only_a - only_b
    sum_a, sum_b = both + only_a, both + only_b
    product = both * neither - only_a * only_b
    corrected = product if product < 0 else max(product - n / 2, 0.0)
    spread = sum_a * (n - sum_a) * sum_b * (n - sum_b)
    phi = corrected / math.sqrt(spread) if spread else 0.0
    p_a, p_b = sum_a / n, sum_b / n
    (low_a, high_a), (low_b, high_b) = wilson(sum_a, n), wilson(sum_b, n)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    gap = p_a - p_b
    return gap - reach(p_a - low_a, high_b - p_b), gap + reach(high_a - p_a, p_b - low_b)


def applies(metric: Metric) -> np.ndarray:
    """(n,) bool: the row counts. A metric of the corpus alone has NaN per row, but statistics."""
    stats = np.asarray(metric.stats, dtype=np.float64)
    empty = np.isnan(metric.per_row) & (stats == 0).all(axis=1)
    return np.isfinite(stats).all(axis=1) & ~empty


def _rows(metric: Metric, keep: np.ndarray) -> np.ndarray:
    return np.asarray(metric.combine(metric.stats[keep]), dtype=np.float64)


def _zeros_and_ones(metric: Metric, keep: np.ndarray) -> bool:
    """Binary by nature, or a plain mean whose rows happen to be 0 or 1 (an untuned model's field accuracy)."""
    plain_mean = metric.stats.shape[1] == 2 and bool((metric.stats[keep, 1] == 1).all())
    return (metric.binary or plain_mean) and bool(np.isin(_rows(metric, keep), (0.0, 1.0)).all())


def shares(a: Metric, b: Metric) -> bool:
    """Whether both are means of 0 and 1 over the rows that they share, so that `difference` is Newcombe's."""
    keep = applies(a) & applies(b)
    return _zeros_and_ones(a, keep) and _zeros_and_ones(b, keep)


def resamples(n: int, seed: int, samples: int) -> Iterator[np.ndarray]:
    """Multinomial weights, (chunk, n) float64 at a time: how often each resample drew each row."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values (samples,); NaN (a macro-F1 without any label, say) is left out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def estimate_from(value: float, low: float, high: float, n: int) -> dict:
    """``{"value", "ci": [low, high], "n"}`` as metrics.json has it: six decimals, None for NaN."""
    return {"value": _rounded(value), "ci": [_rounded(low), _rounded(high)], "n": n}


def _rounded(number: float) -> float | None:
    """Rounded to six decimals; None for NaN, which JSON lacks; no minus zero."""
    return round(number, 6) + 0.0 if math.isfinite(number) else None
