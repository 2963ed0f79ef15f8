"""The prefix that rows of an optimiser step share and that is computed once: its length and the tokens it saves."""

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
    """Number of forward passes for ``total`` tokens after a shared prefix."""
    return -(-total // max(1, micro_tokens - prefix))


def shared_prefix(rows: Sequence[np.ndarray], task: Sequence[bool], *, per_row: bool) -> tuple[int, list[int]]:
    """Tokens that a pass over ``rows`` computes once, and how many of them each row begins with.

    Args:
        rows: (n,) ids each.
        task: whether each is a task row, behind the anchor.
        per_row: rows of one pass may have different parts of the prefix: task rows all of it, the others what all
            rows begin with. Else it is the prefix of all.
    """

    def worthwhile(part: Sequence[np.ndarray]) -> int:
        found = common_prefix(part) if len(part) > 1 else 0
        return found if found >= MIN_PREFIX else 0

    common = worthwhile(rows)
    if per_row and not all(task):
        own = worthwhile([ids for ids, is_task in zip(rows, task, strict=True) if is_task])
        return max(own, common), [own if own and is_task else common for is_task in task]
    return common, [common] * len(rows)


def apart(rows: tuple[int, int], *, prefix: int, shared: int) -> bool:
    """Whether the task rows of a step get passes of their own, for their longer shared prefix.

    Only where all rows of a pass must have the same prefix.

    Args:
        rows: task rows and other rows of the step.
        prefix, shared: as for `computed_tokens`.
    """
    return rows[0] > 1 and rows[1] > 0 and (prefix - shared) * (rows[0] - 1) > APART


def computed_tokens(
    count: np.ndarray, tokens: np.ndarray, *, prefix: int, shared: int, micro_tokens: int, per_row: bool
) -> int:
    """Tokens that the passes of all steps compute, shared prefixes once a pass.

    Args:
        count: (steps, 2) task rows and other rows of each step.
        tokens: (steps, 2) their tokens.
        prefix: tokens that all task rows begin with.
        shared: tokens that all rows begin with.
        micro_tokens: tokens of one pass.
        per_row: as for `shared_prefix`.
    """
    rules = {"prefix": prefix, "shared": shared, "micro_tokens": micro_tokens}
    total = 0
    for (task, other), (task_tokens, other_tokens) in zip(count.tolist(), tokens.tolist(), strict=True):
        if per_row and task > 1 and other and prefix >= MIN_PREFIX:
            total += _computed_together((task, other), (task_tokens, other_tokens), **rules)
            continue
        common = shared if other else prefix
        parts = [(task + other, task_tokens + other_tokens, common)]
        if not per_row and apart((task, other), prefix=prefix, shared=shared):
            parts = [(task, task_tokens, prefix), (other, other_tokens, shared)]
        for rows, size, common in parts:
            ahead = common if rows > 1 and common >= MIN_PREFIX else 0
            own = size - rows * ahead
            total += own + ahead * passes(own, ahead, micro_tokens)
    return total


def _computed_together(
    rows: tuple[int, int], tokens: tuple[int, int], *, prefix: int, shared: int, micro_tokens: int
) -> int:
    """Tokens that a step computes in passes of rows with and without the prefix; the task rows come first."""
    task = tokens[0] - rows[0] * prefix
    own = task + tokens[1] - rows[1] * (shared if shared >= MIN_PREFIX else 0)
    limit = -(-own // passes(own, prefix, micro_tokens))  # of a pass
    return own + prefix * -(-task // limit)
