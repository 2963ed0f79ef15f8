"""The cache of tokenised rows: read back whole, remade when broken, never in the way."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from tell.data.example import Example
from tell.home import tell_home
from tell.rows.row_cache import COLUMNS, cache_key, cached_table
from tell.rows.row_table import RowTable
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, tokenize


@pytest.fixture
def make(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    chat = ChatTokenizer(tiny_model("llama"))
    examples = [Example.pair(f"Wo ist {n}?", "Hier. " * n, origin=f"tä.jsonl:{n}") for n in (1, 2, 60, 3)]
    calls = []

    def build() -> RowTable:
        calls.append(1)
        return tokenize(examples, chat, source="task", rules=RowRules(max_length=100))

    build.calls = calls
    return build


def assert_same(a: RowTable, b: RowTable) -> None:
    for field in dataclasses.fields(RowTable):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and np.array_equal(x, y), field.name
        else:
            assert x == y, field.name


def test_second_call_reads_the_same_back(make):
    plain = make()
    assert len(plain.dropped) == 1
    first, found = cached_table("k", make)
    assert not found
    second, found = cached_table("k", make)
    assert found and len(make.calls) == 2
    assert_same(plain, first)
    assert_same(plain, second)
    assert isinstance(second.ids, np.memmap)  # not read into memory
    assert not list((tell_home() / "rows").glob(".k.*"))  # nothing half-written stays


@pytest.mark.parametrize("name", [*COLUMNS, "facts", "folder"])
@pytest.mark.parametrize("damage", ["empty", "short", "gone", "garbage"])
def test_broken_files_are_made_again(make, name, damage):
    plain = cached_table("k", make)[0]
    folder = tell_home() / "rows" / "k"
    path = folder / ("table.json" if name in ("facts", "folder") else f"{name}.npy")
    data = path.read_bytes()
    path.unlink()  # the old memory map keeps its own file
    if name == "folder":
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        folder.write_bytes(b"a file in the way")
    elif damage != "gone":
        path.write_bytes({"empty": b"", "short": data[: len(data) - 5], "garbage": b"[1, 2]" * 50}[damage])
    again, found = cached_table("k", make)
    assert not found
    assert_same(plain, again)
    if name != "folder":
        assert cached_table("k", make)[1]


def test_unwritable_home_costs_speed_only(make, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "file"))  # no folder can be made below a file, even by root
    for _ in range(2):
        table, found = cached_table("k", make)
        assert not found and len(table) == 3
    assert len(make.calls) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_home(make):
    tell_home().mkdir(parents=True)
    tell_home().chmod(0o500)
    assert not cached_table("k", make)[1]


def test_empty_table(make, tiny_model):
    chat = ChatTokenizer(tiny_model("llama"))

    def empty() -> RowTable:
        return tokenize([Example.pair("a", "b " * 99)], chat, source="task", rules=RowRules(max_length=8))

    cached_table("e", empty)
    table, found = cached_table("e", empty)
    assert found
    assert_same(table, empty())


def test_error_while_making_leaves_nothing(make):
    def fail() -> RowTable:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_table("k", fail)
    assert not (tell_home() / "rows").exists()


def test_key_depends_on_every_part():
    parts = {"file": "a", "tokenizer": "b", "anchor": "c", "rules": [1, 2]}
    keys = {cache_key(**parts)} | {cache_key(**{**parts, name: "x"}) for name in parts}
    assert len(keys) == 5
    assert cache_key(**dict(reversed(parts.items()))) == cache_key(**parts)
