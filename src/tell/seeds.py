"""Randomness that is the same in every process, on every machine and under every numpy."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A PCG64 generator of its own for each (seed, names), e.g. ``generator(42, "task", 3)``.

    Names enter through blake2b, never through ``hash()``, which differs from process to process.
    """
    digest = hashlib.blake2b("\x00".join(map(str, names)).encode(), digest_size=16).digest()
    words = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))


def permutation(n: int, seed: int, *names: str | int) -> np.ndarray:
    """(n,) int64, a seeded permutation of 0..n-1.

    Sorts the raw PCG64 stream, which numpy promises never to change (NEP 19); ``Generator.permutation``
    carries no such promise.
    """
    raw = generator(seed, *names).bit_generator.random_raw(n)
    return np.argsort(raw, kind="stable")


def below(n: int, seed: int, *names: str | int) -> int:
    """A seeded integer in 0..n-1, from the raw stream for the same reason."""
    return (int(generator(seed, *names).bit_generator.random_raw()) * n) >> 64
