"""Read the records of a file: JSON, JSON Lines, CSV, TSV (each also .gz or .zst), Parquet, or a sheet of a workbook.

To add a format, add an entry to `_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tell.data.bounds import COMPRESSIONS, decompress
from tell.data.delimited import read_csv, read_tsv
from tell.data.encodings import decode
from tell.data.file_read import FileRead
from tell.data.json_files import Record, read_json_lines, read_one_json
from tell.data.parquet import read_parquet
from tell.data.workbook import WORKBOOKS, read_workbook, split_sheet, with_sheet
from tell.errors import TellError, did_you_mean

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FileFormat:
    """A format of data files, read from text, which may be compressed, or from the file itself.

    Attributes:
        text: takes the text, the path for messages, and a function to call with guesses.
        file: takes the path.
        sheet: takes the path, what is found out about the file, and the name of a sheet or None.
    """

    suffix: str
    text: Callable[[str, Path, Notify], Iterator[Record]] | None = None
    file: Callable[[Path], Iterator[Record]] | None = None
    sheet: Callable[[Path, FileRead, str | None], Iterator[Record]] | None = None


_FORMATS = (
    FileFormat(".json", text=read_one_json),
    FileFormat(".jsonl", text=read_json_lines),
    FileFormat(".ndjson", text=read_json_lines),
    FileFormat(".csv", text=read_csv),
    FileFormat(".tsv", text=read_tsv),
    FileFormat(".parquet", file=read_parquet),
    *(FileFormat(suffix, sheet=read_workbook) for suffix in WORKBOOKS),
)
FORMATS = {known.suffix: known for known in _FORMATS}
if len(FORMATS) < len(_FORMATS):
    raise ValueError("a suffix has two formats")
_KINDS = [", ".join(known.suffix[1:] for known in _FORMATS if bool(known.text) is kind) for kind in (True, False)]
FORMATS_TEXT = f"{_KINDS[0]} (each also {' or '.join(COMPRESSIONS)}) or {_KINDS[1]}"
_EMPTY = "Use a file with at least two examples."


def format_of(path: str | Path) -> tuple[str, str] | None:
    """(format, compression) from the file name, e.g. ``(".jsonl", ".gz")``; None for an unknown extension.

    A sheet after the name of a workbook (``book.xlsx#Train``) does not count.
    """
    suffixes = [suffix.lower() for suffix in Path(split_sheet(path)[0]).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    known = FORMATS.get(suffixes[-1]) if suffixes else None
    return (known.suffix, compression) if known and (known.text or not compression) else None


def check_file(path: str | Path, *, remedy: str | None = None) -> Path:
    """``path`` if it is a file.

    Raises:
        TellError: there is no such file (with the nearest name in that folder), or it is a folder.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            inside = sorted(entry.name for entry in path.iterdir() if format_of(entry.name))
            hint = f"Name one file, e.g. {path / inside[0]}." if inside else "Name a file."
            raise TellError("is a folder, not a file", where=str(path), remedy=hint)
        nearest = _nearest_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    hint = f"Did you mean {nearest}?" if nearest else remedy or "Check the path."
    raise TellError("no such file", where=str(path), remedy=hint)


def _nearest_file(path: Path) -> Path | None:
    files = [entry.name for entry in path.parent.iterdir() if entry.is_file()] if path.parent.is_dir() else []
    # Compare stems, because a common suffix alone makes any two names look alike.
    stems = {name.lower().partition(".")[0]: name for name in files}
    close = did_you_mean(path.name.lower().partition(".")[0], stems)
    return path.parent / stems[close] if close else None


def read_records(path: str | Path, found: FileRead | None = None) -> Iterator[Record]:
    """Yield (line or row number from 1, record) of every record in the file, in order.

    JSON, JSON Lines, CSV and TSV records carry the line they begin on; those of Parquet and workbooks their row.
    JSON Lines named ``.json`` and an array named ``.jsonl`` are read by their content.

    Args:
        path: of a workbook also ``FILE#SHEET``.
        found: gets encoding, sheet and notices of each guess about the file; None: text must be UTF-8.

    Raises:
        TellError: missing, empty, a folder, an unknown extension, in no known encoding (byte and line), damaged
            compression, a file that grows too large, broken JSON or CSV (line), or a record that is not an object; of a
            workbook see `tell.data.workbook.read_workbook`.
    """
    named, sheet = split_sheet(path)
    path = check_file(named)
    kind = format_of(path)
    if kind is None:
        what = f"has an unknown file type ({''.join(path.suffixes[-2:]) or 'no extension'})"
        raise TellError(what, where=str(path), remedy=f"Save it as {FORMATS_TEXT}, and name it so.")
    known = FORMATS[kind[0]]
    text = read_text(path, compression=kind[1], found=found) if known.text else ""
    found = FileRead() if found is None else found
    if text.isspace() or not (text if known.text else path.stat().st_size):
        raise TellError("is empty", where=str(path), remedy=_EMPTY)
    records: Iterator[Record] = iter(())
    if known.text:
        records = known.text(text, path, found.notices.append)
    elif known.file:
        records = known.file(path)
    elif known.sheet:
        records = known.sheet(path, found, sheet)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise TellError("has no rows", where=with_sheet(path, found.sheet), remedy=_EMPTY)


def column_names(path: str | Path, most: int = 1000, *, found: FileRead | None = None) -> list[str]:
    """The names that the first records of a file have.

    Raises:
        TellError: as `read_records`.
    """
    records = islice(read_records(path, found or FileRead()), most)
    return list(dict.fromkeys(str(name) for _, record in records for name in record))


def read_text(path: Path, *, compression: str = "", found: FileRead | None = None) -> str:
    """The file's text, decompressed and decoded, without a byte order mark.

    Args:
        found: gets the encoding; None: it must be UTF-8.

    Raises:
        TellError: unreadable, damaged compression, or bytes in no encoding that is known.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return decode(decompress(data, compression, path) if compression else data, path, found)


def _unreadable(path: Path, error: OSError) -> TellError:
    return TellError(f"cannot be read ({error.strerror})", where=str(path), remedy="Check its permissions.")
