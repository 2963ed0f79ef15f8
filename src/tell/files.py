"""Reads files with limits, since they may be untrusted, and writes them atomically."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from tell.errors import TellError, Unwritable, first_line

MOST_TEXT = 1 << 20  # bytes of a configuration, recipe or anchor
MOST_JSON = 512 << 20  # of a JSON file of a model or a run; large tokenizers have 35 MB
MOST_NODES = 200_000  # of a YAML document, with aliases expanded
SMALL = 1 << 14  # of a file whose facts are kept in memory
MOST_LINE = 1 << 20  # of a row of a file that is being written
DAMAGED = "Run it again (`tell tune --overwrite`), or restore the file."
_LFS = b"version https://git-lfs"


def expanded(path: str | Path) -> Path:
    """The path with ``~`` and ``~name`` expanded; an unknown or impossible user's name stays as it is."""
    with suppress(ValueError):  # a NUL in it
        return Path(os.path.expanduser(path))
    return Path(path)


def read_bytes(path: Path, *, most: int, remedy: str) -> bytes:
    """The content of a regular file; pipes and devices may never end.

    Raises:
        FileNotFoundError: there is no such file.
        TellError: it is not a regular file, too large, a Git LFS pointer, or cannot be read.
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
        FileNotFoundError, TellError: as `read_bytes`; it is not UTF-8.
    """
    try:
        return read_bytes(path, most=most, remedy=remedy).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TellError(f"is not UTF-8 ({error.reason})", where=str(path), remedy=remedy) from error


