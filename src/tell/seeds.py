"""Random numbers that are the same in every process, on every machine and under every numpy.

All of it comes from the raw PCG64 stream, which numpy promises never to change (NEP 19). ``Generator.permutation``
carries no such promise, and the splits, subsets and orderings of published runs must not change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

_LOW = 0xFFFFFFFF


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A separate PCG64 generator for each (seed, names), e.g. ``generator(42, "task", 3)``.

    Names enter through blake2b, never through ``hash()``, which differs from process to process.
    """
    digest = hashlib.blake2b("\x00".join(map(str, names)).encode(), digest_size=16).digest()
    words = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))


def permutation(n: int, seed: int, *names: str | int) -> np.ndarray:
    """(n,) int64, a seeded permutation of 0..n-1; places training rows."""
    return np.argsort(generator(seed, *names).bit_generator.random_raw(n), kind="stable")


def below(n: int, seed: int, *names: str | int) -> int:
    """A seeded integer in 0..n-1."""
    return (int(generator(seed, *names).bit_generator.random_raw()) * n) >> 64


def shuffled(n: int, seed: int) -> np.ndarray:
    """(n,) int64, the permutation that ``default_rng(seed).permutation(n)`` makes in numpy 2; draws splits and subsets.

    Written out: Fisher and Yates, with integers drawn by masks and rejection.
    """
    order, words = list(range(n)), _words(seed)
    for i in range(n - 1, 0, -1):
        mask = (1 << i.bit_length()) - 1
        while (j := next(words) & mask) > i:
            pass
        order[i], order[j] = order[j], order[i]
    return np.array(order, dtype=np.int64)


def _words(seed: int) -> Iterator[int]:
    """The raw stream in words of 32 bits, the lower half of each draw first."""
    stream = np.random.PCG64(seed)
    while True:
        for draw in stream.random_raw(1024).tolist():
            yield draw & _LOW
            yield draw >> 32
