"""The prefixes that the rows of a mixture share, and what passes on a GPU copy of them."""

from __future__ import annotations

import numpy as np

from tell.mix.mixture import ANCHORED, Mixture
from tell.rows.prefix import MIN_PREFIX, common_prefix

SAMPLE = 64  # rows of each source that are compared


def shared_prefixes(mixture: Mixture) -> tuple[int, int]:
    """Tokens that all task rows begin with, and those that all rows begin with, general rows among them; 0: none.

    An estimate from `SAMPLE` rows of each source. Without general rows the second is 0.
    """
    heads: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for source, name in enumerate(mixture.sources):
        table, rows = mixture.tables[name], np.unique(mixture.row[mixture.source == source])
        if len(rows) and len(table.ids):  # rows the model has yet to write have no tokens
            sample = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(int)]
            heads[name in ANCHORED] += [table.row(int(row))[0] for row in sample]
    prefix = common_prefix(heads[True]) if heads[True] else 0
    return prefix, common_prefix(heads[True] + heads[False]) if heads[False] else 0


def task_and_other(mixture: Mixture, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, 2) task rows and other rows of each step, and (steps, 2) their tokens."""
    is_task = np.array([name in ANCHORED for name in mixture.sources])[mixture.source]
    step = np.arange(len(mixture)) // batch_size
    cell, size = 2 * step + ~is_task, 2 * mixture.steps(batch_size)
    tokens = np.bincount(cell, weights=mixture.column("tokens"), minlength=size)
    return np.bincount(cell, minlength=size).reshape(-1, 2), tokens.astype(np.int64).reshape(-1, 2)


def copied_tokens(mixture: Mixture, batch_size: int, most: int) -> int:
    """Tokens of shared prefixes whose keys and values a pass on a GPU copies, over all its rows, at most.

    Args:
        most: tokens of a pass.
    """
    if not len(mixture):
        return 0
    rows, tokens = task_and_other(mixture, batch_size)
    ahead = np.array([n if n >= MIN_PREFIX else 0 for n in shared_prefixes(mixture)])
    own = tokens.sum(0) / np.maximum(1, rows.sum(0)) - ahead  # of a row, on average
    held = most * float((ahead / np.maximum(1, own)).max())
    return int(min(held, (rows @ ahead).max()))
