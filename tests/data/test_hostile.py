"""Seeded hostile inputs: every file is read or refused in one line, whatever stands in it."""

from __future__ import annotations

import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tell.data.kind import detect_kind, missing_classes, widen
from tell.data.sources import load
from tell.data.split import split
from tell.errors import TellError

COLUMNS = (
    ["prompt", "completion"],
    ["messages", "tools"],
    ["text", "label", "answer", "label_text"],
    ["question", "answer", "passage", "choices", "context", "history"],
    ["instruction", "input", "output", "system", "", "id", "weird \u202e"],
)
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "q"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "z", "weight": 1},
]
CELLS = [
    None,
    float("nan"),
    1e308,
    0,
    -1,
    True,
    "",
    "x",
    "\ud83d",
    "e\u0301",
    [],
    {},
    ["a"],
    ["a", "b"],
    {"a": 1},
    "[1]",
]
CELLS += [
    '{"a": 1}',
    '{"a": "\\ud83d"}',
    "false",
    "reject",
    {"role": ["user"], "content": ["q"]},
    TALK,
    TALK[:1],
    CALLS,
]
CELLS += ["[" * 3000, "9" * 5000]
PIECES = [b'"', b"{", b"[", b"\\ud83d", b"\t", b"\n", b",", b"\xff", b"NaN", b"1e999", b":", b"9" * 5000, b"[" * 2000]


def cell(rng: random.Random, depth: int = 0):
    if rng.random() < 0.75 or depth > 2:
        return rng.choice(CELLS)
    if rng.random() < 0.5:
        return [cell(rng, depth + 1) for _ in range(rng.randrange(3))]
    keys = ["role", "content", "from", "value", "weight", "tool_calls", "name", "function", "arguments", "train"]
    return {rng.choice(keys): cell(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutated(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(out) + 1)
        if rng.random() < 0.5:
            del out[at : at + rng.randrange(1, 20)]
        else:
            out[at:at] = rng.choice(PIECES)
    return bytes(out)


def encoded(rng: random.Random, rows: list[dict], columns: list[str], kind: str) -> bytes | None:
    if kind == "parquet":
        buffer = io.BytesIO()
        try:
            pq.write_table(pa.Table.from_pylist(rows), buffer)
        except (pa.ArrowException, UnicodeEncodeError):  # columns of mixed types
            return None
        return buffer.getvalue()
    if kind == "jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    if kind == "json":
        return json.dumps(rows).encode()
    sep = "," if kind == "csv" else "\t"
    lines = [columns, *([str(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join(map(sep.join, lines)).encode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_input_is_read_or_refused_in_one_line(tmp_path, kind):
    rng, path, read = random.Random(kind), tmp_path / f"f.{kind}", 0
    for _ in range(150):
        columns = rng.choice(COLUMNS)
        rows = [{c: cell(rng) for c in columns if rng.random() < 0.9} for _ in range(rng.randrange(1, 6))]
        data = encoded(rng, rows, columns, kind)
        if data is None:
            continue
        path.write_bytes(mutated(rng, data) if rng.random() < 0.5 else data)
        try:
            examples = load(str(path), name=rng.choice(["task", "general"])).examples
            read += 1
            for example in examples:
                json.dumps([m.to_dict() for m in example.messages], ensure_ascii=False).encode()
            parts = split(examples, seed=1, test_fraction=0.3, validation_fraction=0.2)
            kind_of, _ = widen(detect_kind(parts.train), parts.train, parts.test)
            missing_classes(kind_of, parts.train, parts.test)
        except TellError as error:
            assert "\n" not in str(error)
    assert read
