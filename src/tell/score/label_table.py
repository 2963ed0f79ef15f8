"""Each label's precision and recall, which labels are taken for which, and the score of one answer to everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from tell.data.kind import Kind
from tell.score.intervals import difference, estimate
from tell.score.label import LabelScorer
from tell.score.multi_label import MultiLabelScorer
from tell.score.scored import Metric, Scorer
from tell.score.scorers import make_scorer

MOST_LABELS = 50  # listed in full, those with the most test rows
MOST_CONSTANTS = 10  # different answers, and numbers of labels, that are tried for everything
Pairs = tuple[Sequence[str], Sequence[str]]
"""Answers of an arm and their references."""
LabelSet = frozenset[int | str]


def label_scorer(kind: Kind) -> LabelScorer | MultiLabelScorer | None:
    """The scorer of a task with labels; None for other tasks."""
    made = make_scorer(kind.name, labels=kind.labels, form=kind.form) if kind.labels else None
    return made if isinstance(made, (LabelScorer, MultiLabelScorer)) else None


def label_numbers(scorer: LabelScorer | MultiLabelScorer, arms: Mapping[str, Pairs]) -> dict[str, Any]:
    """``labels`` of metrics.json: by arm, for each label that occurs, how often it is right.

    Args:
        arms: each arm's answers and references.

    Returns:
        ``{"shown", "occurring", "arms": {arm: [{"label", "precision", "recall", "f1", "support", "given"}]}}``, the
        same labels in the same order for each arm, at most `MOST_LABELS`. With one label a row also the confusion
        matrix's line: ``"answers"``, the shown labels that its rows were given; ``"others"``, how many were given
        other labels, and ``"none"``, none.
    """
    sets = {arm: (_sets(scorer, answers), _sets(scorer, references)) for arm, (answers, references) in arms.items()}
    support: Counter[int | str] = Counter()
    given: Counter[int | str] = Counter()
    for answers, references in sets.values():
        support.update(_counts(references))
        given.update(_counts(answers))
    occurring = [key for key in range(len(scorer.labels)) if support[key] + given[key]]
    shown = sorted(occurring, key=lambda key: (-support[key], -given[key], key))[:MOST_LABELS]
    confused = isinstance(scorer, LabelScorer)
    rows = {arm: _arm_rows(scorer.names, shown, pair, confused) for arm, pair in sets.items()}
    return {"shown": len(shown), "occurring": len(occurring), "arms": rows}


def _sets(scorer: LabelScorer | MultiLabelScorer, texts: Sequence[str]) -> list[LabelSet]:
    return [scorer.keys(text) for text in texts]


def _counts(sets: Iterable[LabelSet]) -> Counter[int | str]:
    return Counter(chain.from_iterable(sets))


def _arm_rows(
    names: Sequence[str], shown: Sequence[int], sets: tuple[list[LabelSet], list[LabelSet]], confused: bool
) -> list[dict[str, Any]]:
    answers, references = sets
    support, given = _counts(references), _counts(answers)
    right = _counts(a & r for a, r in zip(answers, references, strict=True))
    rows = []
    for key in shown:
        row: dict[str, Any] = {
            "label": names[key],
            "precision": _share(right[key], given[key]),
            "recall": _share(right[key], support[key]),
            "f1": _share(2 * right[key], given[key] + support[key]),
            "support": support[key],
            "given": given[key],
        }
        if confused:
            taken = _counts(a for a, r in zip(answers, references, strict=True) if key in r)
            row["answers"] = {names[k]: taken[k] for k in shown if taken[k]}
            row["none"] = sum(count for k, count in taken.items() if isinstance(k, str))
            row["others"] = taken.total() - row["none"] - sum(row["answers"].values())
        rows.append(row)
    return rows


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def baseline_numbers(
    kind: Kind,
    scorer: Scorer,
    arms: Mapping[str, Mapping[str, Metric]],
    references: Sequence[str],
    seed: int,
    samples: int,
) -> dict[str, Any]:
    """``baseline`` of metrics.json: the best score that one answer to every test row reaches.

    The answer is chosen by the test rows themselves, so that no other constant answer is better on them.

    Args:
        scorer: of the task.
        arms: each arm's metrics, to be compared with it.
        references: of the test rows.
        seed, samples: of the bootstrap.

    Returns:
        ``{"answer", "metric", "scores": {metric: estimate}, "differences": {arm: estimate}}``; differences in the
        primary metric, the arm minus the constant.
    """
    best, found = best_constant(kind, scorer, references)
    return {
        "answer": best,
        "metric": scorer.primary,
        "scores": {name: estimate(metric, seed=seed, samples=samples) for name, metric in found.items()},
        "differences": {
            arm: difference(metrics[scorer.primary], found[scorer.primary], seed=seed, samples=samples)
            for arm, metrics in arms.items()
            if scorer.primary in metrics
        },
    }


def best_constant(kind: Kind, scorer: Scorer, references: Sequence[str]) -> tuple[str, dict[str, Metric]]:
    """The answer that scores best where every row gets it, and its metrics."""
    best, found = "", dict[str, Metric]()
    for text in _constants(kind, references):
        scores = scorer.score([text] * len(references), references)
        if not found or scores[scorer.primary].value > found[scorer.primary].value:
            best, found = text, scores
    return best, found


def _constants(kind: Kind, references: Sequence[str]) -> list[str]:
    """Answers that may be the best to give always: frequent ones, and lists of the most frequent labels."""
    lists = [kind.labels_in(reference) for reference in references]
    whole = [found for found, _ in Counter(tuple(sorted(found)) for found in lists).most_common(MOST_CONSTANTS)]
    if kind.list_form is None:
        return [label for (label,) in whole]
    ranked = [label for label, _ in Counter(chain.from_iterable(lists)).most_common(MOST_CONSTANTS)]
    tried = dict.fromkeys([*whole, *(tuple(sorted(ranked[:count])) for count in range(1, len(ranked) + 1))])
    return [kind.list_form.join(labels) for labels in tried]
