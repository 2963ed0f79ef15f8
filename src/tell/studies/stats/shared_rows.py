"""Per-row measurements on rows other than test rows: losses on general text, benchmark questions.

The rows let arms of several runs be paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.metric_names import CHANGE
from tell.run.benchmarks.run_benchmarks import benchmark_metrics, kept_answers
from tell.score.means import mean_metric
from tell.score.scored import Metric


@dataclass(frozen=True)
class SharedRows:
    """A metric over the rows of one set, or its change.

    Attributes:
        source: name of the set; equal hashes of one set are one row.
        hashes: (n,) content hashes.
        metric: over these rows.
    """

    source: str
    hashes: np.ndarray
    metric: Metric


def read_general_rows(folder: RunFolder, weights: str) -> dict[str, SharedRows]:
    """Losses, in nats a token, of a run's weights (``base`` or an arm's), by set of general text; empty where it
    kept no rows."""
    path = folder.general_losses(weights)
    by_set: dict[str, list[dict]] = {}
    for row in read_jsonl(path) if path.is_file() else []:
        by_set.setdefault(row["set"], []).append(row)
    return {
        name: SharedRows(name, np.array([r["hash"] for r in rows]), mean_metric([float(r["loss"]) for r in rows]))
        for name, rows in by_set.items()
    }


def read_questions(folder: RunFolder, arm: str, groups: Mapping[str, Sequence[str]]) -> dict[str, SharedRows]:
    """Benchmark questions that an arm of a run answered, by the names of their metrics in metrics.json.

    Args:
        groups: tasks of each benchmark; those without answers are left out.
    """
    tasks = dict.fromkeys(task for group in groups.values() for task in group)
    answers = {task: kept_answers(folder, arm, task) for task in tasks}
    whole = {name: tuple(group) for name, group in groups.items() if all(answers[task] for task in group)}
    hashes = {task: [f"{task} {row['question']} {row['hash']}" for row in rows] for task, rows in answers.items()}
    found = {}
    for name, metric in benchmark_metrics(whole, answers).items():
        stem = name.split()[0]  # "openbookqa acc_norm" is of openbookqa
        asked = [key for task in whole.get(stem, (stem,)) for key in hashes[task]]
        found[name] = SharedRows("benchmarks", np.array(asked), metric)
    return found


def levels_and_changes(own: SharedRows | None, base: SharedRows | None) -> dict[str, SharedRows]:
    """The rows as they are and, where the untuned model was measured on the same ones, as changes."""
    if own is None:
        return {}
    found = {"": own}
    if base is not None and np.array_equal(own.hashes, base.hashes):
        found[CHANGE] = SharedRows(own.source, own.hashes, _minus(own.metric, base.metric))
    return found


def _minus(a: Metric, b: Metric) -> Metric:
    width = a.stats.shape[1]

    def combine(sums: np.ndarray) -> np.ndarray:
        return a.combine(sums[..., :width]) - b.combine(sums[..., width:])

    return Metric(np.hstack([a.stats, b.stats]), combine, a.per_row - b.per_row)
