"""Loads examples by path or hub name, with the layout detected from the columns."""

from __future__ import annotations

import gc
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tell.data.cell_text import Rejected, RowFault
from tell.data.columns import check_columns, detect_layout, has_known_layout, unused_columns
from tell.data.example import Example
from tell.data.file_read import FileRead
from tell.data.form import PROMPT, Form, empty_cells, formed
from tell.data.formats import Record, check_file, format_of, read_records
from tell.data.layouts import Layout, raw_layout
from tell.data.parquet import batch_rows
from tell.data.shape import guess_form
from tell.data.turns import THOUGHTS, to_messages
from tell.data.workbook import split_sheet, with_sheet
from tell.errors import TellError, first_line
from tell.files import expanded
from tell.patience import within
from tell.shown import NAMES

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
        lists: as of `Layout`.
        form: of prompts and answers that several columns make, given or guessed; None for a known layout. Further files
            of the task are read by it.
        file: encoding and sheet; None for a hub dataset and for rows that are on board.
        guessed: the form was guessed.
        names: of all columns.
    """

    examples: list[Example]
    layout: str
    columns: dict[str, str]
    path: str
    fingerprint: str
    dropped: tuple[tuple[str, str], ...] = ()
    notices: tuple[str, ...] = ()
    lists: bool = False
    form: Form | None = None
    file: FileRead | None = None
    guessed: bool = False
    names: tuple[str, ...] = ()

    @property
    def flags(self) -> str:
        """The flags that read the file as it was read; empty where its column names suffice."""
        return self.form.flags if self.form is not None else ""


def load(
    source: str,
    *,
    name: str = "task",
    columns: str | Form | None = None,
    bad_rows: BadRows | None = None,
    lists: bool = False,
) -> Loaded:
    """Examples of a file or a hub dataset, with the layout that was detected.

    Args:
        source: a path (json, jsonl, csv, tsv, each also .gz or .zst, parquet, xlsx, xls or ods, these also
            ``FILE#SHEET``), or a hub name ``name[:config][@split]``; split is ``train`` where none is given.
        name: the source's name in every example, ``"task"`` or ``"general"``.
        columns: see `detect_layout`; or the form of prompt and answer. Without them, where the column names are not
            those of a known layout, the form of the task's own data is guessed from the shape of its columns.
        bad_rows: what to do with a row without prompt or answer. By default the task's own data is refused
            (every row counts, and its author can fix it) and other data is cleaned, with reasons kept:
            28 of Alpaca's 52,002 rows have no answer.
        lists: see `detect_layout`.

    Raises:
        TellError: the file, its columns or a row is invalid, or the hub cannot be reached.
    """
    if not source.strip():
        raise TellError("no data given", remedy="Give the path of a file, or a hub name.")
    if bad_rows is None:
        bad_rows = "refuse" if name == "task" else "drop"
    if not _is_path(source):
        return _load_hub(source, name, columns, bad_rows, lists)
    path, _ = split_sheet(expanded(source))
    file = FileRead()
    with _no_collector():
        records = list(read_records(expanded(source), file))
        rows = _Rows(name, _where(path, file), _where(Path(path).name, file), bad_rows, lists)
        layout = rows.read(records, columns, source)
    fingerprint = file_fingerprint(source, columns, name)
    return rows.loaded(layout, source, fingerprint, file)


def _where(path: str, file: FileRead) -> str:
    """A file in errors and origins, with its sheet where there are several."""
    return with_sheet(path, file.sheet if len(file.sheets) > 1 else None)


def read_source(source: str, file: FileRead) -> tuple[str, list[Record]]:
    """The source in origins, and its numbered records, before anything is read from their columns.

    Args:
        source: as of `load`.
        file: gets encoding, sheet and notices of a file.

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
    records = list(read_records(expanded(source), file))
    return _where(Path(split_sheet(source)[0]).name, file), records


def file_fingerprint(source: str | Path, columns: str | Form | None = None, name: str = "task") -> str:
    """SHA-256 (hexadecimal) over a file's bytes and how it is read; what caches are keyed by.

    Raises:
        TellError: no such file.
    """
    named, sheet = split_sheet(expanded(source))
    path = check_file(named)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    read_by = columns.to_dict() if isinstance(columns, Form) else columns or ""
    digest.update(f"\0{with_sheet(path.name, sheet)}\0{read_by}\0{name}".encode())
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
        lists: as of `detect_layout`.
    """

    def __init__(self, name: str, where: str, short: str, bad_rows: str, lists: bool) -> None:
        self.name, self.where, self.short, self.bad_rows, self.lists = name, where, short, bad_rows, lists
        self.examples: list[Example] = []
        self.dropped: list[tuple[str, str]] = []
        self.seen: Counter[str] = Counter()
        self.calls = 0
        self.form: Form | None = None
        self.guessed = False
        self.said: list[str] = []
        self.names: tuple[str, ...] = ()

    def read(self, records: list[Record], columns: str | Form | None, source: str) -> Layout:
        """Detect the layout and read every record by it."""
        plain = [record for _, record in records]
        self.names = tuple(dict.fromkeys(str(name) for record in plain for name in record))
        self.form = self._form_of(plain, columns, source)
        if self.form is not None:
            layout = self._formed_layout(plain)
            self.said += empty_cells(records, self.form)
            records, left = formed(records, self.form, self.where)
            self.dropped += [(f"{self.short}:{number}", reason) for number, reason in left]
        elif columns is None and self.name == "general" and (raw := self._raw_layout(plain)) is not None:
            layout = raw
        else:
            flag = "--general-columns" if self.name == "general" else "--columns"
            given = columns if isinstance(columns, str) else None
            layout = detect_layout(plain, columns=given, where=source, flag=flag, lists=self.lists)
        self._read_rows(records, layout)
        return layout

    def _form_of(self, records: list[dict[str, object]], columns: str | Form | None, source: str) -> Form | None:
        """The form as given, its missing half guessed; guessed where no layout is known; None for a known layout."""
        given = columns if isinstance(columns, Form) else Form()
        if "\\n" in (given.prompt or ""):
            self.said.append("the prompt has a backslash before an n; in YAML only double quotes make it a new line")
        if given.prompt is not None and given.answer:
            return given.settled(records, source)
        if given == Form() and (columns is not None or self.name != "task" or has_known_layout(records)):
            return None
        form = guess_form(records, source, given)
        if form is None and given != Form():
            flag, other = ("--answer", "--prompt") if given.answer else ("--prompt", "--answer")
            what = f"{flag} is given, and no column is certain to be the other part"
            raise TellError(what, where=source, remedy=f"Add {other}.")
        if form is not None:
            form, self.guessed = form.settled(records, source), True
            self.said.append(f"guessed from the shape of the columns: {form.flags}")
        return form

    def _formed_layout(self, records: list[dict[str, object]]) -> Layout:
        assert self.form is not None
        seen = dict.fromkeys(name for record in records for name in record)
        used = {*self.form.asked, *self.form.answer}
        unused = unused_columns(records, [name for name in seen if name not in used])
        return Layout(self.form.name, {"prompt": PROMPT, "answer": self.form.answer_column}, unused)

    def _raw_layout(self, records: list[dict[str, object]]) -> Layout | None:
        """The layout of raw texts, which general data may be; None where it is not."""
        names = dict.fromkeys(name for record in records for name in record)
        layout = raw_layout(names)
        if layout is None:
            return None
        self.said.append("rows are raw texts: all of each is trained, without the chat template")
        others = [name for name in names if name not in layout.columns.values()]
        return replace(layout, unused=unused_columns(records, others))

    def _read_rows(self, records: list[Record], layout: Layout) -> None:
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

    def loaded(self, layout: Layout, source: str, fingerprint: str, file: FileRead | None = None) -> Loaded:
        """What was read."""
        notices = (*(file.notices if file else ()), *self.notices(layout))
        columns = layout.columns if self.form is None else self.form.columns
        return Loaded(
            *(self.examples, layout.name, columns, source, fingerprint, tuple(self.dropped), notices),
            form=self.form,
            file=file,
            guessed=self.guessed,
            names=self.names,
            lists=layout.lists,
        )

    def _refuse_mixed(self, number: int, record: dict[str, object], layout: Layout, first: Record) -> None:
        if fault := check_columns(record, layout, first):
            remedy = "Give every row the same columns, or split the file."
            raise TellError(fault, where=f"{self.where}:{number}", remedy=remedy)

    def notices(self, layout: Layout) -> list[str]:
        """Notices about parts of rows that are not used; rows that are left out are in ``dropped``."""
        lines = list(self.said)
        if layout.unused:
            more = f" and {len(layout.unused) - NAMES:,} more" if len(layout.unused) > NAMES else ""
            lines.append(f"columns not used: {', '.join(layout.unused[:NAMES])}{more}")
        lines += [
            f"{key} in the turns of {_count(count)} is not used"
            + ("; to train thoughts, write them into content" if key in THOUGHTS else "")
            for key, count in sorted(self.seen.items())[:NAMES]
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


def _load_hub(source: str, name: str, columns: str | Form | None, bad_rows: str, lists: bool) -> Loaded:
    parts = _HUB_NAME.fullmatch(source)
    assert parts is not None  # accepted by _is_path
    rows = _hub_rows(source, parts["name"], parts["config"], parts["split"] or "train")
    records = list(enumerate(rows, 1))
    if not records:
        raise TellError("has no rows", where=source, remedy="Choose another split: NAME@SPLIT.")
    made = _Rows(name, source, source, bad_rows, lists)
    layout = made.read(records, columns, source)
    digest = hashlib.sha256(repr((source, columns or "", name)).encode())
    for example in made.examples:
        digest.update(example.hash.encode())
    return made.loaded(layout, source, digest.hexdigest())


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
