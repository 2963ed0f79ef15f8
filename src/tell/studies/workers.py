"""Cells at the same time, each in one of several processes of this machine; planned and recorded by this one alone.

Worth it where one cell leaves a GPU idle between the launches of a small model.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from tell.errors import Interrupted
from tell.folder import RunFolder
from tell.models.machine import cores
from tell.progress import Silent
from tell.run.session import ModelCache
from tell.studies.cells import Cell
from tell.studies.queue import CellQueue
from tell.studies.run_cell import Outcome, run_cell

LOOK_AGAIN = 0.2  # seconds between looks at the stop and at cells that others run
SAME_SIGNAL = 0.5  # seconds within which a signal to a process group has reached all of it
LAST_STEP = 30.0  # seconds that a stopped cell has to end its step
THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")


class Worker:
    """One process, with its end of a pipe; it keeps its model from cell to cell."""

    def __init__(self) -> None:
        context = get_context("spawn")  # a fork would copy threads of torch, and cannot use CUDA
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs,))
        self.process.start()
        theirs.close()
        self.cell: Cell | None = None

    def give(self, cell: Cell, folder: Path, *, keep_adapters: bool) -> None:
        """Send it a cell to run."""
        self.cell = cell
        with suppress(OSError):  # it is gone, which `take` tells
            self.pipe.send((cell, folder, keep_adapters))

    def take(self) -> Outcome | None:
        """How its cell ended; None where the process did."""
        self.cell = None
        try:
            outcome: Outcome = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return None
        return outcome


class Workers:
    """Runs cells in ``count`` processes; a process that dies is an error of its cell, and replaced.

    The processes share this machine's cores; where ``OMP_NUM_THREADS`` is set it holds instead.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.workers: list[Worker] = []

    def run(self, queue: CellQueue) -> None:
        """Run the queue's cells until it is empty, or nothing else fits into its time.

        Raises:
            Interrupted: SIGINT, SIGTERM or the end of the time; cells that ran can be resumed.
        """
        try:
            with _threads(self.count):
                self.workers = [Worker() for _ in range(min(self.count, len(queue.waiting)))]
            while True:
                for worker in self.workers:
                    if worker.cell is None and (cell := queue.take(wait=False)) is not None:
                        worker.give(cell, queue.root.cell(cell.name).root, keep_adapters=queue.keep_adapters)
                running = {worker.pipe: worker for worker in self.workers if worker.cell is not None}
                if not running and not queue.elsewhere:
                    return
                queue.advance(0, f"{len(running)} at the same time")
                queue.stop.check()
                if not running:
                    time.sleep(LOOK_AGAIN)
                for pipe in wait(list(running), timeout=LOOK_AGAIN):
                    self._end(queue, running[pipe])  # type: ignore[index]  # only pipes were given
        finally:
            self.close()

    def _end(self, queue: CellQueue, worker: Worker) -> None:
        cell = worker.cell
        assert cell is not None
        outcome = worker.take()
        if outcome is None:
            time.sleep(SAME_SIGNAL)  # what ended it may have been sent to this process too
            queue.stop.check()
            outcome = Outcome(f"its process ended with status {worker.process.exitcode} (out of memory?)")
        queue.finish(cell, outcome)
        if not worker.process.is_alive():
            with _threads(self.count):
                self.workers[self.workers.index(worker)] = Worker()

    def close(self) -> None:
        """End all processes; what they ran can be resumed."""
        for worker in self.workers:
            worker.process.terminate()  # SIGTERM: a run ends its step and saves it
        until = time.monotonic() + LAST_STEP
        while self.workers:
            worker = self.workers.pop()
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Environment of processes that share the cores."""
    own = {name: str(max(1, cores() // count)) for name in THREADS if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]


def _work(pipe: Connection) -> None:
    """Run cells from a pipe until it closes."""
    # Ctrl-C reaches the whole group. Within a cell its run listens, and ends its step at once; an idle process is ended
    # by the first one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ImportError):
        import torch  # noqa: F401  # while the first process plans
    models = ModelCache()
    while True:
        try:
            cell, folder, keep_adapters = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            outcome = run_cell(
                RunFolder(folder),
                cell.config,
                separate=cell.separate,
                keep_adapters=keep_adapters,
                display=Silent(),
                models=models,
            )
        except Interrupted:
            return
        pipe.send(outcome)
        if outcome.error:
            models.drop()
