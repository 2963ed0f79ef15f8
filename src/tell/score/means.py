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
