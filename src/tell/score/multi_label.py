"""Scores answers that list labels, in any order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tell.data.label_text import FORMS
from tell.score.label import LabelScorer, fold
from tell.score.means import check_pairs, f1, macro_f1, mean_metric
from tell.score.scored import Metric, ScoredTask, scorer


@scorer("labels", "sample_f1", "exact_set", "micro_f1", "macro_f1", "valid_labels")
class MultiLabelScorer:
    """F1 of sets of labels, over rows, over all labels given, and over labels.

    Order and repetitions do not matter; labels compare as `LabelScorer` compares them. Metrics, all in [0, 1]:
        sample_f1: mean over rows of F1 of the answer's set and the reference's; 1 where both are empty.
        exact_set: the two sets are equal. Binary.
        micro_f1: F1 of all labels of all rows together.
        macro_f1: unweighted mean of F1 over the known labels that occur in references or answers.
        valid_labels: the answer is a list, and each of its labels is a known one. Binary.
    As scikit-learn's ``f1_score(average=...)`` on indicator matrices, ``zero_division=1`` for samples.

    The verdict is about sample F1: each test row counts once, however many labels it has, and an answer with three of
    four labels right counts as nearly right. Under the exact set it counts as wrong, and micro F1 is the score of the
    rows with many labels.

    Raises:
        TellError: no label is left after normalisation.
    """

    primary = "sample_f1"

    @classmethod
    def of(cls, task: ScoredTask) -> MultiLabelScorer:
        return cls(task.labels, task.form)

    def __init__(self, labels: Sequence[str], form: str) -> None:
        self._one, self._form = LabelScorer(labels), FORMS[form]
        self.labels, self.names = self._one.labels, self._one.names

    def keys(self, text: str) -> frozenset[int | str]:
        """The labels of an answer: the indices of known ones, else their texts; its own text where it is no list."""
        found = self._form.split(text)
        return frozenset([fold(text)]) if found is None else frozenset().union(*map(self._one.keys, found))

    def is_task_format(self, answer: str) -> bool:
        """Whether the answer is a list of known labels, with at least one where the form has no empty list."""
        found = self.keys(answer)
        return all(isinstance(key, int) for key in found) and (bool(found) or not self._form.separator)

    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        """Metrics by name, each over the same n rows.

        A reference that is no list, or has labels that are not known, is matched by the same text alone.

        Raises:
            TellError: the lengths differ, or there is no row.
        """
        check_pairs(answers, references)
        pairs = [(self.keys(a), self.keys(r)) for a, r in zip(answers, references, strict=True)]
        right, given, gold = (
            np.array(column, dtype=np.float64)
            for column in zip(*((len(a & r), len(a), len(r)) for a, r in pairs), strict=True)
        )
        counts = np.stack([right, given, gold], axis=1)
        per_row = np.where(given + gold > 0, f1(counts), 1.0)
        nothing = np.full(len(pairs), np.nan)  # of a metric of the whole corpus
        by_label = np.concatenate(
            [self._hits([a & r for a, r in pairs]), *map(self._hits, zip(*pairs, strict=True))], 1
        )
        return {
            "sample_f1": mean_metric(per_row),
            "exact_set": mean_metric([a == r for a, r in pairs], binary=True),
            "micro_f1": Metric(counts, f1, nothing),
            "macro_f1": Metric(by_label, macro_f1, nothing),
            "valid_labels": mean_metric([self.is_task_format(answer) for answer in answers], binary=True),
        }

    def _hits(self, sets: Sequence[frozenset[int | str]]) -> np.ndarray:
        """(n, L) 1 where a row has a known label."""
        hits = np.zeros((len(sets), len(self.labels)))
        for row, found in enumerate(sets):
            hits[row, [key for key in found if isinstance(key, int)]] = 1
        return hits
