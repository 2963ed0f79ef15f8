"""Orders: which source stands at each place of the training stream.

An order is a plain function of counts and a seed. To add one::

    @register("mine")
    def mine(counts: Mapping[str, int], seed: int) -> np.ndarray: ...
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import numpy as np

from tell.errors import TellError
from tell.seeds import below, permutation

Order = Callable[[Mapping[str, int], int], np.ndarray]

ORDERS: dict[str, Order] = {}


def register(name: str) -> Callable[[Order], Order]:
    """Add an order under the name that ``mix.order`` takes."""

    def add(order: Order) -> Order:
        ORDERS[name] = order
        return order

    return add


def get_order(name: str) -> Order:
    """The order of that name.

    Raises:
        TellError: unknown name, with the nearest one.
    """
    if name not in ORDERS:
        close = difflib.get_close_matches(name, ORDERS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise TellError(f"order {name!r} is unknown{hint}", where="mix.order", remedy=f"Use {' or '.join(ORDERS)}.")
    return ORDERS[name]


@register("shuffle")
def shuffle(counts: Mapping[str, int], seed: int) -> np.ndarray:
    """The paper's extensive shuffle: every arrangement is equally likely (arXiv 2404.00914, section 3).

    Args:
        counts: rows of each source.
        seed: same seed, same places for each source name, whatever the order of the keys.

    Returns:
        (sum of counts,) int8, indices into ``list(counts)``; source s occurs ``counts[s]`` times.
    """
    names = _canonical(counts)
    stream = np.repeat(np.arange(len(names)), [counts[name] for name in names])
    return _in_key_order(stream[permutation(len(stream), seed, "order", "shuffle")], names, counts)


@register("spread")
def spread(counts: Mapping[str, int], seed: int) -> np.ndarray:
    """Rarer sources at near-equal gaps, so every stretch of training sees its share of each.

    The rarest source with c of n rows takes the places floor((n j + p) / c), j = 0..c-1, with one seeded
    phase p in 0..n-1; the next rarest does the same in the places left. One phase for all rows, and no
    jitter of single rows, is what makes the counts of any window exact: with two sources a window of L
    rows holds floor or ceil of L c / n rows of each; with k sources it is less than k - 1 rows off.

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
            raise TellError(f"count {count} is negative", where=f"source {name!r}", remedy="Give 0 or more rows.")
    if len(counts) > np.iinfo(np.int8).max:
        raise TellError(f"{len(counts)} sources are too many", remedy="Mix at most 127 sources.")
    return sorted(counts)


def _in_key_order(stream: np.ndarray, names: list[str], counts: Mapping[str, int]) -> np.ndarray:
    keys = {name: i for i, name in enumerate(counts)}
    return np.array([keys[name] for name in names], dtype=np.int8)[stream]
