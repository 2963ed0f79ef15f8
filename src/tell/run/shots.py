"""Fixed training examples in every test prompt, as the paper's translation runs have two."""

from __future__ import annotations

from collections.abc import Sequence

from tell.config import Config
from tell.data.example import Example
from tell.data.subset import take_rows
from tell.errors import TellError
from tell.rows.template import ChatTokenizer


def pick_shots(config: Config, train: Sequence[Example], chat: ChatTokenizer) -> list[Example]:
    """``task.shots`` rows, the first of the permutation that budgets draw from, so the same for all budgets and arms.

    Rows that are too long to be trained on even without the anchor are skipped; `check_shots` refuses too few.

    Args:
        train: rows to train on, before the budget.
    """
    shots: list[Example] = []
    for i in take_rows(len(train), len(train), config.seed) if config.task.shots else ():
        if len(shots) == config.task.shots:
            break
        if len(chat.encode(chat.render(train[i].messages))) <= config.train.max_length:
            shots.append(train[i])
    return shots


def check_shots(config: Config, train: Sequence[Example], shots: Sequence[Example]) -> None:
    """Refuse to show examples that the task's budget leaves out of training.

    Args:
        train: rows to train on, within the budget.
        shots: of `pick_shots`.

    Raises:
        TellError: fewer rows that can be shown than ``task.shots``.
    """
    trained = {example.hash for example in train}
    shown = sum(example.hash in trained for example in shots)
    if shown < config.task.shots:
        raise TellError(
            f"{config.task.shots} examples are requested, and {shown} of {len(trained)} training rows can be "
            "shown; longer ones than train.max_length are not",
            where="task.shots",
            remedy="Lower task.shots, or train on more rows.",
        )
