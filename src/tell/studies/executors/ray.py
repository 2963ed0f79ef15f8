"""Cells on a Ray cluster, side by side. Nothing is shared between its machines but Ray.

Inputs travel by content through the object store, finished cells come back as bytes and land in the same root. A task
whose machine or process dies is tried again by Ray; on the same machine it goes on where it was.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tell import __version__
from tell.config import Config
from tell.errors import Interrupted, TellError
from tell.files import atomic_folder, write_text
from tell.folder import RunFolder
from tell.home import make_folder, tell_home
from tell.progress import Silent
from tell.run.session import ModelCache
from tell.score.scorer_code import find_scorer_code, search_in
from tell.studies.cells import Cell, inputs
from tell.studies.content import content_hash, folder_files
from tell.studies.executors.run_cell import Outcome, run_cell
from tell.studies.queue import Queue
from tell.studies.recipe import Resources

MOST_BYTES = 2 << 30  # a larger folder has to lie on every machine
RETRIES = 3  # times that Ray runs a cell again whose worker died
TEXTS = frozenset({".json", ".yaml", ".html"})  # files of a cell that name its inputs


@dataclass(frozen=True)
class Input:
    """A file or folder that a cell reads, as it travels.

    Attributes:
        path: where it lies on the machine that asks.
        content: its hash.
        parts: relative name (``.`` for a file itself) and object reference of each file; none of a folder too large.
    """

    path: str
    content: str
    parts: tuple[tuple[str, Any], ...]


@dataclass
class RayExecutor:
    """Runs cells as tasks of a Ray cluster.

    Args:
        address: ``auto``, ``ray://HOST:PORT``, ``HOST:PORT``, or ``local`` for a new cluster on this machine.
        resources: of each cell.
        options: further arguments of ``ray.init``.

    Raises:
        TellError: Ray is not installed.
    """

    address: str = "auto"
    resources: Resources = field(default_factory=Resources)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise TellError(
                "Ray is not installed", where="--executor ray", remedy='Install it: pip install "tell-llm[ray]".'
            ) from error
        self.ray = ray

    def run(self, queue: Queue) -> None:
        """Keep the cluster busy with what the queue hands out, until it is empty.

        Raises:
            TellError: no such cluster, or it is gone.
            Interrupted: SIGINT or SIGTERM; running tasks are cancelled.
        """
        with self._connected():
            cpus, slots = self._share()
            if not slots and self.address == "local":
                raise TellError(
                    f"this machine has no {cpus:g} CPUs and {self.resources.gpus:g} GPUs for a cell",
                    where="--address local",
                    remedy="Ask for less with --cpus and --gpus, or give the address of a larger cluster.",
                )
            if not slots:
                queue.display.note(f"no machine of the cluster has {cpus:g} CPUs and {self.resources.gpus:g} GPUs yet")
            task = self.ray.remote(
                num_cpus=cpus,
                num_gpus=self.resources.gpus,
                memory=self.resources.memory,
                max_retries=RETRIES,
                retry_exceptions=[Interrupted],  # its machine was told to stop
                max_calls=0,  # a worker stays, and its model with it
            )(work)
            store: dict[str, Any] = {}
            running: dict[Any, Cell] = {}
            try:
                while queue.waiting or running:
                    queue.stop.check()
                    while len(running) < max(1, 2 * slots) and (cell := queue.take(wait=False)) is not None:
                        running[self._submit(task, cell, store, queue.keep_adapters)] = cell
                    if not running:
                        time.sleep(1)  # what is left is locked by others
                        continue
                    ready, _ = self.ray.wait(list(running), timeout=1)
                    for reference in ready:
                        cell = running.pop(reference)
                        queue.finish(cell, self._collect(reference, queue.root.cell(cell.name), cell))
            finally:
                for reference in running:
                    self.ray.cancel(reference)

    def _submit(self, task: Any, cell: Cell, store: dict[str, Any], keep_adapters: bool) -> Any:
        """Start a cell; each file is put into the object store once."""

        def put(path: Path) -> Any:
            key = content_hash(path)
            if key not in store:
                store[key] = self.ray.put(path.read_bytes())
            return store[key]

        found = {}
        for place, path in inputs(cell.config).items():
            files = [path] if path.is_file() else folder_files(path)
            if not path.is_file() and sum(file.stat().st_size for file in files) > MOST_BYTES:
                files = []
            parts = tuple((file.relative_to(path).as_posix(), put(file)) for file in files)
            found[place] = Input(str(path), content_hash(path), parts)
        code = find_scorer_code(cell.config.task.scorer)
        scorer = None
        if code is not None and not code.installed:
            parts = tuple((path.relative_to(code.root).as_posix(), put(path)) for path in code.files.values())
            scorer = Input("scorer", code.content, parts)
        return task.remote(cell.name, cell.config.to_yaml(), cell.separate, found, scorer, keep_adapters, __version__)

    def _collect(self, reference: Any, folder: RunFolder, cell: Cell) -> Outcome:
        """Lay down what came back of a cell."""
        try:
            outcome, data = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:  # before or beside the run itself
            return Outcome(f"{type(error.cause).__name__}: {error.cause}", str(error), "ray")
        except self.ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:300]
            return Outcome(f"its worker was lost, {RETRIES + 1} times ({type(error).__name__}: {reason})", None, "ray")
        if data is not None:
            with atomic_folder(folder.root) as temporary, tarfile.open(fileobj=io.BytesIO(data)) as archive:
                archive.extractall(temporary, filter="data")
                settings = cell.config.model_copy(update={"out": str(folder.root)})
                write_text(RunFolder(temporary).config, settings.to_yaml())
        return outcome

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """A connection to the cluster; one that was there before is used and left."""
        if self.ray.is_initialized():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.getsignal(number) for number in numbers]
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        more = {"include_dashboard": False} if self.address == "local" else {}
        try:
            _knock(self.address)
            self.ray.init(self.address, **quiet, **more, **self.options)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise TellError(
                f"no cluster can be reached ({' '.join(str(error).split())[:200]})",
                where=f"--address {self.address}",
                remedy="Start one with `ray start --head`, or use --address local.",
            ) from error
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)  # Ray sets its own for SIGTERM
        try:
            yield
        finally:
            self.ray.shutdown()

    def _share(self) -> tuple[float, int]:
        """Processors of a cell, and how many cells run at once on the machines there are now."""
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus, cpus = self.resources.gpus, self.resources.cpus
        fit = [m for m in machines if m.get("CPU", 0) >= (cpus or 1) and m.get("GPU", 0) >= gpus]
        if cpus is None:  # a whole machine's, shared out among its GPUs
            shares = [int(m["CPU"] // max(1, m.get("GPU", 0) // gpus if gpus else 1)) for m in fit]
            cpus = float(max(1, min(shares, default=1)))
        slots = [min(m["CPU"] // cpus, m["GPU"] // gpus if gpus else m["CPU"]) for m in fit]
        return cpus, int(sum(slots))


def _knock(address: str) -> None:
    """Raise OSError where nobody listens; Ray itself would try for minutes."""
    if address == "auto":
        noted = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")  # may be that of a cluster long dead
        address = os.environ.get("RAY_ADDRESS") or (noted.read_text(encoding="utf-8").strip() if noted.exists() else "")
    host, colon, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@cache
def _worker_models() -> ModelCache:
    """The model that this worker keeps from cell to cell."""
    return ModelCache()


def work(
    name: str,
    settings: str,
    separate: Mapping[str, Any] | None,
    found: Mapping[tuple[str, str], Input],
    scorer: Input | None,
    keep_adapters: bool,
    version: str,
) -> tuple[Outcome, bytes | None]:
    """Run a cell on a machine of the cluster; its outcome, and the finished run folder as a tar file."""
    import platform

    import ray
    import yaml

    from tell.config import make_config

    if version != __version__:
        text = f"tell {__version__} is installed there, not {version}"
        return Outcome(text, None, platform.node()), None
    models = _worker_models()
    config = make_config(yaml.safe_load(settings), where=name)
    inputs_here = tell_home() / "ray" / "inputs"
    moved = land(config, found, inputs_here, ray.get)
    search_in(_place(scorer, inputs_here, ray.get) if scorer else None)
    with _workplace(name) as place:
        folder = RunFolder(place / "run")
        rules = {"separate": separate, "keep_adapters": keep_adapters, "display": Silent(), "models": models}
        outcome = run_cell(folder, config, **rules)
        if outcome.error:
            models.drop()
            return outcome, None
        return outcome, pack(folder.root, {**moved, str(folder.root): name})


def land(
    config: Config,
    found: Mapping[tuple[str, str], Input],
    folder: Path,
    get: Callable[[Any], bytes],
) -> dict[str, str]:
    """Lay a cell's inputs down below ``folder``, where they are not yet, and point its configuration there.

    Folders, which are models and tokenizers, are used where they lie if the same content is there.

    Args:
        config: changed in place.
        get: fetches an object.

    Returns:
        Where each input lies here -> where it lies on the machine that asked.
    """
    moved = {}
    for (section, key), item in found.items():
        path = Path(item.path)
        is_folder = [name for name, _ in item.parts] != ["."]
        if is_folder and path.is_dir() and content_hash(path) == item.content:
            continue
        if not item.parts:
            raise TellError(
                "is not on this machine with the same content, and too large to send",
                where=item.path,
                remedy="Copy it there, or give a name of the hub.",
            )
        here = _place(item, folder, get)
        setattr(getattr(config, section), key, f"@{here}" if key == "text" else str(here))
        moved[str(here)] = item.path
    return moved


def _place(item: Input, folder: Path, get: Callable[[Any], bytes]) -> Path:
    """Where an input lies below ``folder``, laid down if it is not there yet."""
    here = folder / item.content / Path(item.path).name  # its name is part of how a file is read
    with FileLock(make_folder(folder) / f".{item.content}.lock"):
        if not here.exists():
            with atomic_folder(here.parent) as temporary:
                _lay(temporary / here.name, item.parts, get)
    return here


def _lay(path: Path, parts: Sequence[tuple[str, Any]], get: Callable[[Any], bytes]) -> None:
    for name, reference in parts:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(get(reference))


@contextmanager
def _workplace(name: str) -> Iterator[Path]:
    """A folder for a cell on this machine; one of a task that died here is found again, and gone on with."""
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
        shutil.rmtree(base / name, ignore_errors=True)  # not where it raises: an interrupted cell can be resumed
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
