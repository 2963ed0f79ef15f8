"""What every scorer returns: additive per-row statistics, so any resample is a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Metric:
    """One metric over n test rows.

    Attributes:
        stats: (n, s) float64, additive statistics of each row (for a plain mean: value and 1).
        combine: maps summed statistics (..., s) to metric values (...). Corpus BLEU, chrF++ and
            macro-F1 are as exact under it as plain means.
        binary: every row is 0 or 1, so a Wilson interval applies to a single arm.
        per_row: (n,) float64, the value shown next to each answer; NaN where it does not apply.
    """

    stats: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]
    per_row: np.ndarray
    binary: bool = False

    @property
    def value(self) -> float:
        return float(self.combine(self.stats.sum(axis=0)))


class Scorer(Protocol):
    """Scores answers of one kind of task. ``primary`` names the metric of the verdict."""

    name: str
    primary: str

    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        """Metric name to Metric, each over the same n rows."""
        ...

    def is_task_format(self, answer: str) -> bool | None:
        """Whether an answer to a general prompt has the task's form; None where the task has none to tell by."""
        ...
