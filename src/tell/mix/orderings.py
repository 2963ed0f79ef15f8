"""Orderings: the source of each row in the training stream.

An ordering maps ``(counts, seed)`` to the source of each training row. To add one::

    @ordering("mine")
    def mine(counts: Mapping[str, int], seed: int) -> np.ndarray: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tell.errors import TellError, did_you_mean
from tell.registry import Registry
from tell.seeds import below, permutation

Ordering = Callable[[Mapping[str, int], int], np.ndarray]

ordering = ORDERINGS = Registry[Ordering]("ordering")
"""By the name that ``mix.order`` takes; ``@ordering(name)`` declares one."""


def get_ordering(name: str) -> Ordering:
    """The ordering of that name.

    Raises:
        TellError: unknown name, with the nearest one.
    """
    if name not in ORDERINGS:
        raise TellError(
            f"ordering {name!r} is unknown",
            where="mix.order",
            remedy=f"Use {' or '.join(ORDERINGS)}.",
            nearest=did_you_mean(name, ORDERINGS),
        )
    return ORDERINGS[name]


@ordering("shuffle")
def shuffle(counts: Mapping[str, int], seed: int) -> np.ndarray:
    """The paper's extensive shuffle: every arrangement is equally likely (arXiv 2404.00914, section 3).

    Args:
        counts: rows of each source.
        seed: same seed, same places for each source name, in whatever order the keys come.

    Returns:
        (sum of counts,) int8, indices into ``list(counts)``; source s occurs ``counts[s]`` times.
    """
    names = _canonical(counts)
    stream = np.repeat(np.arange(len(names)), [counts[name] for name in names])
    return _in_key_order(stream[permutation(len(stream), seed, "order", "shuffle")], names, counts)


@ordering("spread")
def spread(counts: Mapping[str, int], seed: int) -> np.ndarray:
    """Rarer sources at near-equal gaps, so every stretch of training sees its share of each.

    The rarest source, with c of n rows, takes the places floor((n j + p) / c), j = 0..c-1, with one seeded
    phase p in 0..n-1; the next rarest does the same in the places left. One phase for all rows, and no
    jitter of single rows, makes the counts of any window exact: with two sources a window of L rows holds
    floor or ceil of L c / n rows of each; with k sources it is less than k - 1 rows off.

    Args, Returns: as `shuffle`.
    """
    names = _canonical(counts)
    total = sum(counts.values())
    stream = np.empty(total, dtype=np.int64)
    free = np.arange(total)
    for name in sorted(names, key=lambda name: (counts[name], name)):
        count, n = counts[name], len(free)
        if not count:
            continue
        phase = below(n, seed, "order", "spread", name)
        taken = (np.arange(count, dtype=np.int64) * n + phase) // count
        stream[free[taken]] = names.index(name)
        free = np.delete(free, taken)
    return _in_key_order(stream, names, counts)


def _canonical(counts: Mapping[str, int]) -> list[str]:
    """Names sorted, so that the order of the keys cannot matter."""
    for name, count in counts.items():
        if count < 0:
            raise TellError(f"count {count} is negative", where=f"source {name!r}", remedy="Use 0 or more rows.")
    if len(counts) > np.iinfo(np.int8).max:
        raise TellError(f"{len(counts)} sources are too many", remedy="Mix at most 127 sources.")
    return sorted(counts)


def _in_key_order(stream: np.ndarray, names: list[str], counts: Mapping[str, int]) -> np.ndarray:
    keys = {name: i for i, name in enumerate(counts)}
    return np.array([keys[name] for name in names], dtype=np.int8)[stream]
