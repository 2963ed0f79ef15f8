"""The prefix that rows of an optimiser step share and that is computed once: its length and the tokens it saves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

MIN_PREFIX = 8  # tokens; sharing less is not worth its bookkeeping
APART = 128  # tokens of a step that passes of the task rows alone must save
# And for each pass more that this takes: launching the kernels of a pass on a GPU takes 60 to 100 ms, in which an 8B
# model computes some two thousand tokens.
PASS = {"cpu": 0, "cuda": 2048}


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
    """Number of forward passes for ``total`` tokens after a shared prefix."""
    return -(-total // max(1, micro_tokens - prefix))


def apart(
    rows: tuple[int, int], tokens: tuple[int, int], *, prefix: int, shared: int, micro_tokens: int, device: str
) -> bool:
    """Whether the task rows of a step get passes of their own, for their longer shared prefix.

    Args:
        rows: task rows and other rows of the step.
        tokens: of each.
        prefix, shared, micro_tokens, device: as for `computed_tokens`.
    """
    task, other = (
        passes(size - count * ahead, ahead, micro_tokens)
        for count, size, ahead in zip(rows, tokens, (prefix, shared), strict=True)
    )
    more = task + other - passes(sum(tokens) - sum(rows) * shared, shared, micro_tokens)
    return (prefix - shared) * (rows[0] - 1) > max(APART, more * PASS.get(device, 0))


def computed_tokens(
    count: np.ndarray, tokens: np.ndarray, *, prefix: int, shared: int, micro_tokens: int, device: str
) -> int:
    """Tokens that the passes of all steps compute, shared prefixes once a pass.

    Args:
        count: (steps, 2) task rows and other rows of each step.
        tokens: (steps, 2) their tokens.
        prefix: tokens that all task rows begin with.
        shared: tokens that all rows begin with.
        micro_tokens: tokens of one pass.
        device: ``cpu`` or ``cuda``.
    """
    is_apart = partial(apart, prefix=prefix, shared=shared, micro_tokens=micro_tokens, device=device)
    total = 0
    for (task, other), (task_tokens, other_tokens) in zip(count.tolist(), tokens.tolist(), strict=True):
        common = shared if other else prefix
        parts = [(task + other, task_tokens + other_tokens, common)]
        if task > 1 and other and is_apart((task, other), (task_tokens, other_tokens)):
            parts = [(task, task_tokens, prefix), (other, other_tokens, shared)]
        for rows, size, common in parts:
            ahead = common if rows > 1 and common >= MIN_PREFIX else 0
            own = size - rows * ahead
            total += own + ahead * passes(own, ahead, micro_tokens)
    return total
