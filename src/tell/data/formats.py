"""Read records from a file: JSON, JSON Lines, CSV, TSV or Parquet, plain or compressed (.gz, .zst)."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tell.errors import TellError

Record = tuple[int, dict[str, Any]]

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
FORMATS_TEXT = "json, jsonl, csv, tsv (each also .gz or .zst) or parquet"
_NOT_WRAPPERS = {"messages", "conversations", "conversation"}
_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, position: int) -> int:
    """Offset of the first character from ``position`` that is not white space."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


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


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield (line or row number from 1, record) of every record in the file, in order.

    JSON, JSON Lines, CSV and TSV records carry the line they begin on; Parquet records their row number.
    JSON Lines named ``.json`` and an array named ``.jsonl`` are read as what they are.

    Raises:
        TellError: missing, empty, a folder, an unknown extension, not UTF-8 (byte and line), damaged
            compression, broken JSON or CSV (line), or a record that is not an object.
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
        records = _parquet(path)
    else:
        text = read_text(path, compression=kind[1])
        if not text or text.isspace():
            raise TellError("is empty", where=str(path), remedy="Give a file with at least two examples.")
        if kind[0] in (".csv", ".tsv"):
            records = _csv(text, path, kind[0])
        elif _is_lines(text, kind[0]):
            records = _json_lines(text, path)
        else:
            records = _json(text, path)
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
        data = _decompress(data, compression, path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TellError(
            f"is UTF-16 (byte 0x{data[0]:02x} at offset 0)", where=f"{path}:1", remedy="Save the file as UTF-8."
        )
    mark = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + mark
        raise TellError(
            f"is not UTF-8 (byte 0x{data[offset]:02x} at offset {offset})",
            where=_at(path, data.count(b"\n", 0, offset) + 1),
            remedy="Save the file as UTF-8.",
        ) from error


def _at(path: Path, line: int) -> str:
    return f"{path}:{line}"


def _decompress(data: bytes, compression: str, path: Path) -> bytes:
    try:
        if compression == ".gz":
            import gzip

            return gzip.decompress(data)
        import zstandard

        parts = []
        while data:  # frame by frame: zstandard's stream reader would take a file cut short for a whole one
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(data))
            if not frame.eof:
                raise EOFError("it ends in the middle of a frame")
            data = frame.unused_data
        return b"".join(parts)
    except Exception as error:  # zlib.error, EOFError, BadGzipFile, ZstdError: all mean the same to the user
        raise TellError(
            f"is not a complete {compression} file ({error})",
            where=str(path),
            remedy="Copy or compress it again.",
        ) from error


def _is_lines(text: str, suffix: str) -> bool:
    start = _skip(text, 0)
    if suffix != ".json":
        return text[start] != "["
    if text[start] != "{":
        return False
    # JSON Lines under the name .json: the first line is a whole object and something follows it.
    first, _, rest = text[start:].partition("\n")
    if not rest.strip():
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _json_lines(text: str, path: Path) -> Iterator[Record]:
    loads = json.loads
    # Not splitlines(): it would also break at U+2028 and others that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            record = loads(line)
        except (ValueError, RecursionError) as error:
            if not line or line.isspace():
                continue
            raise TellError(
                f"is not valid JSON ({_json_fault(error)})",
                where=_at(path, number),
                remedy="Mend that line: JSON Lines holds one object a line.",
            ) from error
        if type(record) is not dict:
            raise _not_an_object(record, _at(path, number))
        yield number, record


def _json(text: str, path: Path) -> Iterator[Record]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise TellError(
            f"is not valid JSON ({_json_fault(error)})", where=_at(path, line), remedy="Mend that line."
        ) from error
    start = _skip(text, 0)
    if isinstance(data, dict):
        arrays = {
            key: offset
            for key, offset, value in _members(text, start)
            if isinstance(value, list) and value and isinstance(value[0], dict)
        }
        if _NOT_WRAPPERS & arrays.keys() or not any(isinstance(value, list) for value in data.values()):
            yield 1, data  # one record on its own
            return
        if len(arrays) != 1:
            found = f"{len(arrays)} arrays of objects ({', '.join(arrays)})" if arrays else "no array of objects"
            raise TellError(
                f"holds {found}", where=str(path), remedy="Save the one array you want, as a file of its own."
            )
        start = next(iter(arrays.values()))
    elif not isinstance(data, list):
        raise _not_an_object(data, _at(path, 1))
    line, last = 1, 0
    for offset, record in _elements(text, start):
        line, last = line + text.count("\n", last, offset), offset
        if not isinstance(record, dict):
            raise _not_an_object(record, _at(path, line))
        yield line, record


# The two walks below tell where a value begins, which json.loads does not; they run on text that
# json.loads has accepted, so they need no error handling of their own.


def _elements(text: str, start: int) -> Iterator[tuple[int, Any]]:
    """(offset, value) of every element of the array that begins at ``start``."""
    decode = json.JSONDecoder().raw_decode
    position = _skip(text, start + 1)
    while text[position] != "]":
        value, end = decode(text, position)
        yield position, value
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)


def _members(text: str, start: int) -> Iterator[tuple[str, int, Any]]:
    """(key, offset of the value, value) of every member of the object that begins at ``start``."""
    decode = json.JSONDecoder().raw_decode
    position = _skip(text, start + 1)
    while text[position] != "}":
        key, end = decode(text, position)
        position = _skip(text, text.index(":", end) + 1)
        value, end = decode(text, position)
        yield key, position, value
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)


def _json_fault(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _not_an_object(value: Any, where: str) -> TellError:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    return TellError(f"is {shown}, not an object", where=where, remedy='Write {"prompt": ..., "completion": ...}.')


def _csv(text: str, path: Path, suffix: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long documents
    delimiter = "\t"
    if suffix == ".csv":
        head = text.partition("\n")[0]
        # Spreadsheets of many countries write semicolons.
        delimiter = ";" if ";" in head and "," not in head else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                twice = next((name for name in header if header.count(name) > 1), None)
                if twice is not None:
                    raise TellError(
                        f"names the column {twice!r} twice", where=_at(path, start), remedy="Rename one of them."
                    )
                continue
            if len(cells) != len(header):
                raise TellError(
                    f"has {len(cells)} cells where the header has {len(header)}",
                    where=_at(path, start),
                    remedy="Put quotes around cells that hold the separator.",
                )
            yield start, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise TellError(
            f"is not valid {suffix[1:].upper()} ({error})",
            where=_at(path, line),
            remedy="Close the quotes of that row, and double quotes inside a quoted cell.",
        ) from error


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.stat().st_size == 0:
        raise TellError("is empty", where=str(path), remedy="Give a file with at least two examples.")
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError) as error:
        raise TellError(
            f"is not a readable Parquet file ({str(error).splitlines()[0]})",
            where=_at(path, number + 1) if number else str(path),
            remedy="Write it again.",
        ) from error
