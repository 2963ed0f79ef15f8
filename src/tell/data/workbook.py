"""Records of one sheet of a workbook (.xlsx, .xls, .ods), each with the number of its row.

The workbook is read in a process of its own (`tell.data.workbook_process`), with bounds on memory and time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from tell.data import workbook_process
from tell.data.bounds import Allowance
from tell.data.file_read import FileRead
from tell.data.json_text import read_json
from tell.data.parquet import BadCell
from tell.data.workbook_process import cell_name
from tell.errors import TellError, did_you_mean
from tell.shown import NAMES, listed

WORKBOOKS = (".xlsx", ".xls", ".ods")
_SHEET = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, WORKBOOKS))}))#(.*)", re.IGNORECASE | re.DOTALL)
_SAVE = "Save it again as .xlsx, or as CSV."
_ENCRYPTED = "EncryptedPackage".encode("utf-16-le")  # a stream of the container that Excel wraps it in
_Row = tuple[int, list[object]]  # from 0


def split_sheet(source: str | Path) -> tuple[str, str | None]:
    """A path and the sheet after its ``#``; None where a file has that very name, or no workbook is named."""
    text = str(source)
    found = _SHEET.fullmatch(text)
    if found is None or os.path.exists(os.path.expanduser(text)):
        return text, None
    return found[1], found[2]


def with_sheet(path: str | Path, sheet: str | None) -> str:
    """What `split_sheet` takes apart."""
    return str(path) if sheet is None else f"{path}#{sheet}"


def read_workbook(path: Path, found: FileRead, sheet: str | None = None) -> Iterator[tuple[int, dict[str, object]]]:
    """(row number from 1, record) of every row below the first one, which has the column names; empty rows are skipped.

    Numbers without a fraction are whole numbers, dates are text by ISO 8601, empty cells are None. A cell merged over
    rows counts in each of them. A formula error is a `BadCell`: only rows that need it are refused.

    Args:
        found: gets the sheet, its siblings and the notices.
        sheet: its name; None for the first one that is not hidden.

    Raises:
        TellError: no workbook, protected by a password, damaged or too large; no such sheet, an empty one, or one
            whose first row has no column names; python-calamine is not installed, or cannot be imported.
    """
    library = find_spec("python_calamine")
    if library is None or library.origin is None:  # removed, or left out where packages are chosen by hand
        raise _no_library(path, "is not installed")
    _check_container(path)
    with _process(path, sheet, Path(library.origin).parents[1]) as lines:
        facts = next(lines, None)
        if facts is None:
            raise TellError("is not a readable workbook", where=str(path), remedy=_SAVE)
        found.sheets = tuple(facts.get("sheets", ()))
        if "fault" in facts:
            raise _fault(path, sheet, facts)
        found.sheet = facts["sheet"]
        found.notices += _notices(path, facts)
        rows = ((row, [_cell(cell, row, i) for i, cell in enumerate(cells)]) for row, cells in lines)
        yield from _records(rows, path, found)


def _check_container(path: Path) -> None:
    """Refuse what is no workbook, or unpacks to more than `Allowance` permits."""
    with path.open("rb") as file:
        head = file.read(2**20)
    if head.startswith(b"PK"):
        allowance = Allowance(path)
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    allowance.take(member.file_size)
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise TellError(f"is a damaged workbook ({error})", where=str(path), remedy="Copy it again.") from error
    elif head.startswith(b"\xd0\xcf\x11\xe0"):  # the container of .xls, and of an encrypted .xlsx
        if _ENCRYPTED in head or _ENCRYPTED in path.read_bytes():
            raise _protected(path)
    elif head.lstrip()[:1] == b"<":
        what = "is HTML or XML under the name of a workbook, as many web pages export"
        raise TellError(what, where=str(path), remedy=f"Open it in a spreadsheet program. {_SAVE}")
    elif not head.startswith((b"\x09\x08", b"\x09\x04", b"\x09\x02", b"\x09\x00")):  # .xls before its container
        what = f"is not a workbook ({path.suffix} in name only)"
        raise TellError(what, where=str(path), remedy="Name it as what it is, e.g. .csv, or save it again as .xlsx.")


