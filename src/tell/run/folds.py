"""Folds of the task rows for cross-validation: each part is held out once, and a run is made of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tell.data.example import Example
from tell.data.split import prompt_groups
from tell.errors import TellError
from tell.mix.amount import Draw
from tell.names import ARMS
from tell.run.arms import trained_arms
from tell.run.prepare import Prepared
from tell.run.task import Task, task_table
from tell.score.scored import Metric
from tell.seeds import permutation


@dataclass(frozen=True)
class Fold:
    """One part of the task rows held out.

    Attributes:
        run: the run on the other rows, with this part as its test rows; its general rows are the same share.
        number: from 0.
    """

    run: Prepared
    number: int


def parts_of(task: Task, count: int) -> list[np.ndarray]:
    """Indices of the training rows in ``count`` parts of near-equal size; rows of one label are spread over them.

    Rows with the same prompt are in one part, as in every other split: else they would be trained on before they are
    asked.

    Raises:
        TellError: fewer different prompts than parts.
    """
    groups = prompt_groups(task.train)
    rows = len(groups)
    if rows < count:
        raise TellError(
            f"{rows} task rows with different prompts cannot be divided into {count} folds",
            where="search.folds",
            remedy=f"Set search.folds to {rows} or less, or leave out --search." if rows > 1 else "Add task rows.",
        )
    order = permutation(rows, task.config.seed, "folds").tolist()
    if task.kind.labels:
        order.sort(key=lambda i: task.train[groups[i][0]].answer)
    return [np.sort(np.concatenate([groups[i] for i in order[part::count]])) for part in range(count)]


def folds_of(prepared: Prepared, count: int) -> list[Fold]:
    """The folds of a run. Rows with a label that no other row of the fold has, or that are shown in every prompt
    (``task.shots``), are not held out: they could not be answered, or would be given away.

    Raises:
        TellError: fewer rows than folds.
    """
    task, shown = prepared.task, {example.hash for example in prepared.task.shots}
    folds = []
    for number, part in enumerate(parts_of(task, count)):
        held = set(part.tolist())
        train = [row for i, row in enumerate(task.train) if i not in held]
        test = [task.train[i] for i in part if task.train[i].hash not in shown]
        if task.kind.labels:
            known = {label for row in train for label in task.kind.labels_in(row.answer)}
            test = [row for row in test if known.issuperset(task.kind.labels_in(row.answer))]
        if train and test:
            folds.append(Fold(_part(prepared, train, test), number))
    return folds


def _part(prepared: Prepared, train: list[Example], test: list[Example]) -> Prepared:
    task = replace(prepared.task, train=train, test=test, validation=[])
    share, draw = len(train) / len(prepared.task.train), prepared.draw
    if draw is not None:
        rows = max(1, round(share * len(draw))) if len(draw) else 0
        draw = Draw(draw.indices[:rows], share * draw.epochs)
    return replace(prepared, task=task, table=task_table(task, prepared.anchor), draw=draw, made={})


def pooled(parts: Sequence[Metric]) -> Metric:
    """One metric over the rows of several folds."""
    stats = np.concatenate([part.stats for part in parts])
    per_row = np.concatenate([part.per_row for part in parts])
    return Metric(stats, parts[0].combine, per_row, all(part.binary for part in parts))


def check_search(task: Task) -> None:
    """Refuse a search that cannot be made, before anything is written.

    Raises:
        TellError: fewer task rows than folds, or no time left to train.
    """
    config = task.config
    minutes, arms = config.search.minutes, [arm for arm in trained_arms(config.eval.arms) if ARMS[arm].searched]
    if minutes is None or not arms:
        return
    parts_of(task, config.search.folds)
    if config.max_minutes is not None and minutes * len(arms) >= config.max_minutes:
        raise TellError(
            f"a search of {minutes:g} minutes for each of {', '.join(arms)} leaves no time to train",
            where=f"--max-minutes {config.max_minutes:g}",
            remedy="Search for fewer minutes, or allow the run more.",
        )
