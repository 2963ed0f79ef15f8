"""Reads one sheet of a workbook; run as a process of its own (`tell.data.workbook`), and imports nothing of TELL.

A workbook may come from anybody, and the library aborts the process where memory runs out: one cell in the last corner
of a sheet is enough. Here that ends a process with bounds on memory and time, not the run.

Prints JSON Lines: facts of the workbook (or a fault), then ``[row number from 0, cells]`` of each row with cells.
A cell is a text, number, true, false or null; ``{"error": "#REF!"}`` for a formula error. Dates are ISO 8601.
"""

from __future__ import annotations

import datetime
import json
import posixpath
import re
import sys
import zipfile
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

MEMORY = 4 * 2**30
SECONDS = 600  # of CPU time
NO_MEMORY, NO_LIBRARY = 3, 4  # statuses of the process
EXACT = 1e15  # Excel keeps 15 digits; a larger number is no count
ERRORS = frozenset({"#REF!", "#N/A", "#VALUE!", "#DIV/0!", "#NAME?", "#NUM!", "#NULL!", "#SPILL!", "#CALC!"})
_ODS_ERROR = re.compile(rb"""value-type=["']error""")
_ODS_SPANS = re.compile(rb"""number-rows-spanned=["'](?!1["'])""")
_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def main(path: str, wanted: str | None) -> None:
    _bound()
    try:
        for line in _lines(path, wanted):
            sys.stdout.write(json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n")
    except MemoryError:
        sys.exit(NO_MEMORY)
    except ImportError:
        sys.exit(NO_LIBRARY)


def _bound() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _lines(path: str, wanted: str | None) -> Iterator[Any]:
    import python_calamine as calamine

    try:
        workbook = calamine.load_workbook(path)
        kinds = calamine.SheetTypeEnum.WorkSheet, calamine.SheetVisibleEnum.Visible
        sheets = {about.name: about.visible == kinds[1] for about in workbook.sheets_metadata if about.typ == kinds[0]}
        name = wanted if wanted is not None else next((n for n, seen in sheets.items() if seen), next(iter(sheets), ""))
        if name not in sheets:
            yield {"fault": "sheet", "sheets": sheets}
            return
        sheet = workbook.get_sheet_by_name(name)
    except calamine.PasswordError:
        yield {"fault": "password"}
        return
    except Exception as error:
        yield {"fault": "damaged", "why": str(error)}
        return
    notes = _Notes()
    if zipfile.is_zipfile(path):
        notes.read(path, name)
    down, left = sheet.start or (0, 0)
    fills, columns = _fills(sheet.merged_cell_ranges or [])
    yield {
        "sheet": name,
        "sheets": sheets,
        "hidden": notes.hidden,
        "errors": notes.state,
        "spans": notes.spans,
        "merged": [cell_name(row, column) for (row, column), _ in fills],
    }
    held: dict[int, Any] = {}
    for row, cells in enumerate(sheet.to_python(), down):
        out = [None] * left + [_plain(cell) for cell in cells]
        for column, fault in notes.errors.get(row, {}).items():
            out += [None] * (column + 1 - len(out))
            out[column] = {"error": fault}
        for (first, column), last in columns.get(row, ()):
            held[column] = (out[column] if column < len(out) else None, first, last)
        for column, (value, first, last) in list(held.items()):
            if row > last:
                del held[column]
            elif row > first and value is not None:
                out += [None] * (column + 1 - len(out))
                out[column] = value
        while out and out[-1] is None:
            out.pop()
        if out:
            yield [row, out]


def _fills(ranges: list) -> tuple[list, dict[int, list]]:
    """Merged ranges over several rows, ((first row, column), last row), and the same by their first row."""
    found = [((top, left), bottom) for (top, left), (bottom, _) in ranges if bottom > top]
    by_row: dict[int, list] = {}
    for (top, left), bottom in found:
        by_row.setdefault(top, []).append(((top, left), bottom))
    return found, by_row


def _plain(cell: object) -> object:
    if isinstance(cell, str):
        return {"error": cell} if cell in ERRORS else cell if cell.strip() else None
    if isinstance(cell, float):  # spreadsheets keep all numbers as floats
        if cell != cell or cell in (float("inf"), float("-inf")):
            return None
        return int(cell) if cell.is_integer() and abs(cell) < EXACT else cell
    if isinstance(cell, datetime.datetime | datetime.date | datetime.time):
        return cell.isoformat()
    if isinstance(cell, datetime.timedelta):
        minutes, seconds = divmod(int(cell.total_seconds()), 60)
        return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
    return cell if isinstance(cell, bool | int) or cell is None else str(cell)


def cell_name(row: int, column: int) -> str:
    """``C14`` for (13, 2)."""
    letters = ""
    column += 1
    while column:
        column, rest = divmod(column - 1, 26)
        letters = chr(65 + rest) + letters
    return f"{letters}{row + 1}"


class _Notes:
    """What the library does not tell of a sheet: formula errors, which it returns as empty cells, and hidden rows.

    Attributes:
        errors: row to column to the error.
        state: ``named``: `errors` has them all; ``lost``: there are some, and they are empty cells; ``unknown``: there
            may be some.
        spans: cells are merged over rows, and the library does not say which.
    """

    def __init__(self) -> None:
        self.errors: dict[int, dict[int, str]] = {}
        self.hidden, self.state, self.spans = 0, "unknown", False
        self._row = self._column = -1
        self._error: list[str] | None = None
        self._value = False

    def read(self, path: str, sheet: str) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                if "content.xml" in archive.namelist():  # .ods
                    text = archive.read("content.xml")
                    self.state = "lost" if _ODS_ERROR.search(text) else "named"
                    self.spans = bool(_ODS_SPANS.search(text))
                    return
                text = archive.read(_part(archive, sheet))
            if b"hidden=" in text or b't="e"' in text or b"t='e'" in text:
                self._parse(text)
            self.state = "named"
        except (KeyError, ValueError, StopIteration, zipfile.BadZipFile, ElementTree.ParseError, expat.ExpatError):
            return  # of a form that we do not know; the notice says that errors are not

    def _parse(self, text: bytes) -> None:
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.Parse(text, True)

    def _start(self, name: str, given: dict[str, str]) -> None:
        name = name.rpartition(" ")[2]
        if name == "row":
            self._row = int(given["r"]) - 1 if "r" in given else self._row + 1
            self._column = -1
            self.hidden += given.get("hidden") in ("1", "true")
        elif name == "c":
            self._column = _column(given["r"]) if "r" in given else self._column + 1
            self._error = [] if given.get("t") == "e" else None
        self._value = name == "v"

    def _text(self, text: str) -> None:
        if self._value and self._error is not None:
            self._error.append(text)

    def _end(self, name: str) -> None:
        name = name.rpartition(" ")[2]
        if name == "c" and self._error is not None:
            self.errors.setdefault(self._row, {})[self._column] = "".join(self._error)[:20] or "an error"
        if name == "v":
            self._value = False


def _part(archive: zipfile.ZipFile, sheet: str) -> str:
    """The name of a sheet's own part in an .xlsx file."""
    book = ElementTree.fromstring(archive.read("xl/workbook.xml"))
    number = next(node.get(_RELATION) for node in book.iter(f"{_MAIN}sheet") if node.get("name") == sheet)
    relations = ElementTree.fromstring(archive.read("xl/_rels/workbook.xml.rels"))
    target = next(str(node.get("Target")) for node in relations if node.get("Id") == number)
    return target.lstrip("/") if target.startswith("/") else posixpath.normpath(posixpath.join("xl", target))


def _column(reference: str) -> int:
    """``C14`` to 2."""
    number = 0
    for letter in reference:
        if not letter.isalpha():
            break
        number = 26 * number + ord(letter.upper()) - 64
    return number - 1


if __name__ == "__main__":
    sys.path.append(sys.argv[1])  # the folder of the library
    main(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
