"""Load examples by path or hub name, the layout detected from the columns."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tell.data.example import Example
from tell.data.formats import Record, check_file, format_of, read_records
from tell.data.layout import Layout, RowFault, check_columns, detect_layout, to_messages
from tell.errors import TellError
from tell.files import expanded

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
        dropped: (origin, reason) of rows left out; only with ``bad_rows="drop"``.
    """

    examples: list[Example]
    layout: str
    columns: dict[str, str]
    path: str
    fingerprint: str
    dropped: tuple[tuple[str, str], ...] = ()


def load(
    source: str,
    *,
    name: str = "task",
    columns: str | None = None,
    bad_rows: Literal["refuse", "drop"] | None = None,
) -> Loaded:
    """Load examples from a file or the hub.

    Args:
        source: a path (json, jsonl, csv, tsv, each also .gz or .zst, or parquet), or a hub name
            ``name[:config][@split]``; split is ``train`` where none is given.
        name: the source's name in every example, ``"task"`` or ``"general"``.
        columns: see `detect_layout`.
        bad_rows: what to do with a row without prompt or answer. By default the task's own data is refused
            (every row counts and its author can mend it) and other data is cleaned, with reasons kept:
            28 of Alpaca's 52,002 rows have no answer.

    Raises:
        TellError: whatever is wrong with the file, its columns or a row; a hub that cannot be reached.
    """
    if not source.strip():
        raise TellError("no data given", remedy="Give the path of a file, or a hub name.")
    if bad_rows is None:
        bad_rows = "refuse" if name == "task" else "drop"
    if not _is_path(source):
        return _load_hub(source, name, columns, bad_rows)
    path = expanded(source)
    with _no_collector():
        records = list(read_records(path))
        layout = detect_layout([record for _, record in records], columns=columns, where=source)
        examples, dropped = _to_examples(records, layout, name, str(path), path.name, bad_rows)
    return Loaded(examples, layout.name, layout.columns, source, file_fingerprint(path, columns, name), dropped)


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
    # Tens of thousands of records that all stay alive: scanning them over and over for garbage
    # costs a third of the loading time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _to_examples(
    records: list[Record], layout: Layout, name: str, where: str, short: str, bad_rows: str
) -> tuple[list[Example], tuple[tuple[str, str], ...]]:
    """Examples and (origin, reason) of the rows dropped; ``where`` is for errors, ``short`` for origins."""
    examples: list[Example] = []
    dropped: list[tuple[str, str]] = []
    required = layout.required
    for number, record in records:
        for column in required:
            if column not in record:
                fault = check_columns(number, record, layout, records[0])
                if fault:
                    raise TellError(
                        fault, where=f"{where}:{number}", remedy="Give every row the same columns, or split the file."
                    )
        try:
            messages = to_messages(record, layout)
        except RowFault as fault:
            if bad_rows == "refuse":
                raise _row_error(fault, f"{where}:{number}") from fault
            dropped.append((f"{short}:{number}", str(fault)))
            continue
        examples.append(Example.of(messages, source=name, origin=f"{short}:{number}"))
    if not examples:
        origin, reason = dropped[0]
        raise TellError(
            f"no row can be used; the first {reason}",
            where=f"{where}:{origin.rsplit(':', 1)[1]}",
            remedy="Mend the rows.",
        )
    return examples, tuple(dropped)


def _row_error(fault: RowFault, where: str) -> TellError:
    remedy = "Fill in that row, or remove it."
    if "role" in str(fault):
        remedy = "Rename the role, or remove the row."
    return TellError(str(fault), where=where, remedy=remedy)


def _is_path(source: str) -> bool:
    """Whether ``source`` is meant as a path: it is there, or it looks like one."""
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
    assert parts is not None  # _is_path let it through
    rows = _hub_rows(source, parts["name"], parts["config"], parts["split"] or "train")
    records = list(enumerate(rows, 1))
    if not records:
        raise TellError("holds no rows", where=source, remedy="Choose another split: NAME@SPLIT.")
    layout = detect_layout(rows, columns=columns, where=source)
    examples, dropped = _to_examples(records, layout, name, source, source, bad_rows)
    digest = hashlib.sha256(repr((source, columns or "", name)).encode())
    for example in examples:
        digest.update(example.hash.encode())
    return Loaded(examples, layout.name, layout.columns, source, digest.hexdigest(), dropped)


def _hub_rows(source: str, name: str, config: str | None, split: str) -> list[dict[str, Any]]:
    reachable, why = hub_reachable()
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    previous = datasets.config.HF_HUB_OFFLINE
    # Without this, an unreachable hub is tried six times over 23 s before the local cache is looked at.
    datasets.config.HF_HUB_OFFLINE = previous or not reachable
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except DatasetNotFoundError as error:
        raise TellError(
            f"no such file, and the hub says: {_first_line(error)}",
            where=source,
            remedy="Check the name, or log in with `hf auth login` if it is private.",
        ) from error
    except Exception as error:  # datasets raises whatever its readers raise
        if not reachable:
            raise TellError(
                f"no such file, and the hub cannot be reached ({why})",
                where=source,
                remedy="Give the path of a file, or try again with a network connection.",
            ) from error
        raise TellError(
            f"cannot be loaded from the hub ({_first_line(error)})",
            where=source,
            remedy="Write NAME:CONFIG@SPLIT to choose a configuration and a split.",
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = previous
    return _rows(dataset)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:200] if lines else type(error).__name__


def _rows(dataset: Any) -> list[dict[str, Any]]:
    """Rows of a `datasets.Dataset`, class labels as their names rather than numbers."""
    import datasets

    labels = {key: kind for key, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)}
    rows = dataset.with_format("arrow")[:].to_pylist()
    for key, kind in labels.items():
        for row in rows:
            value = row[key]
            row[key] = kind.int2str(value) if value is not None and value >= 0 else None
    return rows


def hub_reachable(timeout: float = HUB_TIMEOUT) -> tuple[bool, str]:
    """Whether the Hugging Face hub answers, and if not, why not; decided within ``timeout`` seconds."""
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return False, "HF_HUB_OFFLINE is set"
    result = (False, f"no answer within {timeout:g} s")

    def ask() -> None:
        nonlocal result
        try:
            status = get_session().head(constants.ENDPOINT, timeout=timeout).status_code
            result = (False, f"it answers with status {status}") if status >= 500 else (True, "")
        except Exception as error:  # the client's own errors; which client it is differs between hub versions
            result = False, str(error) or type(error).__name__

    # In a thread, because no timeout of the client covers a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return result
