"""A run folder read for the page: its contents, and problems in reading them. A missing file is not an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from tell.errors import TellError
from tell.files import parse_yaml, read_jsonl
from tell.folder import RunFolder
from tell.names import arm_order

T = TypeVar("T")


@dataclass
class Manifest:
    """The training stream in order.

    Attributes:
        source: (n,) str, source of each row.
        step: (n,) int64, optimiser step of each row.
        hash: (n,) str, content hashes.
        numbers: column name to (n,) int64: tokens, trained, unit, repetition, where the file has them.
        digest: the mixture's own digest where the file carries one, else the SHA-256 of the file; hexadecimal.
    """

    source: np.ndarray
    step: np.ndarray
    hash: np.ndarray
    numbers: dict[str, np.ndarray]
    digest: str


@dataclass
class Run:
    """Everything the page is built from; absent files leave their default."""

    folder: RunFolder
    metrics: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    anchor: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    predictions: dict[str, list[dict]] = field(default_factory=dict)
    logs: dict[str, list[dict]] = field(default_factory=dict)
    manifest: Manifest | None = None
    date: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.root.resolve().name


def read_run(folder: RunFolder) -> Run:
    """The contents of a run folder; a file that cannot be read is named in ``problems``.

    Raises:
        TellError: the folder itself does not exist.
    """
    if not folder.root.is_dir():
        raise TellError("no such run folder", where=str(folder.root), remedy="Name a folder made by tell tune.")
    run = Run(folder)

    def attempt(path: Path, kind: type[T], read: Callable[[Path], object]) -> T | None:
        if not path.is_file():
            return None
        try:
            value = read(path)
        except (OSError, ValueError, KeyError, RecursionError, TellError, pyarrow.ArrowException) as error:
            run.problems.append(f"{path.relative_to(folder.root)} could not be read: {error}")
            return None
        if isinstance(value, kind):
            return value
        run.problems.append(f"{path.relative_to(folder.root)} is not a {kind.__name__}")
        return None

    for name in ("metrics", "findings", "anchor", "plan", "search", "status"):
        setattr(run, name, attempt(getattr(folder, name), dict, lambda path: json.loads(_read_text(path))) or {})
    run.config_text = attempt(folder.config, str, _read_text) or ""
    run.config = attempt(folder.config, dict, lambda path: parse_yaml(_read_text(path), where=path.name)) or {}
    run.manifest = attempt(folder.manifest, Manifest, read_manifest)
    for target, place in ((run.predictions, folder.predictions), (run.logs, folder.logs)):
        files = {path.stem: path for path in sorted(place.glob("*.jsonl"))} if place.is_dir() else {}
        for arm in arm_order(files):
            rows = [row for row in attempt(files[arm], list, read_jsonl) or [] if isinstance(row, dict)]
            if rows:
                target[arm] = rows
    run.date = _date(run)
    return run


def read_manifest(path: Path) -> Manifest:
    """Read ``manifest.parquet``.

    Raises:
        KeyError: it lacks the columns source or step.
        pyarrow.ArrowException, OSError: it is not a Parquet file.
    """
    with parquet.ParquetFile(path) as file:  # read_table loads pyarrow.dataset, and that pandas
        table = file.read()
    names = table.column_names
    digest = (table.schema.metadata or {}).get(b"tell.digest")
    for column in ("source", "step"):
        if column not in names:
            raise KeyError(f"column {column} is missing")
    if "position" in names:
        table = table.sort_by("position")
    columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in names}
    blank = np.full(len(table), "", dtype=object)
    return Manifest(
        source=columns["source"].astype(str),
        step=columns["step"].astype(np.int64),
        hash=columns.get("hash", blank).astype(str),
        numbers={n: columns[n].astype(np.int64) for n in ("tokens", "trained", "unit", "repetition") if n in names},
        digest=digest.decode() if digest else hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def get(data: object, *keys: str, default: object = None) -> Any:
    """``data[k1][k2]...``, or the default if any level is absent or is not a mapping."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return default if data is None else data


def mapping(data: object, *keys: str) -> dict[str, Any]:
    """Like `get`, for a mapping; empty if there is none."""
    value = get(data, *keys)
    return value if isinstance(value, dict) else {}


def rows_of(data: object, *keys: str) -> list[Any]:
    """Like `get`, for a list; empty if there is none."""
    value = get(data, *keys)
    return value if isinstance(value, list) else []


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _date(run: Run) -> str:
    """The date the run recorded, else when its scores (or settings) were written."""
    for source in (run.findings, run.status):
        for key in ("date", "finished", "started"):
            if isinstance(source.get(key), str):
                return source[key]
    for path in (run.folder.metrics, run.folder.findings, run.folder.config):
        if path.is_file():
            return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    return ""
