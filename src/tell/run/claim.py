"""Claiming a run folder: a fresh one, an interrupted one to resume, or one to overwrite."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from tell.config import Config, make_config, read_yaml
from tell.data.general import SOURCES
from tell.data.workbook import split_sheet, with_sheet
from tell.errors import TellError
from tell.files import DAMAGED, clean_temporary, expanded, sync, write_text
from tell.folder import RunFolder
from tell.nested import flat

PATIENCE = 1.0  # seconds; another process may be testing whether the lock is held

# Keys that change numbers by rounding, and dropout's draws, at most: cells of studies do not count them either.
FREE = ("out", "train.micro_tokens", "train.recompute", "train.parallel", "train.report_to")
# Keys that may differ between a run and its resumption; another engine draws other sampled answers.
RESUMABLE = (*FREE, "generate.engine")
PATHS = (
    ("task", "data"),
    ("task", "test"),
    ("task", "validation"),
    ("task", "unlabelled"),
    ("task", "json_schema"),
    ("general", "source"),
    ("anchor", "text"),
    ("model", "name"),
    ("tokens", "unit"),
    ("eval", "benchmark_data"),
    ("eval", "bleurt"),
)


# What to do where a cell of a study lacks files of a run: a finished one is not run again as long as it is there.
REMAKE = "Remove the cell's folder and run `tell study` again with --keep-adapters."
KEYWORDS = frozenset({"model", *(name for name, source in SOURCES.items() if source.named is None)})


def is_keyword(section: str, key: str, value: str) -> bool:
    """Whether the value of a key of `PATHS` is no path; a folder may have the name of a general set."""
    return value in KEYWORDS or ((section, key) == ("general", "source") and value in SOURCES)


def with_full_paths(config: Config) -> Config:
    """The configuration with its files' paths made absolute, so that a run can be used from any folder."""
    out = config.model_copy(deep=True)
    for section, key in PATHS:
        value = getattr(getattr(out, section), key)
        if not isinstance(value, str) or is_keyword(section, key, value):
            continue
        mark = "@" if key == "text" else ""
        named, sheet = split_sheet(value.removeprefix(mark))
        path = expanded(named)
        if value.startswith(mark) and path.exists():
            setattr(getattr(out, section), key, mark + with_sheet(path.resolve(), sheet))
    return out


def default_out(config: Config) -> Path:
    """``runs/<data>-<n>`` with the first free n."""
    stem = Path(str(config.task.data)).name.split(".")[0] or "run"
    n = 1
    while (Path("runs") / f"{stem}-{n}").exists():
        n += 1
    return Path("runs") / f"{stem}-{n}"


def claim(config: Config, *, resume: bool, overwrite: bool) -> tuple[RunFolder, bool]:
    """Whether the output folder has a run to resume; checks the folder and writes nothing.

    Raises:
        TellError: the folder exists and neither resume nor overwrite was given; it contains something else; the run in
            it was made with other settings; or another process is working on it.
    """
    root = Path(config.out) if config.out else default_out(config)
    folder = RunFolder(root)
    if resume and overwrite:
        raise TellError("--resume and --overwrite are both given", remedy="Give one of them.")
    if root.is_file():
        raise TellError("is a file", where=f"--out {root}", remedy="Name a folder.")
    state = _state(folder)
    if state == "empty" and resume:
        raise TellError("contains no run to resume", where=f"--out {root}", remedy="Leave out --resume.")
    if state == "other":
        raise _foreign(folder, " to resume" if resume else "")
    if folder.lock.exists():
        with _locked(folder):  # a live run is reported before any work
            pass
    if state != "run" or overwrite:
        return folder, False
    if not resume:
        raise _exists(folder)
    old = read_run_config(folder)
    if (changed := _changed(old, config, decided=folder.plan.exists())) is not None:
        raise TellError(
            f"the run was made with {changed}",
            where=f"--out {root}",
            remedy="Resume with the settings in run.yaml (`tell tune -c run.yaml --resume`), or use --overwrite.",
        )
    return folder, True


