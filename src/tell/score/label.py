"""Scores answers that must be one of a few labels."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tell.errors import TellError
from tell.score.means import check_pairs, macro_f1, mean_metric
from tell.score.scored import Metric, ScoredTask, scorer

_TRAILING = " \t\r\n.,;:!?…。、，；：！？"


@scorer("label", "accuracy", "macro_f1", "valid_label")
class LabelScorer:
    """Accuracy and macro-F1 over known labels.

    Answers and labels compare without surrounding whitespace, case and trailing punctuation (which counts only if two
    labels differ by nothing else). Metrics, all in [0, 1]:
        accuracy: the answer is the reference's label. Binary.
        macro_f1: unweighted mean of F1 over the known labels that occur in references or answers, as
            scikit-learn's ``f1_score(average="macro", labels=known, zero_division=nan)``; an answer
            outside the labels is a miss for the reference's label and a false alarm for none.
        valid_label: the answer is one of the labels. Binary.

    Raises:
        TellError: no label is left after normalisation.
    """

    primary = "accuracy"

    @classmethod
    def of(cls, task: ScoredTask) -> LabelScorer:
        return cls(task.labels)

    def __init__(self, labels: Sequence[str]) -> None:
        exact: dict[str, str] = {}
        for label in labels:
            if folded := fold(label):
                exact.setdefault(folded, label)
        if not exact:
            raise TellError("no label is given", where="labels", remedy="Name at least one label.")
        self._exact = {folded: i for i, folded in enumerate(exact)}
        bare = Counter(folded.rstrip(_TRAILING) for folded in exact)
        self._bare = {
            stripped: i for folded, i in self._exact.items() if bare[stripped := folded.rstrip(_TRAILING)] == 1
        }
        self.labels, self.names = tuple(exact), tuple(exact.values())

    def index(self, text: str) -> int:
        """Index of the label that ``text`` is, or ``len(labels)`` for any other text."""
        folded = fold(text)
        if folded in self._exact:
            return self._exact[folded]
        stripped = folded.rstrip(_TRAILING)
        return self._bare.get(stripped, len(self.labels)) if stripped else len(self.labels)

    def keys(self, text: str) -> frozenset[int | str]:
        """The label of an answer: the index of a known one, else its text."""
        place = self.index(text)
        return frozenset([place if place < len(self.labels) else fold(text).rstrip(_TRAILING)])

    def is_task_format(self, answer: str) -> bool:
        """Whether the answer is one of the labels."""
        return self.index(answer) < len(self.labels)

    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        """Metrics by name, each over the same n rows.

        A reference outside the labels is matched by the same text after normalisation.

        Raises:
            TellError: the lengths differ, or there is no row.
        """
        check_pairs(answers, references)
        other = len(self.labels)
        given = np.array([self.index(text) for text in answers])
        gold = np.array([self.index(text) for text in references])
        same_text = [
            fold(a).rstrip(_TRAILING) == fold(r).rstrip(_TRAILING) for a, r in zip(answers, references, strict=True)
        ]
        right = np.where(gold == other, (given == other) & np.array(same_text), given == gold)
        return {
            "accuracy": mean_metric(right, binary=True),
            "macro_f1": Metric(self._counts(given, gold), macro_f1, np.full(len(answers), np.nan)),
            "valid_label": mean_metric(given < other, binary=True),
        }

    def _counts(self, given: np.ndarray, gold: np.ndarray) -> np.ndarray:
        """(n, 3 L): the confusion matrix's diagonal, row sums and column sums, all that F1 needs."""
        known = np.arange(len(self.labels))
        is_given, is_gold = given[:, None] == known, gold[:, None] == known
        return np.concatenate([is_given & is_gold, is_given, is_gold], axis=1).astype(np.float64)


def fold(text: str) -> str:
    """Text as labels are compared: composed, stripped, without case."""
    return unicodedata.normalize("NFC", text).strip().casefold()
