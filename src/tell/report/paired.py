"""Two runs on the test rows that both answered: paired differences, and the rows on which one does better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tell.metric_names import MetricSpec, metric
from tell.names import arm_order
from tell.report.arm_rows import ArmRows, Key, arm_rows
from tell.report.cases import LONG, prompt_text
from tell.report.html_text import shorten
from tell.report.read_run import Run
from tell.report.score_tables import Cell, Grid, metric_names, primary_metric

FLIPS = 40
"""Rows that are shown."""


@dataclass(frozen=True)
class Flip:
    """A test row on which one run does better than the other.

    Attributes:
        better: name of that run.
        answers: (run, answer, score) of both.
    """

    origin: str
    question: str
    reference: str
    better: str
    answers: list[tuple[str, str, float]]


@dataclass
class Pairing:
    """A run against the first one.

    Attributes:
        names: of this run, and of the first one, which is subtracted.
        rows: test rows that both answered, by the arm that has most; ``of`` all rows of each.
        grid: differences by arm, a column a metric.
        arm, spec: what the flips are of: the arm, and the primary metric; None where the rows have no score of it.
        gained, lost: rows on which this run, and the first one, does better.
        flips: the first of these rows, the greatest changes first.
        binary: rows are right or wrong, rather than better or worse.
    """

    names: tuple[str, str]
    rows: int
    of: tuple[int, int]
    grid: Grid
    arm: str = ""
    spec: MetricSpec | None = None
    gained: int = 0
    lost: int = 0
    flips: list[Flip] = field(default_factory=list)
    binary: bool = True

    @property
    def right(self) -> str:
        """What a row counts as in the run that does better."""
        return "right" if self.binary else "better"


def pairings(runs: Sequence[Run], names: Sequence[str]) -> list[Pairing]:
    """Every run against the first; without differences where no test row is shared."""
    return [pair(run, runs[0], (name, names[0])) for run, name in zip(runs[1:], names[1:], strict=True)]


def pair(run: Run, first: Run, names: tuple[str, str]) -> Pairing:
    """The arms that both runs scored, over the test rows that both answered."""
    both = [a for a in arm_order(run.predictions) if a in first.predictions]
    read = {arm: (arm_rows(run, arm), arm_rows(first, arm)) for arm in both}
    shared = {arm: a.shared(b) for arm, (a, b) in read.items()}
    counts = [(len(shared[arm]), len(a.rows), len(b.rows)) for arm, (a, b) in read.items()]
    rows, *of = max(counts, default=(0, _rows(run), _rows(first)))
    found = Pairing(names, rows, (of[0], of[1]), _differences(read, shared, primary_metric(run.metrics)))
    focus = next((arm for arm in ("tell", *both) if shared.get(arm)), None)
    primary = primary_metric(run.metrics)
    if focus is not None and primary:
        found.arm = focus
        _flips(found, read[focus], shared[focus], primary)
    return found


def _rows(run: Run) -> int:
    return max(map(len, run.predictions.values()), default=0)


def _differences(read: dict[str, tuple[ArmRows, ArmRows]], shared: dict[str, list[Key]], primary: str | None) -> Grid:
    names = metric_names((a.metrics for a, _ in read.values()), primary)
    names = [name for name in names if any(name in b.metrics for _, b in read.values())]
    grid = Grid([metric(name) for name in names])
    for arm, (a, b) in read.items():
        if shared[arm]:
            cells = [
                Cell.of(a.minus(b, spec.name, shared[arm]), spec.gap_unit, signed=True)
                if spec.name in a.metrics and spec.name in b.metrics
                else Cell()
                for spec in grid.terms
            ]
            grid.rows.append((arm, cells))
    return grid


def _flips(found: Pairing, read: tuple[ArmRows, ArmRows], keys: Sequence[Key], primary: str) -> None:
    """Fill in the rows that flipped."""
    a, b = read
    if primary not in a.metrics or primary not in b.metrics:
        return
    found.spec = metric(primary)
    ours, theirs = a.over(primary, keys).per_row, b.over(primary, keys).per_row
    gap = np.nan_to_num(ours - theirs) * (1 if found.spec.higher_is_better else -1)
    known = np.concatenate([ours, theirs])
    found.binary = bool(np.isin(known[np.isfinite(known)], (0.0, 1.0)).all())
    found.gained, found.lost = int((gap > 0).sum()), int((gap < 0).sum())
    order = np.argsort(-np.abs(gap), kind="stable")[: min(FLIPS, found.gained + found.lost)]
    for i in order:
        rows, scores = (a.rows[keys[i]], b.rows[keys[i]]), (float(ours[i]), float(theirs[i]))
        question, reference = (shorten(prompt_text(rows[0].get(part)), LONG) for part in ("prompt", "reference"))
        better = found.names[0 if gap[i] > 0 else 1]
        answers = list(zip(found.names, map(_answer, rows), scores, strict=True))
        found.flips.append(Flip(str(rows[0].get("origin", "")), question, reference, better, answers))


def _answer(row: dict) -> str:
    return shorten(prompt_text(row.get("answer")), LONG)