@contextmanager
def _process(path: Path, sheet: str | None, library: Path) -> Iterator[Iterator[Any]]:
    """The lines that the reading process prints, as values; it is ended with the block.

    Args:
        library: the folder that has python-calamine.

    Raises:
        TellError: it ends before its last line, or prints more than `Allowance` permits.
    """
    # Isolated, Python looks neither in the user's site-packages nor in PYTHONPATH, where the library may be.
    command = [sys.executable, "-I", "-X", "utf8", workbook_process.__file__, str(library), str(path.resolve())]
    process = subprocess.Popen(
        [*command, *([] if sheet is None else [sheet])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None

    def lines(file: IO[bytes]) -> Iterator[Any]:
        allowance = Allowance(path)
        for line in file:
            allowance.take(len(line))
            yield read_json(line.decode())
        if (status := process.wait()) == 1:
            raise TellError("is not a readable workbook", where=str(path), remedy=_SAVE)
        if status == workbook_process.NO_LIBRARY:
            raise _no_library(path, "cannot be imported")
        if status:  # ended by the system, by the library, or by itself
            raise _too_large(path)

    try:
        yield lines(process.stdout)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def _fault(path: Path, sheet: str | None, facts: dict[str, Any]) -> TellError:
    if facts["fault"] == "password":
        return _protected(path)
    if facts["fault"] == "damaged":
        why = " ".join(str(facts["why"]).split())
        return TellError(f"is not a readable workbook ({why})", where=str(path), remedy=_SAVE)
    names = list(facts["sheets"])
    if sheet is None:
        return TellError("has no sheet with cells", where=str(path), remedy=_SAVE)
    near = did_you_mean(sheet, names)
    what = f"there is no sheet {sheet!r} in {path}"
    return TellError(
        what, where=f"{path}#{sheet}", remedy=f"The sheets are {listed(names)}.", nearest=near and repr(near)
    )


def _no_library(path: Path, why: str) -> TellError:
    what = f"python-calamine, which reads workbooks, {why}"
    return TellError(what, where=str(path), remedy="pip install python-calamine, or save the sheet as CSV.")


def _protected(path: Path) -> TellError:
    remedy = "Open it, take the password off, and save it under another name."
    return TellError("is protected by a password", where=str(path), remedy=remedy)


def _too_large(path: Path) -> TellError:
    most = workbook_process.MEMORY // 2**30
    what = f"cannot be read in {most} GiB of memory and {workbook_process.SECONDS // 60} minutes"
    remedy = "Delete what is far below or to the right of its rows, or save the sheet as CSV."
    return TellError(what, where=str(path), remedy=remedy)


def _notices(path: Path, facts: dict[str, Any]) -> list[str]:
    name, sheets = facts["sheet"], facts["sheets"]
    out = []
    if others := [other for other in sheets if other != name]:
        hidden = "" if all(sheets.values()) else f"; hidden: {listed([n for n in sheets if not sheets[n]])}"
        out.append(f"sheet {name!r} is read; the others are {listed(others)} (write {path.name}#SHEET){hidden}")
    if facts["hidden"]:
        out.append(f"hidden rows are read as well: {facts['hidden']:,}")
    if merged := facts["merged"]:
        shown = ", ".join(merged[:NAMES]) + (" ..." if len(merged) > NAMES else "")
        out.append(f"cells merged over rows count in each of them: {shown}")
    if facts["spans"]:
        out.append("of cells merged over rows only the first has the value; save it as .xlsx to have it in each")
    if facts["errors"] == "lost":
        out.append("formula errors are read as empty cells; save it as .xlsx to have them named")
    if facts["errors"] == "unknown":
        out.append(f"formula errors, if there are any, are read as empty cells ({path.suffix} does not show them)")
    return [f"{path.name}: {text}" for text in out]


def _cell(cell: object, row: int, column: int) -> object:
    if isinstance(cell, dict):
        return BadCell(f"holds the formula error {cell.get('error')} ({cell_name(row, column)})")
    return cell


def _records(rows: Iterator[_Row], path: Path, found: FileRead) -> Iterator[tuple[int, dict[str, object]]]:
    top, header = next(rows, (0, []))
    names = [_column_name(cell) for cell in header]
    named = [name for name in names if name]
    where = f"{path}#{found.sheet}"
    if not names:
        others = [name for name in found.sheets if name != found.sheet]
        more = f" The others are {listed(others)}." if others else ""
        raise TellError(f"the sheet {found.sheet!r} is empty", where=str(path), remedy=f"Name a sheet with rows.{more}")
    twice = next((name for name, count in Counter(named).items() if count > 1), None)
    if twice is not None:
        places = [cell_name(top, i) for i, name in enumerate(names) if name == twice]
        what = f"names the column {twice!r} in {' and '.join(places[:3])}"
        raise TellError(what, where=where, remedy="Rename one of them.")
    unnamed: dict[int, str] = {}
    for row, cells in rows:
        for i, cell in enumerate(cells):
            if cell is not None and not (i < len(names) and names[i]):
                unnamed.setdefault(i, cell_name(row, i))
        if len(named) == 1 and unnamed:
            what = f"row {top + 1} has one name ({named[0]!r}), but row {row + 1} has {len(cells)} columns"
            raise TellError(what, where=where, remedy="Delete the rows above the column names.")
        record = {name: cells[i] if i < len(cells) else None for i, name in enumerate(names) if name}
        if any(value is not None for value in record.values()):
            yield row + 1, record
    if unnamed:
        first = ", ".join(list(unnamed.values())[:NAMES])
        found.notices.append(f"{path.name}: columns without a name are not used, the first cell of each is {first}")


def _column_name(cell: object) -> str:
    """A header's cell on one line: spreadsheets break long names."""
    if isinstance(cell, BadCell):
        return ""
    return "" if cell is None else " ".join(str(cell).split())
