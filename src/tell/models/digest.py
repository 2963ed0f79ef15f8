"""A short hash over samples of a model's weights: whether they are those that an adapter was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK, BLOCKS = 4096, 256  # bytes, and samples of each file: training a model further changes almost every weight


def weights_digest(files: Iterable[Path]) -> str:
    """16 hexadecimal digits over size and evenly spaced blocks of each file, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as data:
            for i in range(BLOCKS):
                data.seek(size * i // BLOCKS)
                digest.update(data.read(BLOCK))
    return digest.hexdigest()[:16]
