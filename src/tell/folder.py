"""The run folder: the one place that knows file names. Files are written beside, then renamed."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tell.errors import TellError, first_line
from tell.files import read_json

Content = TypeVar("Content", bound=BaseModel)
DAMAGED = "Make the run again (`tell tune --overwrite`), or put back the file as tell wrote it."


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that is renamed to it on success and removed on failure.

    What is renamed is on the disk before: after a power loss the file is the old or the new one, and whole. Temporary
    files that killed processes of this machine left of the same path are removed.

    Raises:
        TellError: the disk is full or the folder is not writable, or there is something at ``path`` that is no file.
    """
    try:
        if path.exists() and not path.is_file():  # a folder; /dev/null would be replaced by a file
            raise TellError("cannot be written (it is no file)", where=str(path), remedy="Name another file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_temporary(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
        handle, name = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
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
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place on success and is removed on failure, as `atomic_path`.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_folder(path)
    try:
        temporary.chmod(0o755)  # mkdtemp makes 0700; what is shared must stay readable
        yield temporary
        sync_files(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_folder(path: Path) -> Path:
    """A new folder beside ``path``; those that killed processes left are removed."""
    clean_temporary(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
    return Path(tempfile.mkdtemp(prefix=temporary_prefix(path), suffix=".tmp", dir=path.parent))


def temporary_prefix(path: Path, number: int | None = None) -> str:
    """How the names of temporary files of ``path`` begin that a process of this machine writes; by default this one."""
    return f".{path.name}.{_here()}.{os.getpid() if number is None else number}-"


@lru_cache(1)
def _here() -> str:
    """Where process numbers mean the same: the host and, as containers may share its name, their namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:12]


def sync_files(folder: Path) -> None:
    """`sync` of every file in a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def sync(path: Path) -> None:
    """Have the system write a file or a folder's names to the disk, where its file system knows how."""
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
    """Remove temporary files and folders whose process is gone; nobody can tell of those of other machines."""
    for path in paths:
        found = _TEMPORARY.fullmatch(path.name)
        if found and found[1] == _here() and not _is_writing(int(found[2]), path):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_writing(number: int, path: Path) -> bool:
    """Whether the process of that number lives and is older than the file: numbers are given out again."""
    import psutil

    try:
        return psutil.Process(number).create_time() <= path.stat().st_mtime + 1
    except psutil.AccessDenied:
        return True
    except (psutil.Error, OSError, OverflowError, ValueError):
        return False


def _unwritable(path: Path, error: OSError) -> TellError:
    return TellError(
        f"cannot be written ({error.strerror or error})",
        where=str(path),
        remedy="Free disk space or choose another folder with --out.",
    )


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair, as JSON has it


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file that `write_jsonl` wrote.

    Raises:
        TellError: a line is no JSON object.
    """
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise ValueError(f"line {number} holds no object")
    except (ValueError, RecursionError) as error:
        raise TellError(f"is damaged ({first_line(error)})", where=str(path), remedy=DAMAGED) from error
    return rows


@contextmanager
def reading(root: Path) -> Iterator[None]:
    """Say in one line that files of a run are not as tell wrote them, whatever that leads to while they are shown.

    Raises:
        TellError: in place of what the values raise.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise TellError(
            f"holds files that are not as tell wrote them ({type(error).__name__}: {first_line(error)})",
            where=str(root),
            remedy=DAMAGED,
        ) from error


class RunFolder:
    """Paths of one run. Creating the object touches nothing on disk."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    config = property(lambda self: self.root / "run.yaml")
    anchor = property(lambda self: self.root / "anchor.json")
    schema = property(lambda self: self.root / "schema.json")
    split = property(lambda self: self.root / "split.json")
    plan = property(lambda self: self.root / "plan.json")
    manifest = property(lambda self: self.root / "manifest.parquet")
    adapter = property(lambda self: self.root / "adapter")
    metrics = property(lambda self: self.root / "metrics.json")
    findings = property(lambda self: self.root / "findings.json")
    predictions = property(lambda self: self.root / "predictions")
    logs = property(lambda self: self.root / "logs")
    report = property(lambda self: self.root / "report.html")
    status = property(lambda self: self.root / "status.json")
    arms = property(lambda self: self.root / "arms")

    MADE = (  # by a run, at the top of its folder
        *("run.yaml", "anchor.json", "schema.json", "split.json", "plan.json", "manifest.parquet", "adapter"),
        *("metrics.json", "findings.json", "predictions", "logs", "report.html", "status.json", "arms"),
    )

    def files(self) -> list[Path]:
        """Every file and folder a run makes at the top of its folder, there or not."""
        return [self.root / name for name in self.MADE]

    def prediction(self, arm: str) -> Path:
        """Answers of one arm: ``predictions/<arm>.jsonl``."""
        return self.predictions / f"{arm}.jsonl"

    def general_losses(self, arm: str) -> Path:
        """Losses of an arm's weights on general rows: ``predictions/general/<arm>.jsonl``."""
        return self.predictions / "general" / f"{arm}.jsonl"

    def losses(self, arm: str) -> Path:
        """Per-step training log of one arm: ``logs/<arm>.jsonl``."""
        return self.logs / f"{arm}.jsonl"

    def set_status(self, state: str, **more: Any) -> None:
        """``running``, ``interrupted``, ``failed`` or ``done``, with what else is worth knowing."""
        write_json(self.status, {"state": state, **more})

    def read_status(self) -> dict:
        """status.json; empty where there is none, or none that can be read."""
        try:
            found = read_json(self.status, remedy=DAMAGED)
        except (TellError, FileNotFoundError):
            return {}
        seconds = found.get("seconds", 0)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            del found["seconds"]
        return found

    def read(self, path: Path, kind: type = dict) -> Any:
        """A JSON file of the run.

        Raises:
            TellError: it is missing, or not as tell wrote it.
        """
        return read_json(self.require(path, "`tell tune`"), kind, remedy=DAMAGED)

    def read_as(self, path: Path, model: type[Content]) -> Content:
        """A JSON file of the run, checked against what `model` says of it.

        Raises:
            TellError: it is missing, or not as tell wrote it.
        """
        try:
            return model.model_validate(self.read(path))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise TellError(f"is damaged ({key}: {first['msg']})", where=str(path), remedy=DAMAGED) from error

    def require(self, path: Path, verb: str) -> Path:
        """``path`` if it exists, else the error that says which verb makes it."""
        if not path.exists():
            raise TellError(
                f"has no {path.relative_to(self.root)}",
                where=str(self.root),
                remedy=f"Give the folder of a finished run, or make one with {verb}.",
            )
        return path
