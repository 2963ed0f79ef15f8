"""Records of CSV and TSV files, each with the line it begins on."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tell.errors import TellError

Row = tuple[int, list[str]]  # the line it begins on, its cells
Notify = Callable[[str], None]
_SEPARATOR = re.compile(r'("?)sep=([,;|\t])\1\r?', re.IGNORECASE)  # a first line that Excel takes for no row


def read_csv(text: str, path: Path, notify: Notify) -> Iterator[tuple[int, dict[str, object]]]:
    """Records of a file with a header line; columns without a name are left out, and reported if they have text."""
    head = text.partition("\n")[0]
    if found := _SEPARATOR.fullmatch(head):
        notify(f"{path.name}: the first line says that cells are separated by {found[2]!r}")
        rows = _quoted_rows(text, found[2], path)
        next(rows)
        return _records(rows, path, notify)
    delimiter = ";" if ";" in head and "," not in head else ","  # spreadsheets write semicolons in many locales
    return _records(_quoted_rows(text, delimiter, path), path, notify)


def read_tsv(text: str, path: Path, notify: Notify) -> Iterator[tuple[int, dict[str, object]]]:
    """`read_csv`, with tabs.

    TSV has no quoting: quotes that span lines are read as text if every line has the right number of cells
    without them.
    """
    if (plain := _plain_rows(text)) is None:
        return _records(_quoted_rows(text, "\t", path), path, notify)
    notify(f"{path.name}: quotes are read as part of the text, since every line has its cells without them")
    return _records(iter(plain), path, notify)


def _records(rows: Iterator[Row], path: Path, notify: Notify) -> Iterator[tuple[int, dict[str, object]]]:
    line, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    named = [name for name in names if name]
    twice = next((name for name, count in Counter(named).items() if count > 1), None)
    if twice is not None:
        raise TellError(f"names the column {twice!r} twice", where=f"{path}:{line}", remedy="Rename one of them.")
    unnamed = len(named) < len(names)
    for line, cells in rows:
        if any(names[len(cells) :]) or any(cells[len(names) :]):  # spreadsheets pad rows and headers with empty cells
            what = f"has {len(cells)} cells where the header has {len(names)}"
            raise TellError(what, where=f"{path}:{line}", remedy="Put quotes around cells that contain the separator.")
        if unnamed and any(cell for name, cell in zip(names, cells, strict=False) if not name):
            notify(f"{path.name}: columns without a name are not used, the first with text is in line {line}")
            unnamed = False  # once is enough
        record: dict[str, object] = dict(zip(names, cells, strict=False))
        record.pop("", None)
        yield line, record


def _quoted_rows(text: str, delimiter: str, path: Path) -> Iterator[Row]:
    previous = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long documents
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line, form = 1, "TSV" if delimiter == "\t" else "CSV"
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if cells:
                yield start, cells
    except csv.Error as error:
        raise TellError(
            f"is not valid {form} ({error})",
            where=f"{path}:{line}",
            remedy="Close the quotes of that row, and double quotes inside a quoted cell.",
        ) from error
    finally:
        csv.field_size_limit(previous)


def _plain_rows(text: str) -> list[Row] | None:
    """The rows of a TSV file whose quotes are text, line by line; None where quotes may enclose cells.

    They are text where they would join lines (or break the file) although each line has the header's number of cells.
    """
    if '"' not in text:
        return None
    rows = [(n, line.rstrip("\r").split("\t")) for n, line in enumerate(text.split("\n"), 1) if line.strip("\r\n")]
    width = len(rows[0][1])
    if width < 2 or any(len(cells) != width for _, cells in rows):
        return None
    if all(len(name) > 1 and name[0] == name[-1] == '"' for name in rows[0][1]):  # by a writer that quotes all cells
        return None
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
        joined = sum(1 for cells in reader if cells) < len(rows)
    except csv.Error:
        return rows
    return rows if joined else None
