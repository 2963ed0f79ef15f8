"""A seeded order of rows that is the same under every numpy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_LOW = 0xFFFFFFFF


def shuffled(n: int, seed: int) -> np.ndarray:
    """(n,) int64, the permutation that ``default_rng(seed).permutation(n)`` makes in numpy 2.

    Written out (Fisher and Yates, integers by masks and rejection), because numpy promises the raw PCG64 stream for
    all time (NEP 19), and of ``Generator.permutation`` nothing: splits and budgets of published runs must stay.
    """
    order, words = list(range(n)), _words(seed)
    for i in range(n - 1, 0, -1):
        j = _at_most(i, words)
        order[i], order[j] = order[j], order[i]
    return np.array(order, dtype=np.int64)


def _words(seed: int) -> Iterator[int]:
    """The raw stream in words of 32 bits, the lower half of each draw first."""
    stream = np.random.PCG64(seed)
    while True:
        for draw in stream.random_raw(1024).tolist():
            yield draw & _LOW
            yield draw >> 32


def _at_most(limit: int, words: Iterator[int]) -> int:
    """An integer in 0..limit, unbiased, for limits under 2^32."""
    mask = (1 << limit.bit_length()) - 1
    while (value := next(words) & mask) > limit:
        pass
    return value
