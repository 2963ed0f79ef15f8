"""Records of JSON and JSON Lines files, each with the line it begins on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tell.data.json_text import FILES, check_depth, read_json
from tell.errors import TellError
from tell.shown import brief

Record = tuple[int, dict[str, object]]

_NOT_WRAPPERS = {"messages", "conversations", "conversation"}
_SPACE = re.compile(r"[ \t\r\n]*")
_FIX = "Fix that line."


def read_json_lines(text: str, path: Path, notify: Callable[[str], None]) -> Iterator[Record]:
    """Records of ``.jsonl``; an array is read as one."""
    return _json(text, path) if text[_skip(text, 0)] == "[" else _json_lines(text, path)


def read_one_json(text: str, path: Path, notify: Callable[[str], None]) -> Iterator[Record]:
    """Records of ``.json``: an array, an object around one array, one record on its own, or JSON Lines."""
    return _json_lines(text, path) if _is_lines(text) else _json(text, path)


def _skip(text: str, position: int) -> int:
    """Offset of the first character from ``position`` that is not white space."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _is_lines(text: str) -> bool:
    """Whether the first line is a whole object and something follows it."""
    first, _, rest = text[_skip(text, 0) :].partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        read_json(first)
    except ValueError:
        return False
    return True


def _json_lines(text: str, path: Path) -> Iterator[Record]:
    whole = len(text.strip())
    # Not splitlines(): it would also break at U+2028 and others that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            record = read_json(line)
        except ValueError as error:
            if not line or line.isspace():
                continue
            raise _not_json(error, f"{path}:{number}", "Fix that line: JSON Lines has one object per line.") from error
        if type(record) is not dict:
            raise _not_an_object(record, f"{path}:{number}")
        if len(line) >= whole:  # the only one
            _refuse_columns(record, path)
        yield number, record


def _json(text: str, path: Path) -> Iterator[Record]:
    try:
        data = json.loads(text)  # syntax alone; the elements are read again below, strictly and with their lines
    except (ValueError, RecursionError) as error:
        raise _not_json(error, f"{path}:{getattr(error, 'lineno', 1)}", _FIX) from error
    start = _skip(text, 0)
    if isinstance(data, dict):
        _refuse_columns(data, path)
        array = _wrapped(text, start, data, path)
        if array is None:
            try:
                yield 1, read_json(text)
            except ValueError as error:
                raise _not_json(error, f"{path}:1", "Fix it.") from error
            return
        start = array
    elif not isinstance(data, list):
        raise _not_an_object(data, f"{path}:1")
    del data
    line, last, position = 1, 0, _skip(text, start + 1)
    while text[position] != "]":
        line, last = line + text.count("\n", last, position), position
        try:
            record, end = FILES.raw_decode(text, position)
            check_depth(record)
        except (ValueError, RecursionError) as error:
            raise _not_json(error, f"{path}:{line}", "Fix that record.") from error
        if not isinstance(record, dict):
            raise _not_an_object(record, f"{path}:{line}")
        yield line, record
        position = _next(text, end)


def _wrapped(text: str, start: int, data: dict[str, object], path: Path) -> int | None:
    """Offset of the one array of records in an object; None where the object is itself a record."""
    members = list(_members(text, start))
    twice = next((key for key, count in Counter(key for key, _, _ in members).items() if count > 1), None)
    if twice is not None:
        raise _not_json(ValueError(f"key {brief(twice)} occurs twice"), f"{path}:1", "Rename one of them.")
    arrays = {key: at for key, at, value in members if isinstance(value, list) and value and isinstance(value[0], dict)}
    if _NOT_WRAPPERS & arrays.keys() or not any(isinstance(value, list) for value in data.values()):
        return None
    if len(arrays) != 1:
        found = f"{len(arrays)} arrays of objects ({', '.join(arrays)})" if arrays else "no array of objects"
        raise TellError(f"holds {found}", where=str(path), remedy="Save the array you want as a separate file.")
    return next(iter(arrays.values()))


def _members(text: str, start: int) -> Iterator[tuple[str, int, object]]:
    """(key, offset of the value, value) of every member of the object that begins at ``start`` in valid JSON."""
    decode = json.JSONDecoder().raw_decode
    position = _skip(text, start + 1)
    while text[position] != "}":
        key, end = decode(text, position)
        position = _skip(text, text.index(":", end) + 1)
        value, end = decode(text, position)
        yield key, position, value
        position = _next(text, end)


def _next(text: str, end: int) -> int:
    """Offset of the element after the one that ends at ``end``, or of the closing bracket."""
    position = _skip(text, end)
    return _skip(text, position + 1) if text[position] == "," else position


def _refuse_columns(data: dict[str, object], path: Path) -> None:
    """Refuse what ``DataFrame.to_json`` writes by default: an object of columns (or rows), each keyed by the index."""
    parts = [part for part in data.values() if isinstance(part, dict) and part]
    if not parts or len(parts) < len(data) or any(part.keys() != parts[0].keys() for part in parts):
        return
    if len(parts) > 1 or all(key.isdigit() for key in parts[0]) or all(key.isdigit() for key in data):
        raise TellError(
            "contains columns, not rows, as pandas' to_json writes by default",
            where=str(path),
            remedy='Write it with df.to_json(path, orient="records", lines=True).',
        )


def _not_json(error: BaseException, where: str, remedy: str) -> TellError:
    fault = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        fault = f"{error.msg}, column {error.colno}"
    elif "int_max_str_digits" in fault:
        fault = "a number is too large"
    return TellError(f"is not valid JSON ({fault})", where=where, remedy=remedy)


def _not_an_object(value: object, where: str) -> TellError:
    what = f"is {brief(json.dumps(value, ensure_ascii=False))}, not an object"
    return TellError(what, where=where, remedy='Write {"prompt": ..., "completion": ...}.')