def _state(folder: RunFolder) -> Literal["empty", "begun", "run", "other"]:
    """The state of a folder: empty, left by a start that was killed, a run, or foreign.

    run.yaml alone may be a user's configuration among their files.
    """
    root = folder.root
    found = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if not found:
        return "empty"
    if folder.config.exists() and folder.status.exists():  # a start removes status.json first and writes it last
        return "run"
    return "begun" if folder.starting.name in found or found == {folder.lock.name} else "other"


def _foreign(folder: RunFolder, more: str = "") -> TellError:
    return TellError(
        f"contains other files and no run{more}, so it is left as it is",
        where=f"--out {folder.root}",
        remedy="Choose another --out.",
    )


def _exists(folder: RunFolder) -> TellError:
    return TellError(
        f"already exists (state: {folder.read_status().get('state', 'unknown')})",
        where=f"--out {folder.root}",
        remedy="Add --resume to continue it, --overwrite to start again, or choose another --out.",
    )


def is_held(folder: RunFolder) -> bool:
    """Whether a process is working on the run; the lock is held for an instant, which those who take it wait for."""
    try:
        with FileLock(folder.lock).acquire(timeout=0) if folder.lock.exists() else nullcontext():
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False


def stop_holder(folder: RunFolder) -> bool:
    """Send SIGTERM to the process of this user that is working on the run; whether there is one.

    It is found by the lock that it has open, so that no number can have become another process's; of those that
    inherited the open file, the oldest took the lock.
    """
    lock, found = str(folder.lock.resolve()), []
    for process in psutil.process_iter() if is_held(folder) else ():
        with suppress(psutil.Error):
            mine = process.pid != os.getpid() and process.uids().real == os.getuid()
            if mine and any(file.path == lock for file in process.open_files()):
                found.append((process.create_time(), process.pid, process))
    for _, _, process in sorted(found, key=lambda one: one[:2])[:1]:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)  # psutil refuses if the number is another process's by now
            return True
    return False


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when its holder dies.

    Raises:
        TellError: another process holds it, or the folder cannot be written.
    """
    lock = FileLock(folder.lock)
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise TellError(
            "another process is working on this run",
            where=f"--out {folder.root}",
            remedy="Wait for it to finish, or choose another --out.",
        ) from error
    except NotImplementedError:  # the file system has no locks
        yield
        return
    except OSError as error:
        raise TellError(
            f"cannot be written ({error.strerror or error})",
            where=f"--out {folder.root}",
            remedy="Choose another --out.",
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def open_folder(
    folder: RunFolder, *, fresh: bool, config: Config, seconds: float = 0.0, overwrite: bool = False
) -> Iterator[None]:
    """Create the folder with its resolved configuration, and keep other processes from it while this is open.

    An old run in it is moved aside and deleted last. After a kill at any moment, `claim` accepts the folder:
    `RunFolder.starting` says so from before the first change until run.yaml and status.json are there.

    Args:
        seconds: taken by earlier sessions of this run.
        overwrite: a run in the folder may be replaced.

    Raises:
        TellError: another process is working on it or has begun a run since `claim`; the folder cannot be written.
    """
    new = not folder.root.exists()
    if _state(folder) == "other":  # appeared since `claim`; taking the lock would add a file to it
        raise _foreign(folder)
    with _locked(folder):
        if _state(folder) == "run" and fresh and not overwrite:
            raise _exists(folder)
        clean_temporary(folder.root.rglob(".*.tmp"))
        folder.answering.unlink(missing_ok=True)  # of a session that was killed
        if fresh:
            _start(folder, config, seconds, new)
        else:
            write_text(folder.config, config.to_yaml())
            folder.set_status("running", stage="start", seconds=round(seconds, 1))
        for old in folder.root.glob(f"{folder.ASIDE}*"):  # including those of killed starts
            shutil.rmtree(old, ignore_errors=True)
        folder.starting.unlink(missing_ok=True)
        yield


def _start(folder: RunFolder, config: Config, seconds: float, new: bool) -> None:
    """Replace the folder's contents by a new run; if that cannot be written, everything stays as it was."""
    root, mark = folder.root, folder.starting
    begun = mark.exists()
    aside: Path | None = None
    old = [path for path in folder.made if os.path.lexists(path)]
    try:
        mark.touch()
        sync(root)
        if old:
            aside = Path(tempfile.mkdtemp(prefix=folder.ASIDE, dir=root))
            for path in sorted(old, key=lambda path: path != folder.status):  # status first: then there is no run
                os.replace(path, aside / path.name)
        write_text(folder.config, config.to_yaml())
        folder.set_status("running", stage="start", seconds=round(seconds, 1))
    except (OSError, TellError) as error:
        with suppress(OSError):
            for path in {folder.config, folder.status}.difference(old):
                path.unlink(missing_ok=True)
            if aside is not None:
                _put_back(folder, aside)
            if not begun:
                mark.unlink(missing_ok=True)
            if new:
                shutil.rmtree(root)
        if isinstance(error, TellError):
            raise
        raise TellError(
            f"the old run cannot be removed ({error.strerror or error})",
            where=f"--out {root}",
            remedy="Choose another --out.",
        ) from error


