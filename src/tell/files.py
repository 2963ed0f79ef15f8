"""Small files that somebody else may have written, read with limits: configurations, files of a run or a model."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from tell.errors import TellError, first_line

MOST_TEXT = 1 << 20  # bytes of a configuration, recipe or anchor
MOST_JSON = 512 << 20  # of a JSON file of a model or a run; large tokenizers have 35 MB
MOST_NODES = 200_000  # of a YAML document, aliases counted as often as they stand for something
_LFS = b"version https://git-lfs"


def expanded(path: str | Path) -> Path:
    """``~`` and ``~name`` put in; a name nobody has stays as it is."""
    return Path(os.path.expanduser(path))


def read_bytes(path: Path, *, most: int, remedy: str) -> bytes:
    """The content of a regular file; pipes and devices may never end.

    Raises:
        FileNotFoundError: there is no such file.
        TellError: it is no regular file, too large, a Git LFS pointer, or cannot be read.
    """
    where = str(path)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a pipe or device"
                raise TellError(f"is {kind}, not a file", where=where, remedy=remedy)
            if facts.st_size > most:
                size = f"{facts.st_size / 1e6:,.0f} MB; at most {most / 1e6:,.0f} MB are read"
                raise TellError(f"has {size}", where=where, remedy=remedy)
            with open(handle, "rb", closefd=False) as file:
                data = file.read(most + 1)
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or error
        raise TellError(f"cannot be read ({why})", where=where, remedy=remedy) from error
    if data.startswith(_LFS) and len(data) < 1024:
        raise TellError("is a Git LFS pointer, not the file", where=where, remedy="Run git lfs pull in its folder.")
    return data


def read_text(path: Path, *, most: int = MOST_TEXT, remedy: str) -> str:
    """`read_bytes` as UTF-8 text.

    Raises:
        FileNotFoundError, TellError: as `read_bytes`; it is no UTF-8.
    """
    try:
        return read_bytes(path, most=most, remedy=remedy).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TellError(f"is not UTF-8 ({error.reason})", where=str(path), remedy=remedy) from error


def read_json(path: Path, kind: type = dict, *, most: int = MOST_JSON, remedy: str) -> Any:
    """A JSON file whose outermost value is a ``kind``.

    Raises:
        FileNotFoundError, TellError: as `read_text`; it is no JSON, or holds another kind of value.
    """
    text = read_text(path, most=most, remedy=remedy)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise TellError(f"is not valid JSON ({why})", where=str(path), remedy=remedy) from error
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        raise TellError(f"does not hold {names.get(kind, kind.__name__)}", where=str(path), remedy=remedy)
    return value


class _Loader(yaml.SafeLoader):
    """YAML's plain types, bounded: a few aliases can stand for billions of values."""

    def compose_document(self) -> Any:
        root = super().compose_document()
        if root is not None:
            _count(root, {}, set())
        return root


class _Bomb(ValueError):
    pass


def _count(node: Any, known: dict[int, int], above: set[int]) -> int:
    """Nodes below one, aliases counted as often as they occur."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise _Bomb("an alias stands within what it stands for")
    above.add(id(node))
    total = 1
    for part in node.value if not isinstance(node, yaml.ScalarNode) else ():
        total += sum(_count(n, known, above) for n in (part if isinstance(part, tuple) else (part,)))
        if total > MOST_NODES:
            raise _Bomb(f"it holds more than {MOST_NODES:,} values, aliases filled in")
    above.discard(id(node))
    known[id(node)] = total
    return total


def parse_yaml(text: str, *, where: str, remedy: str = "Mend that line.") -> Any:
    """A YAML document's value.

    Raises:
        TellError: it is not valid, its aliases stand for too much, or a value is impossible (``2001-99-99``).
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise TellError(
            f"is not valid YAML ({getattr(error, 'problem', None) or first_line(error)})",
            where=f"{where}{line}",
            remedy=remedy,
        ) from error
    except RecursionError as error:
        raise TellError("is nested too deeply", where=where, remedy=remedy) from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # of yaml's constructors
        raise TellError(f"is not valid YAML ({first_line(error)})", where=where, remedy=remedy) from error
