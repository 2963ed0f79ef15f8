"""An arm's answers with its metrics over them, read back from a run folder, and the pairing of two of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tell.errors import TellError
from tell.files import read_json
from tell.metric_names import ANSWER_LOSS
from tell.report.read_run import Run, get, mapping
from tell.score.intervals import difference
from tell.score.means import mean_metric
from tell.score.scored import KINDS, Metric
from tell.score.scorers import make_scorer

Key = tuple[str, int]
"""A test row: its content hash, and how often that hash came before, which keeps equal rows apart."""
Rescore = Callable[[Sequence[dict]], Mapping[str, Metric]]


@dataclass(frozen=True)
class ArmRows:
    """The answers of one arm.

    Attributes:
        rows: of ``predictions/<arm>.jsonl``, by test row, in file order.
        metrics: name to Metric over these rows; those that cannot be had from them are left out.
    """

    rows: dict[Key, dict]
    metrics: dict[str, Metric]

    @cached_property
    def places(self) -> dict[Key, int]:
        """The index of each test row."""
        return {key: i for i, key in enumerate(self.rows)}

    def over(self, name: str, keys: Iterable[Key]) -> Metric:
        """A metric over some of the rows, in the order of ``keys``."""
        places = [self.places[key] for key in keys]
        metric = self.metrics[name]
        return Metric(metric.stats[places], metric.combine, metric.per_row[places], metric.binary)

    def shared(self, other: ArmRows) -> list[Key]:
        """The test rows that both have answered, in this one's order."""
        return [key for key in self.rows if key in other.rows]

    def minus(self, other: ArmRows, name: str, keys: Sequence[Key]) -> dict:
        """This arm's metric minus the other's over rows that both have: ``{"value", "ci", "n"}``, paired."""
        return difference(self.over(name, keys), other.over(name, keys), seed=0)


def keyed(rows: Iterable[dict]) -> dict[Key, dict]:
    """Answers by test row."""
    seen: Counter[str] = Counter()
    out = {}
    for i, row in enumerate(rows):
        name = str(row.get("hash", i))
        out[(name, seen[name])] = row
        seen[name] += 1
    return out


def arm_rows(run: Run, arm: str) -> ArmRows:
    """The answers of an arm of a run; without rows where it has none."""
    rows = run.predictions.get(arm, [])
    return ArmRows(keyed(rows), row_metrics(mapping(run.metrics, "arms", arm), rows, rescorer(run)))


def rescorer(run: Run, *, with_schema: bool = True) -> Rescore:
    """Scores answers as the run did, by its own kind of task; nothing where its scorer is the user's own.

    Args:
        with_schema: read the schema of a JSON task, whose answers are not scored without it.
    """
    kind = str(get(run.metrics, "task", "kind", default=""))

    def score(rows: Sequence[dict]) -> Mapping[str, Metric]:
        if not rows or kind not in KINDS or get(run.config, "task", "scorer") is not None:
            return {}
        labels = get(run.findings, "kind", "labels") or sorted({str(row["reference"]) for row in rows})
        form = get(run.findings, "kind", "form")
        try:
            schema = read_json(run.folder.schema, remedy="") if with_schema and run.folder.schema.is_file() else None
            scorer = make_scorer(kind, schema=schema, labels=labels, form=form)
        except TellError:  # a JSON task whose folder has no schema
            return {}
        return scorer.score([str(row["answer"]) for row in rows], [str(row["reference"]) for row in rows])

    return score


def row_metrics(entries: Mapping[str, object], rows: Sequence[dict], rescore: Rescore) -> dict[str, Metric]:
    """The metrics of an arm over its rows: means of the rows' own scores, else scored again.

    Args:
        entries: the arm's metrics in metrics.json; a metric is found where its value agrees with the entry's.
        rescore: scores the rows again, for metrics of the whole corpus, which are not means over rows.
    """
    found: dict[str, Metric] = {}
    again: Mapping[str, Metric] | None = None
    for name, entry in entries.items():
        value = get(entry, "value")
        if not isinstance(value, int | float):
            continue
        values = np.array([_score(row, name) for row in rows])
        known = values[np.isfinite(values)]
        metric = mean_metric(values, binary=bool(np.isin(known, (0.0, 1.0)).all())) if len(known) else None
        if (metric is None or not agrees(metric.value, value)) and rows and name != ANSWER_LOSS:
            again = rescore(rows) if again is None else again
            metric = again.get(name)
        if metric is not None and agrees(metric.value, value):
            found[name] = metric
    return found


def agrees(a: float, b: float) -> bool:
    """Whether two values are equal but for the rounding of metrics.json."""
    return bool(abs(a - b) <= 2e-5 * max(1.0, abs(b)))


def _score(row: dict, name: str) -> float:
    value = mapping(row, "scores").get(name)
    return float(value) if isinstance(value, int | float) else float("nan")