def _put_back(folder: RunFolder, aside: Path) -> None:
    """Move the old run's files back over the new one's; status.json last, which makes it a run again."""
    for path in sorted(aside.iterdir(), key=lambda path: path.name == folder.status.name):
        os.replace(path, folder.root / path.name)
    aside.rmdir()


def read_run_config(folder: RunFolder) -> Config:
    """The resolved configuration of a run.

    Raises:
        TellError: there is no run, or its run.yaml is not one that tell wrote.
    """
    if not folder.root.is_dir():
        raise TellError("no such run folder", where=str(folder.root), remedy="Give the folder `tell tune` wrote.")
    if folder.metrics.exists() and not folder.config.exists():
        raise TellError(
            "has results but no run.yaml, as a cell from a study's cells.jsonl.gz",
            where=str(folder.root),
            remedy=REMAKE,
        )
    data = read_yaml(folder.require(folder.config, "`tell tune`"), "a run", remedy=DAMAGED)
    if not data:  # falling back on defaults would describe a different run
        raise TellError("is empty", where=str(folder.config), remedy=DAMAGED)
    return make_config(data, where=str(folder.config))


@dataclass(frozen=True)
class Trust:
    """Third-party code that may run: Python that comes with the model, and the run's ``task.scorer``."""

    code: bool = False
    scorer: bool = False


def check_trust(
    folder: RunFolder, config: Config, *, code: bool, scorer: bool = True, scorer_flag: str = "--trust-scorer"
) -> None:
    """Refuse to run code just because a run folder names it: the current user must trust it too.

    Args:
        code: code that comes with the model is trusted now.
        scorer: the run's scorer is trusted now, or not needed.
        scorer_flag: the flag that would trust it.

    Raises:
        TellError: the run was made with code that is not trusted now.
    """
    if config.model.trust_remote_code and not code:
        raise TellError(
            f"the run was made with Python code that comes with the model {config.model.name}",
            where=str(folder.config),
            remedy="Read that code; if you trust it, add --trust-remote-code.",
        )
    if config.task.scorer is not None and not scorer:
        raise TellError(
            f"the run is scored by its own function, {config.task.scorer}",
            where=str(folder.config),
            remedy=f"Read that code; if you trust it, add {scorer_flag}.",
        )


def _changed(old: Config, new: Config, decided: bool) -> str | None:
    """The first key that differs, with both values; None where all agree.

    Args:
        decided: the extent that fits ``max_minutes`` is already decided, so that the minutes must not change.
    """
    a, b = _flat(old), _flat(new)
    free = RESUMABLE if decided else (*RESUMABLE, "max_minutes")
    for key in a:
        if key not in free and a[key] != b.get(key):
            return f"{key} = {a[key]!r}, not {b.get(key)!r}"
    return None


def _flat(config: Config) -> dict:
    return dict(flat(config.model_dump(by_alias=True, mode="json")))
