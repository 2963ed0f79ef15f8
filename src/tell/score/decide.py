"""Whether an interval decides a limit, and how many test rows would."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tell.score.intervals import applies, newcombe, shares, wilson
from tell.score.scored import Metric

MOST_ROWS = 10_000_000
IntervalOf = Callable[[int], tuple[float, float]]
"""The interval that n rows would give if the estimate stays as it is."""


def decide(low: float, high: float, limit: float) -> bool | None:
    """True: the whole interval reaches the limit; False: all of it is below; None: the rows cannot tell."""
    if low >= limit:
        return True
    return False if high < limit else None


def rows_needed(interval: IntervalOf, limit: float) -> int | None:
    """The fewest rows whose interval decides the limit; None where not even `MOST_ROWS` do (a score at the limit)."""

    def enough(n: int) -> bool:
        return decide(*interval(n), limit) is not None

    if not enough(MOST_ROWS):
        return None
    low, high = 0, MOST_ROWS  # intervals shrink as n grows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def share_interval(value: float) -> IntervalOf:
    """Of a share of rows: Wilson's."""
    return lambda n: wilson(value * n, n)


def scaled_interval(value: float, low: float, high: float, n: int) -> IntervalOf:
    """Of any other estimate: its distance to both limits shrinks with the square root of the rows."""

    def interval(rows: int) -> tuple[float, float]:
        factor = math.sqrt(n / rows)
        return value - (value - low) * factor, value + (high - value) * factor

    return interval


def paired_interval(a: Metric, b: Metric, gap: dict) -> IntervalOf:
    """Of the difference ``gap`` of two metrics over the same rows: Newcombe's for shares."""
    if not shares(a, b):
        low, high = gap["ci"]
        return scaled_interval(gap["value"], low, high, gap["n"])
    keep = applies(a) & applies(b)
    left, right = (np.asarray(m.combine(m.stats[keep]), dtype=np.float64) for m in (a, b))
    both, only_a, only_b = (float(x.mean()) for x in (left * right, left * (1 - right), right * (1 - left)))
    return lambda n: newcombe(both * n, only_a * n, only_b * n, n)
