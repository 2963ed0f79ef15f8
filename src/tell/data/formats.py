"""Read the records of a file: JSON, JSON Lines, CSV, TSV or Parquet, plain or compressed (.gz, .zst).

To add a format, add an entry to `_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tell.data.bounds import COMPRESSIONS, decompress
from tell.data.delimited import read_csv, read_tsv
from tell.data.json_files import Record, read_json_lines, read_one_json
from tell.data.parquet import read_parquet
from tell.errors import TellError, did_you_mean

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FileFormat:
    """A format of data files, read from text, which may be compressed, or from the file itself.

    Attributes:
        text: takes the text, the path for messages, and a function to call with guesses.
        file: takes the path.
    """

    suffix: str
    text: Callable[[str, Path, Notify], Iterator[Record]] | None = None
    file: Callable[[Path], Iterator[Record]] | None = None


_FORMATS = (
    FileFormat(".json", text=read_one_json),
    FileFormat(".jsonl", text=read_json_lines),
    FileFormat(".ndjson", text=read_json_lines),
    FileFormat(".csv", text=read_csv),
    FileFormat(".tsv", text=read_tsv),
    FileFormat(".parquet", file=read_parquet),
)
FORMATS = {known.suffix: known for known in _FORMATS}
if len(FORMATS) < len(_FORMATS):
    raise ValueError("a suffix has two formats")
_KINDS = [", ".join(known.suffix[1:] for known in _FORMATS if bool(known.text) is kind) for kind in (True, False)]
FORMATS_TEXT = f"{_KINDS[0]} (each also {' or '.join(COMPRESSIONS)}) or {_KINDS[1]}"
_EMPTY = "Use a file with at least two examples."


def format_of(path: str | Path) -> tuple[str, str] | None:
    """(format, compression) from the file name, e.g. ``(".jsonl", ".gz")``; None for an unknown extension."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
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


def read_records(path: str | Path, notify: Notify = lambda text: None) -> Iterator[Record]:
    """Yield (line or row number from 1, record) of every record in the file, in order.

    JSON, JSON Lines, CSV and TSV records carry the line they begin on; Parquet records their row number.
    JSON Lines named ``.json`` and an array named ``.jsonl`` are read by their content.

    Args:
        notify: called with each guess about the file.

    Raises:
        TellError: missing, empty, a folder, an unknown extension, not UTF-8 (byte and line), damaged
            compression, a file that grows too large, broken JSON or CSV (line), or a record that is not an object.
    """
    path = check_file(path)
    found = format_of(path)
    if found is None:
        what = f"has an unknown file type ({''.join(path.suffixes[-2:]) or 'no extension'})"
        raise TellError(what, where=str(path), remedy=f"Save it as {FORMATS_TEXT}, and name it so.")
    known = FORMATS[found[0]]
    text = read_text(path, compression=found[1]) if known.text else ""
    if text.isspace() or not (text if known.text else path.stat().st_size):
        raise TellError("is empty", where=str(path), remedy=_EMPTY)
    records: Iterator[Record] = iter(())
    if known.text:
        records = known.text(text, path, notify)
    elif known.file:
        records = known.file(path)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise TellError("has no rows", where=str(path), remedy=_EMPTY)


def read_text(path: Path, *, compression: str = "") -> str:
    """The file's text, decompressed and decoded as UTF-8 without a byte order mark.

    Raises:
        TellError: unreadable, damaged compression, or bytes that are not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if compression:
        data = decompress(data, compression, path)
    remedy = "Save the file as UTF-8."
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TellError(f"is UTF-16 (byte 0x{data[0]:02x} at offset 0)", where=f"{path}:1", remedy=remedy)
    mark = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + mark
        what = f"is not UTF-8 (byte 0x{data[offset]:02x} at offset {offset})"
        line = data.count(b"\n", 0, offset) + 1
        raise TellError(what, where=f"{path}:{line}", remedy=remedy) from error


def _unreadable(path: Path, error: OSError) -> TellError:
    return TellError(f"cannot be read ({error.strerror})", where=str(path), remedy="Check its permissions.")
