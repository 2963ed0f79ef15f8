"""Loads examples by path or hub name, with the layout detected from the columns."""

from __future__ import annotations

import gc
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tell.data.cell_text import Rejected, RowFault
from tell.data.columns import SHOWN, check_columns, detect_layout
from tell.data.example import Example
from tell.data.formats import Record, check_file, format_of, read_records
from tell.data.layouts import Layout
from tell.data.parquet import batch_rows
from tell.data.turns import THOUGHTS, to_messages
from tell.errors import TellError, first_line
from tell.files import expanded
from tell.patience import within

if TYPE_CHECKING:
    import datasets

BadRows = Literal["refuse", "drop"]
HUB_TIMEOUT = 5.0  # seconds the hub may take to answer before it counts as unreachable
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.\[\]:%-]+))?")


@dataclass(frozen=True)
class Loaded:
    """Examples of one source.

    Attributes:
        examples: in file order; ``origin`` is ``file:line``.
        layout: what was detected, e.g. ``"prompt/completion"``.
        columns: part to column, e.g. ``{"prompt": "q", "answer": "a"}``.
        path: the path or hub name as given.
        fingerprint: SHA-256 (hexadecimal) over the file's bytes, the columns and the source's name.
        dropped: (origin, reason) of rows left out: bad ones with ``bad_rows="drop"``, and those marked as bad examples.
        notices: guesses and unused parts, as sentences for the user; rows left out are in ``dropped`` alone.
    """

    examples: list[Example]
    layout: str
    columns: dict[str, str]
    path: str
    fingerprint: str
    dropped: tuple[tuple[str, str], ...] = ()
    notices: tuple[str, ...] = ()


def load(source: str, *, name: str = "task", columns: str | None = None, bad_rows: BadRows | None = None) -> Loaded:
    """Examples of a file or a hub dataset, with the layout that was detected.

    Args:
        source: a path (json, jsonl, csv, tsv, each also .gz or .zst, or parquet), or a hub name
            ``name[:config][@split]``; split is ``train`` where none is given.
        name: the source's name in every example, ``"task"`` or ``"general"``.
        columns: see `detect_layout`.
        bad_rows: what to do with a row without prompt or answer. By default the task's own data is refused
            (every row counts, and its author can fix it) and other data is cleaned, with reasons kept:
            28 of Alpaca's 52,002 rows have no answer.

    Raises:
        TellError: the file, its columns or a row is invalid, or the hub cannot be reached.
    """
    if not source.strip():
        raise TellError("no data given", remedy="Give the path of a file, or a hub name.")
    if bad_rows is None:
        bad_rows = "refuse" if name == "task" else "drop"
    if not _is_path(source):
        return _load_hub(source, name, columns, bad_rows)
    path = expanded(source)
    guessed: list[str] = []
    with _no_collector():
        records = list(read_records(path, guessed.append))
        rows = _Rows(name, str(path), path.name, bad_rows)
        layout = rows.read(records, columns, source)
    fingerprint = file_fingerprint(path, columns, name)
    notices = (*guessed, *rows.notices(layout))
    return Loaded(rows.examples, layout.name, layout.columns, source, fingerprint, tuple(rows.dropped), notices)


def read_source(source: str, notify: Callable[[str], None]) -> tuple[str, list[Record]]:
    """The source in origins, and its numbered records, before anything is read from their columns.

    Args:
        source: as of `load`.
        notify: called with each guess about a file.

    Raises:
        TellError: as `load` of the file itself.
    """
    if not _is_path(source):
        parts = _HUB_NAME.fullmatch(source)
        assert parts is not None  # accepted by _is_path
        records = list(enumerate(_hub_rows(source, parts["name"], parts["config"], parts["split"] or "train"), 1))
        if not records:
            raise TellError("has no rows", where=source, remedy="Choose another split: NAME@SPLIT.")
        return source, records
    path = expanded(source)
    return path.name, list(read_records(path, notify))


def file_fingerprint(path: str | Path, columns: str | None = None, name: str = "task") -> str:
    """SHA-256 (hexadecimal) over a file's bytes and how it is read; what caches are keyed by.

    Raises:
        TellError: no such file.
    """
    path = check_file(expanded(path))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(f"\0{path.name}\0{columns or ''}\0{name}".encode())
    return digest.hexdigest()


