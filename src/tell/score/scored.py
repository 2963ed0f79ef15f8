"""Metrics as scorers return them, with additive statistics per row, and the registry of scorers by kind of task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from tell.metric_names import FIELD, METRICS


@dataclass(frozen=True)
class Metric:
    """One metric over n test rows; any resample of the rows is a matrix product.

    Attributes:
        stats: (n, s) float64, additive statistics of each row (for a plain mean: value and 1).
        combine: maps summed statistics (..., s) to metric values (...), exactly also for corpus BLEU and macro-F1.
        per_row: (n,) float64, the value shown next to each answer; NaN where it does not apply.
        binary: every row is 0 or 1, so a Wilson interval applies to a single arm.
    """

    stats: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]
    per_row: np.ndarray
    binary: bool = False

    @property
    def value(self) -> float:
        return float(self.combine(self.stats.sum(axis=0)))


class Scorer(Protocol):
    """Scores answers of one kind of task. ``primary`` names the metric of the verdict (see `primary_of`)."""

    primary: str

    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        """Metric name to Metric, each over the same n rows."""
        ...

    def is_task_format(self, answer: str) -> bool | None:
        """Whether an answer to a general prompt has the task's form; None if the task has no distinct form."""
        ...


def primary_of(scorer: Scorer, arms: Iterable[Mapping[str, Metric]]) -> str:
    """The metric of the verdict: the scorer's own choice, or the first where the answers have none of that name."""
    names = [name for metrics in arms for name in metrics]
    return scorer.primary if scorer.primary in names or not names else names[0]


@dataclass(frozen=True)
class ScoredTask:
    """Arguments of a scorer, where given: a JSON Schema, labels and how they are listed, a BLEURT checkpoint."""

    schema: dict[str, Any] | None = None
    labels: tuple[str, ...] = ()
    bleurt: str | None = None
    form: str = ""


class ScorerClass(Protocol):
    """The class of a built-in scorer, as `scorer` registers it."""

    @classmethod
    def of(cls, task: ScoredTask) -> Scorer:
        """The scorer of a task."""
        ...


@dataclass(frozen=True)
class ScorerKind:
    """A registered scorer: its kind of task (detected by `tell.data.kind`), and the metrics that it may return."""

    name: str
    metrics: tuple[str, ...]
    made_by: ScorerClass


KINDS: dict[str, ScorerKind] = {}
S = TypeVar("S", bound=ScorerClass)


def scorer(name: str, *metrics: str) -> Callable[[type[S]], type[S]]:
    """Register a scorer class for the kind of task ``name``.

    Args:
        metrics: everything that it returns, names of `tell.metric_names.METRICS`; ``field:`` stands for one per field.

    Raises:
        ValueError: the kind is registered already, or a metric is not declared.
    """
    undeclared = [metric for metric in metrics if metric not in METRICS and metric != FIELD]
    if name in KINDS or undeclared:
        raise ValueError(
            f"scorer {name}: " + (f"undeclared metrics {undeclared}" if undeclared else "registered twice")
        )

    def register(made_by: type[S]) -> type[S]:
        KINDS[name] = ScorerKind(name, metrics, made_by)
        return made_by

    return register
