"""Metrics that are plain means over rows, and the check every scorer begins with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tell.errors import TellError
from tell.score.scored import Metric


def mean_metric(values: Sequence[float] | np.ndarray, *, binary: bool = False) -> Metric:
    """The mean of ``values`` (n,), where NaN marks rows that it does not apply to, with weight 0."""
    per_row = np.asarray(values, dtype=np.float64)
    applies = ~np.isnan(per_row)
    stats = np.stack([np.where(applies, per_row, 0.0), applies.astype(np.float64)], axis=-1)
    return Metric(stats, ratio, per_row, binary)


def ratio(sums: np.ndarray) -> np.ndarray:
    """``sums[..., 0] / sums[..., 1]``, NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(sums[..., 0], sums[..., 1])


def f1(sums: np.ndarray) -> np.ndarray:
    """F1 from (..., 3) counts of right, given and gold items; NaN where neither side has an item."""
    right, given, gold = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(2 * right / (given + gold))


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean F1 over labels from (..., 3 L) counts: right, then given, then gold of each of L labels that occur."""
    right, given, gold = np.split(sums, 3, axis=-1)
    each = f1(np.stack([right, given, gold], axis=-1))  # NaN for a label that neither side names
    occurs = given + gold > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(occurs, each, 0.0).sum(axis=-1) / occurs.sum(axis=-1))


def check_pairs(answers: Sequence[str], references: Sequence[str]) -> None:
    """Refuse lists that cannot be scored row against row.

    Raises:
        TellError: the lengths differ, or there is no row.
    """
    if len(answers) != len(references):
        raise TellError(
            f"{len(answers)} answers for {len(references)} references",
            where="scorer",
            remedy="Pass one answer for each reference.",
        )
    if not answers:
        raise TellError("no test row to score", where="scorer", remedy="Pass at least one test row.")
