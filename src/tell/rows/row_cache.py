"""Tokenised rows on disk, by file, tokenizer, template and anchor; read back memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tell.files import atomic_folder
from tell.home import tell_home
from tell.rows.row_table import Dropped, RowTable

VERSION = 4  # raise when a change to tokenising changes rows
COLUMNS = ("hashes", "origins", "tokens", "trained", "unit", "ids", "mask", "starts")


def cache_key(**parts: object) -> str:
    """32 hexadecimal digits over everything the rows depend on."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached_table(key: str, make: Callable[[], RowTable]) -> tuple[RowTable, bool]:
    """The table stored under ``key``, made and stored where missing, and whether it was found.

    A cache that cannot be written (full disk, read-only home) costs speed, not the run.
    """
    folder = tell_home() / "rows" / key
    table = _read(folder)
    if table is not None:
        return table, True
    table = make()
    try:
        _write(folder, table)
    except OSError:
        return table, False
    return _read(folder) or table, False


def _read(folder: Path) -> RowTable | None:
    try:
        facts = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        # mmap_mode fails on empty arrays, and small ones may as well be read
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r" if facts["total"] else None) for name in COLUMNS}
        dropped = [Dropped(**d) for d in facts["dropped"]]
        more = {key: facts[key] for key in ("source", "notices", "facts")}
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # missing, truncated or of another version
        return None
    return RowTable(dropped=dropped, **more, **columns)


def _write(folder: Path, table: RowTable) -> None:
    with atomic_folder(folder) as temporary:
        for name in COLUMNS:
            np.save(temporary / f"{name}.npy", getattr(table, name))
        dropped = [asdict(d) for d in table.dropped]
        facts = {"source": table.source, "total": len(table.ids), "dropped": dropped}
        facts |= {"notices": table.notices, "facts": table.facts}
        (temporary / "table.json").write_text(json.dumps(facts), encoding="utf-8")
