"""Read records from a file: JSON, JSON Lines, CSV, TSV or Parquet, plain or compressed (.gz, .zst)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

from tell.data.bounds import decompress
from tell.data.delimited import read_delimited
from tell.data.json_files import Record, read_json_file
from tell.data.parquet import read_parquet
from tell.errors import TellError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
FORMATS_TEXT = "json, jsonl, csv, tsv (each also .gz or .zst) or parquet"


def format_of(path: str | Path) -> tuple[str, str] | None:
    """(format, compression) from the file name, e.g. ``(".jsonl", ".gz")``; None for an unknown extension."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    if not suffixes or suffixes[-1] not in FORMATS or (compression and suffixes[-1] == ".parquet"):
        return None
    return suffixes[-1], compression


def check_file(path: str | Path, *, remedy: str | None = None) -> Path:
    """``path`` if it is a file.

    Raises:
        TellError: nothing there (with the nearest name in that folder), or a folder.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            inside = sorted(entry.name for entry in path.iterdir() if format_of(entry.name))
            hint = f"Give one file, e.g. {path / inside[0]}." if inside else "Give the path of a file."
            raise TellError("is a folder, not a file", where=str(path), remedy=hint)
        nearest = _nearest_file(path)
    except OSError as error:
        raise TellError(
            f"cannot be read ({error.strerror})", where=str(path), remedy="Check its permissions."
        ) from error
    hint = f"Did you mean {nearest}?" if nearest else remedy or "Check the path."
    raise TellError("no such file", where=str(path), remedy=hint)


def _nearest_file(path: Path) -> Path | None:
    folder = path.parent
    if not folder.is_dir():
        return None
    # Stems, because the same suffix alone makes any two names look alike.
    stem = path.name.lower().partition(".")[0]
    ratio, name = max(
        (
            (difflib.SequenceMatcher(None, stem, entry.name.lower().partition(".")[0]).ratio(), entry.name)
            for entry in folder.iterdir()
            if entry.is_file()
        ),
        default=(0.0, ""),
    )
    return folder / name if ratio >= 0.6 else None


def read_records(path: str | Path, notify: Callable[[str], None] = lambda text: None) -> Iterator[Record]:
    """Yield (line or row number from 1, record) of every record in the file, in order.

    JSON, JSON Lines, CSV and TSV records carry the line they begin on; Parquet records their row number.
    JSON Lines named ``.json`` and an array named ``.jsonl`` are read as what they are.

    Args:
        notify: told what was guessed about the file.

    Raises:
        TellError: missing, empty, a folder, an unknown extension, not UTF-8 (byte and line), damaged
            compression, a file that grows beyond all measure, broken JSON or CSV (line), or a record that is not an
            object.
    """
    path = check_file(path)
    kind = format_of(path)
    if kind is None:
        shown = "".join(path.suffixes[-2:]) or "no extension"
        raise TellError(
            f"has an unknown file type ({shown})",
            where=str(path),
            remedy=f"Save it as {FORMATS_TEXT}, and name it so.",
        )
    if kind[0] == ".parquet":
        if path.stat().st_size == 0:
            raise TellError("is empty", where=str(path), remedy="Give a file with at least two examples.")
        records = read_parquet(path)
    else:
        text = read_text(path, compression=kind[1])
        if not text or text.isspace():
            raise TellError("is empty", where=str(path), remedy="Give a file with at least two examples.")
        if kind[0] in (".csv", ".tsv"):
            records = read_delimited(text, path, kind[0], notify)
        else:
            records = read_json_file(text, path, kind[0])
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise TellError("holds no rows", where=str(path), remedy="Give a file with at least two examples.")


def read_text(path: Path, *, compression: str = "") -> str:
    """The file's text, decompressed, decoded as UTF-8 with a byte order mark tolerated.

    Raises:
        TellError: unreadable, damaged compression, or bytes that are not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TellError(
            f"cannot be read ({error.strerror})", where=str(path), remedy="Check its permissions."
        ) from error
    if compression:
        data = decompress(data, compression, path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TellError(
            f"is UTF-16 (byte 0x{data[0]:02x} at offset 0)", where=f"{path}:1", remedy="Save the file as UTF-8."
        )
    mark = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + mark
        line = data.count(b"\n", 0, offset) + 1
        raise TellError(
            f"is not UTF-8 (byte 0x{data[offset]:02x} at offset {offset})",
            where=f"{path}:{line}",
            remedy="Save the file as UTF-8.",
        ) from error
