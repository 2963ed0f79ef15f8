"""Compressed files within bounds."""

import gzip
import json
import random

import pytest
import zstandard

from tell.data import bounds
from tell.data.formats import read_records
from tell.errors import TellError

PACK = {".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("frames", [1, 40])
def test_bombs_are_refused_before_they_fill_memory(tmp_path, monkeypatch, suffix, frames):
    monkeypatch.setattr(bounds, "FLOOR", 2**20)
    monkeypatch.setattr(bounds, "_INPUT", 64)
    path = tmp_path / f"f.jsonl{suffix}"
    path.write_bytes(PACK[suffix](b"\0" * (32 * 2**20 // frames)) * frames)
    taken = []
    monkeypatch.setattr(
        bounds.Allowance, "take", lambda self, n, take=bounds.Allowance.take: (taken.append(n), take(self, n))
    )
    with pytest.raises(TellError, match=r"has [\d,]+ bytes and decompresses to more than [\d,]+. Split the file"):
        list(read_records(path))
    assert sum(taken) < 8 * 2**20


@pytest.mark.parametrize("suffix", PACK)
def test_real_text_passes(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(bounds, "FLOOR", 0)
    words = random.Random(0)
    rows = [{"prompt": f"row {words.random()}", "completion": "the same answer to every row " * 3} for _ in range(2000)]
    path = tmp_path / f"f.jsonl{suffix}"
    path.write_bytes(PACK[suffix]("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert [row for _, row in read_records(path)] == rows
