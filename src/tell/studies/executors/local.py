"""Cells one after the other in this process, with one base model in memory for all of them."""

from __future__ import annotations

from tell.studies.executors.registry import Execution, executor
from tell.studies.queue import CellQueue
from tell.studies.recipe import Resources
from tell.studies.run_cell import run_cell


class LocalExecutor:
    """Runs every cell here. Two processes with the same root share the work: each cell has a lock."""

    def run(self, queue: CellQueue) -> None:
        """Run what the queue hands out, until it is empty.

        Raises:
            Interrupted: SIGINT or SIGTERM; the current cell can be resumed.
        """
        from tell.verbs.open_run import keep_model

        with keep_model() as kept:
            while (cell := queue.take()) is not None:
                folder, display = queue.root.cell(cell.name), queue.display_for(cell)
                outcome = run_cell(
                    folder, cell.config, separate=cell.separate, keep_adapters=queue.keep_adapters, display=display
                )
                queue.finish(cell, outcome)
                if outcome.error:
                    kept.drop()  # a failed run may have left the model changed


@executor("local")
def local(execution: Execution, resources: Resources) -> LocalExecutor:
    return LocalExecutor()
