"""Fixed training examples in every test prompt, as the paper's translation runs have two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tell.data.budget import take_rows
from tell.data.example import Example
from tell.errors import TellError

if TYPE_CHECKING:
    from tell.study.prepare import Task


def pick_shots(task: Task) -> list[Example]:
    """``task.shots`` rows, the first of the permutation that budgets draw from: the same for all budgets and arms.

    Rows too long to be trained on are passed over; `check_shots` refuses too few.
    """
    shots: list[Example] = []
    order = take_rows(len(task.train), len(task.train), task.config.seed) if task.config.task.shots else ()
    for i in order:
        if len(shots) == task.config.task.shots:
            break
        if len(task.chat.encode(task.chat.render(task.train[i].messages))) <= task.config.train.max_length:
            shots.append(task.train[i])
    return shots


def check_shots(task: Task) -> None:
    """Refuse to show examples that the task's budget leaves out of training.

    Raises:
        TellError: fewer rows that can be shown than ``task.shots``.
    """
    trained = {example.hash for example in task.train}
    shown = sum(example.hash in trained for example in task.shots)
    if shown < task.config.task.shots:
        raise TellError(
            f"{task.config.task.shots} examples are asked for, and {shown} of {len(trained)} training rows can be "
            "shown; longer ones than train.max_length are not",
            where="task.shots",
            remedy="Ask for fewer, or train on more rows.",
        )
