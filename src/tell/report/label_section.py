"""The section about labels: how often each is right, and which are taken for which."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tell.number_text import is_number
from tell.report.read_run import get, mapping, rows_of
from tell.report.score_tables import Cell
from tell.score.label_table import MOST_LABELS

HEAT = 8  # steps of shading
NAMED = 8  # labels up to which columns of the confusion matrix have their names; more have numbers
OTHERS, NONE = "another label", "no label"


@dataclass(frozen=True)
class LabelLine:
    """One label, as in ``labels`` of metrics.json."""

    label: str
    precision: Cell
    recall: Cell
    f1: Cell
    support: object
    given: object


@dataclass(frozen=True)
class Shaded:
    """A count of the confusion matrix, with the classes that shade it."""

    count: int
    shade: str


@dataclass(frozen=True)
class LabelTables:
    """One arm's labels.

    Attributes:
        hidden: labels that occur and are not listed.
        columns: answers of the confusion matrix; empty where rows have several labels.
        matrix: for each label of the references, counts of the columns.
        numbered: columns of labels are headed by their number alone.
    """

    arm: str
    lines: list[LabelLine]
    hidden: int
    columns: list[str] = field(default_factory=list)
    matrix: list[tuple[str, list[Shaded]]] = field(default_factory=list)
    numbered: bool = False


def label_tables(metrics: dict[str, Any]) -> LabelTables | None:
    """The labels of `tell`, or of the first arm where it was not scored."""
    arms = mapping(metrics, "labels", "arms")
    arm = "tell" if "tell" in arms else next(iter(arms), "")
    rows = [row for row in rows_of(arms, arm) if isinstance(row, dict) and "label" in row][:MOST_LABELS]
    if not rows:
        return None
    lines = [
        LabelLine(
            str(row["label"]),
            Cell(row.get("precision"), unit="share"),
            Cell(row.get("recall"), unit="share"),
            Cell(row.get("f1"), unit="share"),
            row.get("support"),
            row.get("given"),
        )
        for row in rows
    ]
    occurring = get(metrics, "labels", "occurring")
    hidden = max(0, occurring - len(rows)) if isinstance(occurring, int) else 0
    if not all(isinstance(row.get("answers"), dict) for row in rows):
        return LabelTables(arm, lines, hidden)
    labels = [line.label for line in lines]
    more = [(key, name) for key, name in (("others", OTHERS), ("none", NONE)) if any(row.get(key) for row in rows)]
    matrix = []
    for row in rows:
        counts = [row["answers"].get(label, 0) for label in labels] + [row.get(key, 0) for key, _ in more]
        matrix.append((str(row["label"]), _shaded(counts, labels.index(str(row["label"])))))
    return LabelTables(arm, lines, hidden, labels + [name for _, name in more], matrix, len(labels) > NAMED)


def _shaded(counts: list[object], right: int) -> list[Shaded]:
    known = [int(count) if is_number(count) else 0 for count in counts]
    whole = max(1, sum(known))
    return [
        Shaded(count, f"{'right' if i == right else 'wrong'} h{-(-HEAT * count // whole)}" if count > 0 else "")
        for i, count in enumerate(known)
    ]
