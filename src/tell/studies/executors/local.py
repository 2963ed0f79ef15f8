"""Cells of this machine: one after the other in this process, or several at a time in processes of their own."""

from __future__ import annotations

from tell.errors import TellError
from tell.run.session import ModelCache
from tell.studies.executors.execution import Execution, executor
from tell.studies.queue import CellQueue
from tell.studies.recipe import Resources
from tell.studies.run_cell import run_cell
from tell.studies.workers import Workers


class LocalExecutor:
    """Runs every cell in this process, with one base model in memory for all of them.

    Two processes with the same root share the work: each cell has a lock.
    """

    def run(self, queue: CellQueue) -> None:
        """Run the queue's cells until it is empty.

        Raises:
            Interrupted: SIGINT or SIGTERM; the current cell can be resumed.
        """
        models = ModelCache()
        try:
            while (cell := queue.take()) is not None:
                outcome = run_cell(
                    queue.root.cell(cell.name),
                    cell.config,
                    separate=cell.separate,
                    keep_adapters=queue.keep_adapters,
                    display=queue.display_for(cell),
                    models=models,
                )
                queue.finish(cell, outcome)
                if outcome.error:
                    models.drop()  # a failed run may have left the model changed
        finally:
            models.drop()


@executor("local")
def local(execution: Execution, resources: Resources) -> LocalExecutor | Workers:
    if execution.cpus is not None or execution.gpus is not None:
        remedy = "Leave them out, or use --executor ray."
        raise TellError("cells of this machine have no share of it", where="--cpus, --gpus", remedy=remedy)
    return Workers(execution.workers) if execution.workers > 1 else LocalExecutor()
