"""Hashes of files and folders, by which studies identify inputs independently of their location."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
WEIGHTS = frozenset({".safetensors", ".gguf", ".bin"})
WHOLE = 1 << 28  # larger weights are hashed by size and samples: 14 GB would take minutes


def content_hash(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file, or of a folder's files with their names; hidden ones are left out.

    Weights above 256 MiB count by size and by 64 samples of 64 KiB. Raises OSError for a file that cannot be read.
    """
    if path.is_file():
        return _of_file(path)
    digest = hashlib.sha256()
    for file in folder_files(path):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_of_file(file)}\n".encode())
    return digest.hexdigest()


def folder_files(folder: Path) -> list[Path]:
    """Every file in a folder that is not hidden, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _of_file(path: Path) -> str:
    about = path.stat()
    return _hash(path.resolve(), path.suffix in WEIGHTS, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash(path: Path, weights: bool, size: int, _changed: int) -> str:
    with path.open("rb") as file:
        if not weights or size <= WHOLE:  # by the suffix of the link: files in the hub's cache have none
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size}\n".encode())
        for i in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()
