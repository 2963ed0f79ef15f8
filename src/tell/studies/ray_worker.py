"""A cell on a worker of a Ray cluster: inputs arrive by content, the finished run folder goes back as bytes."""

from __future__ import annotations

import io
import platform
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tell import __version__
from tell.config import Config
from tell.data.workbook import split_sheet, with_sheet
from tell.errors import TellError
from tell.files import atomic_folder, parse_yaml
from tell.folder import RunFolder
from tell.home import make_folder, tell_home
from tell.progress import Silent
from tell.run.session import ModelCache
from tell.score.scorer_code import search_in
from tell.studies.content import content_hash, folder_files
from tell.studies.run_cell import Outcome, run_cell

TEXTS = frozenset({".json", ".yaml", ".html"})  # files of a cell that name its inputs
Fetch = Callable[[Any], bytes]  # of an object in Ray's store


@dataclass(frozen=True)
class Input:
    """A file or folder that a cell reads, as it is sent.

    Attributes:
        path: on the machine that sends it.
        content: its hash.
        parts: relative name (``.`` for a file itself) and object reference of each file; empty for a folder too large.
    """

    path: str
    content: str
    parts: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class CellTask:
    """A cell as it is sent: its name, configuration as YAML, options of a separation, inputs and scorer code."""

    name: str
    settings: str
    separate: Mapping[str, Any] | None
    inputs: Mapping[tuple[str, str], Input]
    scorer: Input | None
    keep_adapters: bool
    version: str = __version__


@cache
def _worker_models() -> ModelCache:
    """The base model of this worker, which stays loaded from cell to cell."""
    return ModelCache()


def work(task: CellTask) -> tuple[Outcome, bytes | None]:
    """Run a cell on a machine of the cluster; its outcome, and the finished run folder as a tar file."""
    import ray

    from tell.config import make_config

    if task.version != __version__:
        return Outcome(f"tell {__version__} is installed there, not {task.version}", None, platform.node()), None
    models = _worker_models()
    config = make_config(parse_yaml(task.settings, where=task.name), where=task.name)
    folder = tell_home() / "ray" / "inputs"
    moved = place_inputs(config, task.inputs, folder, ray.get)
    search_in(_place(task.scorer, folder, ray.get) if task.scorer else None)
    with _workplace(task.name) as place:
        run = RunFolder(place / "run")
        outcome = run_cell(
            run,
            config,
            separate=task.separate,
            keep_adapters=task.keep_adapters,
            display=Silent(),
            models=models,
        )
        if outcome.error:
            models.drop()
            return outcome, None
        return outcome, pack(run.root, {**moved, str(run.root): task.name})


def place_inputs(config: Config, found: Mapping[tuple[str, str], Input], folder: Path, fetch: Fetch) -> dict[str, str]:
    """Write a cell's inputs below ``folder``, where they are missing, and point its configuration (in place) to them.

    Folders (models and tokenizers) are used in place if the content is the same.

    Returns:
        Path here -> path on the machine that sent it, of each input.
    """
    moved = {}
    for (section, key), item in found.items():
        path = Path(item.path)
        is_folder = [name for name, _ in item.parts] != ["."]
        if is_folder and path.is_dir() and content_hash(path) == item.content:
            continue
        if not item.parts:
            what = "is not on this machine with the same content, and too large to send"
            raise TellError(what, where=item.path, remedy="Copy it there, or use a hub name.")
        here = _place(item, folder, fetch)
        _, sheet = split_sheet(str(getattr(getattr(config, section), key)))
        setattr(getattr(config, section), key, f"@{here}" if key == "text" else with_sheet(here, sheet))
        moved[str(here)] = item.path
    return moved


def _place(item: Input, folder: Path, fetch: Fetch) -> Path:
    """Path of an input below ``folder``, written there if it is missing."""
    here = folder / item.content / Path(item.path).name  # readers go by the file's name too
    with FileLock(make_folder(folder) / f".{item.content}.lock"):
        if not here.exists():
            with atomic_folder(here.parent) as temporary:
                _write(temporary / here.name, item.parts, fetch)
    return here


def _write(path: Path, parts: Sequence[tuple[str, Any]], fetch: Fetch) -> None:
    for name, reference in parts:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(fetch(reference))


@contextmanager
def _workplace(name: str) -> Iterator[Path]:
    """A folder for a cell on this machine; one of a task that died here is found again and resumed."""
    base = make_folder(tell_home() / "ray" / "cells")
    lock = FileLock(base / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:  # another study's cluster runs the same cell here
        with tempfile.TemporaryDirectory(dir=base) as temporary:
            yield Path(temporary)
        return
    try:
        yield make_folder(base / name)
        shutil.rmtree(base / name, ignore_errors=True)  # not after an error: an interrupted cell can be resumed
    finally:
        lock.release()


def pack(folder: Path, names: Mapping[str, str]) -> bytes:
    """A folder as a tar file; ``names`` are replaced in its texts."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in folder_files(folder):
            data = path.read_bytes()
            if path.suffix in TEXTS:
                for here, there in names.items():
                    data = data.replace(here.encode(), there.encode())
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
