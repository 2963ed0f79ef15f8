"""The prefix that rows of one optimiser step share, which is computed once: how long it is, what it saves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MIN_PREFIX = 8  # tokens; sharing less is not worth its bookkeeping
APART = 128  # tokens of a step that passes of the task rows alone must save


def common_prefix(rows: Sequence[np.ndarray]) -> int:
    """Tokens that all rows, (n,) ids each, begin with, leaving at least one token to each."""
    shortest = min(map(len, rows))
    first = rows[0][: shortest - 1]
    length = len(first)
    for row in rows[1:]:
        differs = np.flatnonzero(first[:length] != row[:length])
        if len(differs):
            length = int(differs[0])
    return length


def passes(total: int, prefix: int, micro_tokens: int) -> int:
    """Forward passes that ``total`` tokens behind a shared prefix take."""
    return -(-total // max(1, micro_tokens - prefix))


def apart(prefix: int, shared: int, rows: int) -> bool:
    """Whether a step's task rows go through the model by themselves: their prefix against that of all its rows."""
    return (prefix - shared) * (rows - 1) > APART


def computed_tokens(count: np.ndarray, tokens: np.ndarray, *, prefix: int, shared: int, micro_tokens: int) -> int:
    """Tokens that the passes of all steps compute, shared prefixes once a pass.

    Args:
        count: (steps, 2) task rows and other rows of each step.
        tokens: (steps, 2) their tokens.
        prefix: tokens that all task rows begin with.
        shared: tokens that all rows begin with.
        micro_tokens: tokens of one pass.
    """
    total = 0
    for (task, other), (task_tokens, other_tokens) in zip(count.tolist(), tokens.tolist(), strict=True):
        common = shared if other else prefix
        parts = [(task + other, task_tokens + other_tokens, common)]
        if task > 1 and other and apart(prefix, shared, task):
            parts = [(task, task_tokens, prefix), (other, other_tokens, shared)]
        for rows, size, ahead in parts:
            ahead = ahead if rows > 1 and ahead >= MIN_PREFIX else 0
            own = size - rows * ahead
            total += own + ahead * passes(own, ahead, micro_tokens)
    return total