@contextmanager
def _no_collector() -> Iterator[None]:
    # Tens of thousands of records that all stay alive: scanning them for garbage takes a third of the loading time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Rows:
    """Turns records into examples, and counts what is left out.

    Args:
        where: the source in errors.
        short: the source in origins.
    """

    def __init__(self, name: str, where: str, short: str, bad_rows: str) -> None:
        self.name, self.where, self.short, self.bad_rows = name, where, short, bad_rows
        self.examples: list[Example] = []
        self.dropped: list[tuple[str, str]] = []
        self.seen: Counter[str] = Counter()
        self.calls = 0

    def read(self, records: list[Record], columns: str | None, source: str) -> Layout:
        """Detect the layout and read every record by it."""
        flag = "--general-columns" if self.name == "general" else "--columns"
        layout = detect_layout([record for _, record in records], columns=columns, where=source, flag=flag)
        for number, record in records:
            if any(column not in record for column in layout.required):
                self._refuse_mixed(number, record, layout, records[0])
            try:
                messages = to_messages(record, layout, self.seen)
            except RowFault as fault:
                if self.bad_rows == "refuse" and not isinstance(fault, Rejected):
                    raise TellError(str(fault), where=f"{self.where}:{number}", remedy=fault.remedy) from fault
                self.dropped.append((f"{self.short}:{number}", str(fault)))
                continue
            example = Example.of(messages, source=self.name, origin=f"{self.short}:{number}")
            self.calls += any(m.extra for m in example.messages)
            self.examples.append(example)
        if not self.examples:
            origin, reason = self.dropped[0]
            where = f"{self.where}:{origin.rsplit(':', 1)[1]}"
            raise TellError(f"no row is usable; the first {reason}", where=where, remedy="Fix the rows.")
        return layout

    def _refuse_mixed(self, number: int, record: dict[str, object], layout: Layout, first: Record) -> None:
        if fault := check_columns(record, layout, first):
            remedy = "Give every row the same columns, or split the file."
            raise TellError(fault, where=f"{self.where}:{number}", remedy=remedy)

    def notices(self, layout: Layout) -> list[str]:
        """Notices about parts of rows that are not used; rows that are left out are in ``dropped``."""
        lines = []
        if layout.unused:
            more = f" and {len(layout.unused) - SHOWN:,} more" if len(layout.unused) > SHOWN else ""
            lines.append(f"columns not used: {', '.join(layout.unused[:SHOWN])}{more}")
        lines += [
            f"{key} in the turns of {_count(count)} is not used"
            + ("; to train thoughts, write them into content" if key in THOUGHTS else "")
            for key, count in sorted(self.seen.items())[:SHOWN]
        ]
        if self.calls:
            lines.append(f"tool calls and results in {_count(self.calls)} are context, without loss")
        return [f"{self.short}: {line}" for line in lines]


def _count(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows:,} rows"


def _is_path(source: str) -> bool:
    """Whether ``source`` is meant as a path: it exists, or it looks like one."""
    if os.path.exists(os.path.expanduser(source)) or format_of(source) or not _HUB_NAME.fullmatch(source):
        return True
    if source.startswith((".", "~", "/")):
        return True
    folder = os.path.dirname(source)
    if folder:  # tasks/tickets.txt where tasks/ is a folder here
        return os.path.isdir(folder)
    return bool(re.search(r"\.[A-Za-z]{2,5}$", source))  # tickets.txt: hub names with a dot have an owner


def _load_hub(source: str, name: str, columns: str | None, bad_rows: str) -> Loaded:
    parts = _HUB_NAME.fullmatch(source)
    assert parts is not None  # accepted by _is_path
    rows = _hub_rows(source, parts["name"], parts["config"], parts["split"] or "train")
    records = list(enumerate(rows, 1))
    if not records:
        raise TellError("has no rows", where=source, remedy="Choose another split: NAME@SPLIT.")
    made = _Rows(name, source, source, bad_rows)
    layout = made.read(records, columns, source)
    digest = hashlib.sha256(repr((source, columns or "", name)).encode())
    for example in made.examples:
        digest.update(example.hash.encode())
    notices = tuple(made.notices(layout))
    return Loaded(made.examples, layout.name, layout.columns, source, digest.hexdigest(), tuple(made.dropped), notices)


def _hub_rows(source: str, name: str, config: str | None, split: str) -> list[dict[str, object]]:
    reachable, why = hub_reachable()
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    previous = datasets.config.HF_HUB_OFFLINE
    # Without this, an unreachable hub is tried six times over 23 s before the local cache is looked at.
    datasets.config.HF_HUB_OFFLINE = previous or not reachable
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except DatasetNotFoundError as error:
        remedy = "Check the name, or log in with `hf auth login` if it is private."
        raise TellError(f"no such file, and the hub says: {first_line(error)}", where=source, remedy=remedy) from error
    except Exception as error:  # datasets may raise any exception of its readers
        if not reachable:
            what = f"no such file, and the hub cannot be reached ({why})"
            remedy = "Give the path of a file, or try again with a network connection."
            raise TellError(what, where=source, remedy=remedy) from error
        remedy = "Write NAME:CONFIG@SPLIT to choose a configuration and a split."
        raise TellError(f"cannot be loaded from the hub ({first_line(error)})", where=source, remedy=remedy) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = previous
    return _rows(dataset)


def _rows(dataset: datasets.Dataset) -> list[dict[str, object]]:
    """Rows of a `datasets.Dataset`, class labels as their names rather than numbers."""
    features = dataset.features.to_dict()
    batches = dataset.with_format("arrow")[:].to_batches()
    return [row for batch in batches for row in batch_rows(batch, features)]


def hub_reachable(timeout: float = HUB_TIMEOUT) -> tuple[bool, str]:
    """Whether the Hugging Face hub answers, and if not, why not; decided within ``timeout`` seconds."""
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return False, "HF_HUB_OFFLINE is set"
    try:
        status = within(timeout, lambda: get_session().head(constants.ENDPOINT, timeout=timeout).status_code)
    except Exception as error:  # errors of the HTTP client, which differs between hub versions
        return False, str(error) or type(error).__name__
    if status is None:
        return False, f"no answer within {timeout:g} s"
    return (False, f"it answers with status {status}") if status >= 500 else (True, "")