def read_json(path: Path, *, most: int = MOST_JSON, remedy: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        FileNotFoundError, TellError: as `read_text`; it is not JSON, or holds another kind of value.
    """
    text = read_text(path, most=most, remedy=remedy)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise TellError(f"is not valid JSON ({why})", where=str(path), remedy=remedy) from error
    if not isinstance(value, dict):
        raise TellError("is not a JSON object", where=str(path), remedy=remedy)
    return value


Stamp = tuple[float, int, int, int]


def stamp(path: Path) -> Stamp:
    """Times and size of a file: another where its content is, also if one time was set; zeros where there is none."""
    try:
        found = path.stat()
        return found.st_mtime, found.st_size, found.st_ino, found.st_ctime_ns
    except (OSError, ValueError):
        return 0.0, 0, 0, 0


def stamps(path: Path) -> list[Stamp]:
    """`stamp` of a file, or of a folder and of all in it."""
    names: list[str] = []
    with suppress(OSError, ValueError):
        names = sorted(os.listdir(path))
    return [stamp(path), *(stamp(path / name) for name in names)]


def read_facts(path: Path) -> dict[str, Any]:
    """A JSON or YAML file; empty where it is missing or damaged. Small files are read again only where they changed."""
    at = stamp(path)
    return (_kept if at[1] < SMALL else _read)(path, at)


def _read(path: Path, _stamp: object) -> dict[str, Any]:
    with suppress(OSError, ValueError, TellError):
        is_yaml = path.suffix == ".yaml"
        found = parse_yaml(read_text(path, remedy=""), where=path.name) if is_yaml else read_json(path, remedy="")
        return found if isinstance(found, dict) else {}
    return {}


_kept = lru_cache(maxsize=8192)(_read)


class _Bomb(ValueError):
    pass


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """The number of nodes in a document, with aliases expanded."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise _Bomb("an alias contains itself")
    above.add(id(node))
    total = 1
    for part in () if isinstance(node, yaml.ScalarNode) else node.value:
        total += sum(_count(n, known, above) for n in (part if isinstance(part, tuple) else (part,)))
        if total > MOST_NODES:
            raise _Bomb(f"it holds more than {MOST_NODES:,} values, with aliases expanded")
    above.discard(id(node))
    known[id(node)] = total
    return total


def _load(text: str, kind: type[yaml.SafeLoader]) -> Any:
    """YAML's plain types, bounded: a few aliases can expand to billions of values."""
    loader = kind(text)
    try:
        if (root := loader.get_single_node()) is None:
            return None
        _count(root, {}, set())
        return loader.construct_document(root)
    finally:
        loader.dispose()


def parse_yaml(text: str, *, where: str, remedy: str = "Fix that line.") -> Any:
    """A YAML document's value.

    Raises:
        TellError: it is not valid, its aliases expand to too much, or a value is impossible (``2001-99-99``).
    """
    try:
        with suppress(yaml.YAMLError, UnicodeError):  # whose words are others in C: the text is read again for them
            return _load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return _load(text, yaml.SafeLoader)
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


def claim_path(path: Path) -> Path:
    """A free path, ``1-NAME`` and so on where the name is taken; an empty file holds it from now on.

    Raises:
        TellError: the folder cannot be written.
    """
    claimed, n = path, 0
    while True:
        try:
            claimed.open("xb").close()
            return claimed
        except FileExistsError:
            n += 1
            claimed = path.with_name(f"{n}-{path.name}")
        except OSError as error:
            raise unwritable(claimed, error) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path next to ``path`` that is renamed to it on success and removed on failure.

    It is synced before the rename: after a power loss the file is the old or the new one, never half of it. Temporary
    files of the same path that killed processes of this machine left behind are removed.

    Raises:
        TellError: the disk is full or the folder is not writable, or ``path`` is not a regular file.
    """
    try:
        if path.exists() and not path.is_file():  # a folder, or /dev/null, which would be replaced by a file
            raise TellError("cannot be written (not a regular file)", where=str(path), remedy="Name another file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_temporary(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
        handle, name = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes 0600; a shared run folder must stay readable
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to ``path`` that replaces it on success and is removed on failure, as `atomic_path`.

    The old folder is set aside first; `restore_folder`, here at the next call, undoes or ends what a kill cut short.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(path)
    clean_temporary(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
    temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp makes 0700; shared folders must stay readable
        yield temporary
        sync_files(temporary)
        if path.exists():
            os.replace(path, _set_aside(path))
        os.replace(temporary, path)
        sync(path.parent)
        restore_folder(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Put back the old folder if `atomic_folder` was killed before the new one took its place; else remove it."""
    old = _set_aside(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.replace(old, path)


def remove_folder(path: Path) -> None:
    """Remove a folder that `atomic_folder` wrote, and an old one that a kill left; what cannot be removed stays."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)  # first: alone, it would be put back
    shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def temporary_prefix(path: Path, number: int | None = None) -> str:
    """Prefix of the temporary files of ``path`` that a process of this machine writes; by default this process."""
    return f".{path.name}.{_here()}.{os.getpid() if number is None else number}-"


@lru_cache(1)
def _here() -> str:
    """Identifies the PID namespace: the host and, as containers may share its name, their namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:12]


def sync_files(folder: Path) -> None:
    """`sync` of every file in a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, where the file system supports it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a folder, on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # the disk is full after all
            raise
    finally:
        os.close(handle)


_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{12})\.(\d+)-[^.]+\.tmp")


def clean_temporary(paths: Iterable[Path]) -> None:
    """Remove temporary files and folders whose process is gone; those of other machines are kept."""
    for path in paths:
        found = _TEMPORARY.fullmatch(path.name)
        if found and found[1] == _here() and not _is_writing(int(found[2]), path):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_writing(number: int, path: Path) -> bool:
    """Whether the process of that number is alive and older than the file: numbers are reused."""
    import psutil

    try:
        return psutil.Process(number).create_time() <= path.stat().st_mtime + 1
    except psutil.AccessDenied:
        return True
    except (psutil.Error, OSError, OverflowError, ValueError):
        return False


def unwritable(
    path: Path | str, error: OSError, remedy: str = "Free disk space or choose another folder with --out."
) -> Unwritable:
    """The error for a file or folder that cannot be written."""
    return Unwritable(f"cannot be written ({error.strerror or error})", where=str(path), remedy=remedy)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair, as JSON has it


def write_json(path: Path, data: object) -> None:
    write_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file that `write_jsonl` wrote.

    Raises:
        TellError: a line is not a JSON object.
    """
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise ValueError(f"line {number} is not an object")
    except (ValueError, RecursionError) as error:
        raise TellError(f"is damaged ({first_line(error)})", where=str(path), remedy=DAMAGED) from error
    return rows


def first_rows(path: Path, most: int) -> list[dict]:
    """The first rows of a file that is being written: its last line may not be whole yet."""
    rows = []
    with suppress(OSError), path.open("rb") as file:
        for line in islice(iter(lambda: file.readline(MOST_LINE), b""), most):
            with suppress(ValueError, RecursionError):
                if isinstance(row := json.loads(line), dict):
                    rows.append(row)
    return rows
