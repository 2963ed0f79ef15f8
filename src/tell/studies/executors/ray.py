"""Cells on a Ray cluster, in parallel. The machines need no shared file system.

Inputs are sent by content through the object store, finished cells come back as bytes and are written below the same
root. Ray retries a task whose machine or process dies; on the same machine it resumes.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tell.errors import Interrupted, TellError
from tell.files import atomic_folder, write_text
from tell.folder import RunFolder
from tell.score.scorer_code import find_scorer_code
from tell.studies.cells import Cell, inputs
from tell.studies.content import content_hash, folder_files
from tell.studies.executors.execution import Execution, executor
from tell.studies.queue import CellQueue
from tell.studies.ray_worker import CellTask, Input, work
from tell.studies.recipe import Resources
from tell.studies.run_cell import Outcome

MOST_BYTES = 2 << 30  # a larger folder has to be on every machine
RETRIES = 3  # of a cell whose worker died


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
            remedy = 'Install it: pip install "tell-llm[ray]".'
            raise TellError("Ray is not installed", where="--executor ray", remedy=remedy) from error
        self.ray: Any = ray  # its stubs do not know the options of `init` and `remote` that are passed as mappings
        self.stored: dict[str, Any] = {}  # object references of files by content

    def run(self, queue: CellQueue) -> None:
        """Run the queue's cells on the cluster until the queue is empty.

        Raises:
            TellError: no such cluster, or it is gone.
            Interrupted: SIGINT or SIGTERM; running tasks are cancelled.
        """
        with self._connected():
            cpus, slots = self._share()
            gpus = self.resources.gpus
            if not slots and self.address == "local":
                what = f"this machine has no {cpus:g} CPUs and {gpus:g} GPUs for a cell"
                remedy = "Lower --cpus and --gpus, or pass the address of a larger cluster."
                raise TellError(what, where="--address local", remedy=remedy)
            if not slots:
                queue.display.note(f"no machine of the cluster has {cpus:g} CPUs and {gpus:g} GPUs yet")
            remote = self.ray.remote(
                num_cpus=cpus,
                num_gpus=gpus,
                memory=self.resources.memory,
                max_retries=RETRIES,
                retry_exceptions=[Interrupted],  # its machine was shut down
                max_calls=0,  # a worker stays, and its model with it
            )(work)
            self.stored = {}
            running: dict[Any, Cell] = {}
            try:
                while queue.waiting or running:
                    queue.stop.check()
                    while len(running) < max(1, 2 * slots) and (cell := queue.take(wait=False)) is not None:
                        running[remote.remote(self._task(cell, queue.keep_adapters))] = cell
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

    def _task(self, cell: Cell, keep_adapters: bool) -> CellTask:
        """A cell with its inputs, each file of which is put into the object store once."""
        found = {}
        for place, path in inputs(cell.config).items():
            files = [path] if path.is_file() else folder_files(path)
            if not path.is_file() and sum(file.stat().st_size for file in files) > MOST_BYTES:
                files = []
            parts = tuple((file.relative_to(path).as_posix(), self._put(file)) for file in files)
            found[place] = Input(str(path), content_hash(path), parts)
        code = find_scorer_code(cell.config.task.scorer)
        scorer = None
        if code is not None and not code.installed:
            parts = tuple((path.relative_to(code.root).as_posix(), self._put(path)) for path in code.files.values())
            scorer = Input("scorer", code.content, parts)
        return CellTask(cell.name, cell.config.to_yaml(), cell.separate, found, scorer, keep_adapters)

    def _put(self, path: Path) -> object:
        key = content_hash(path)
        if key not in self.stored:
            self.stored[key] = self.ray.put(path.read_bytes())
        return self.stored[key]

    def _collect(self, reference: object, folder: RunFolder, cell: Cell) -> Outcome:
        """Write the run folder of a cell that has ended."""
        try:
            outcome, data = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:  # the error is outside the run itself
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
        """A connection to the cluster; one that is already open is reused and stays open."""
        if self.ray.is_initialized():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.getsignal(number) for number in numbers]
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        more = {"include_dashboard": False} if self.address == "local" else {}
        try:
            _check_listening(self.address)
            self.ray.init(self.address, **quiet, **more, **self.options)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            what = f"no cluster can be reached ({' '.join(str(error).split())[:200]})"
            remedy = "Start one with `ray start --head`, or use --address local."
            raise TellError(what, where=f"--address {self.address}", remedy=remedy) from error
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)  # Ray sets its own for SIGTERM
        try:
            yield
        finally:
            self.ray.shutdown()

    def _share(self) -> tuple[float, int]:
        """CPU cores of a cell, and how many cells run at once on the machines there are now."""
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus, cpus = self.resources.gpus, self.resources.cpus
        fit = [m for m in machines if m.get("CPU", 0) >= (cpus or 1) and m.get("GPU", 0) >= gpus]
        if cpus is None:  # a whole machine's, divided among its GPUs
            shares = [int(m["CPU"] // max(1, m.get("GPU", 0) // gpus if gpus else 1)) for m in fit]
            cpus = float(max(1, min(shares, default=1)))
        slots = [min(m["CPU"] // cpus, m["GPU"] // gpus if gpus else m["CPU"]) for m in fit]
        return cpus, int(sum(slots))


@executor("ray")
def ray_executor(execution: Execution, resources: Resources) -> RayExecutor:
    if execution.workers > 1:
        remedy = "Leave it out: the cluster's CPUs and GPUs over --cpus and --gpus say how many cells run at once."
        raise TellError("workers are processes of this machine", where="--workers with --executor ray", remedy=remedy)
    given = {key: value for key in ("cpus", "gpus") if (value := getattr(execution, key)) is not None}
    return RayExecutor(execution.address, resources.model_copy(update=given))


def _check_listening(address: str) -> None:
    """Raise OSError where nobody listens; Ray itself would try for minutes."""
    if address == "auto":
        noted = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")  # may belong to a dead cluster
        address = os.environ.get("RAY_ADDRESS") or (noted.read_text(encoding="utf-8").strip() if noted.exists() else "")
    host, colon, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
