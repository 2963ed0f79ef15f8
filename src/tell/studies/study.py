"""`tell study`: a recipe's cells planned, or run and rendered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tell.errors import Interrupted, TellError
from tell.files import write_text
from tell.folder import reading
from tell.progress import Display, Silent
from tell.run.stop import Stop
from tell.studies.executors.execution import LOCAL, Execution
from tell.studies.open_study import UNCHANGED, Changes, Study, open_study
from tell.studies.packed import restore_cells, usable_cells
from tell.studies.queue import CellQueue, span
from tell.studies.recipe import Recipe
from tell.studies.run_cell import InnerDisplay
from tell.studies.study_folder import StudyFolder, needs
from tell.studies.study_plan import Planner, plan_cells, plan_table, seconds_of


def plan_study(
    recipe: str | Path,
    *,
    data: str | Path | None = None,
    changes: Changes = UNCHANGED,
    out: str | Path | None = None,
    root: str | Path = "studies",
    execution: Execution = LOCAL,
    display: Display | None = None,
) -> dict[str, Any]:
    """Cells of a study with steps, tokens, FLOPs and predicted seconds; runs nothing.

    Args:
        execution: with ``retry_failed``, failed cells count as left to do; with ``keep_adapters``, packed ones.
        recipe, data, changes, out, root, display: as for `run_study`.

    Returns:
        See `tell.studies.study_plan.plan_table`; and ``title``, ``folder``.

    Raises:
        TellError: bad recipe or data.
    """
    display = display or Silent()
    study = open_study(recipe, data=data, changes=changes, out=out, root=root, display=display)
    study.check_scorers()
    queue = CellQueue(study, display=display, stop=Stop(study.folder.root), retry_failed=execution.retry_failed)
    states = dict(queue.states)
    for name, _ in usable_cells(study, keep_adapters=execution.keeps(study.recipe), display=display):
        states[name] = {**states[name], "state": "done"}
    table = plan_table(study.root, study.cells, states, queue.points, display)
    return {"title": study.recipe.title, "folder": str(study.folder.root), **table}


def run_study(
    recipe: str | Path,
    *,
    data: str | Path | None = None,
    changes: Changes = UNCHANGED,
    out: str | Path | None = None,
    root: str | Path = "studies",
    execution: Execution = LOCAL,
    display: Display | None = None,
) -> StudyFolder:
    """Run every cell of a recipe that is not finished, and write the study's tables, figures and page.

    Cells are run folders under ``<root>/cells``, named by content and shared by all studies of that root: a finished
    cell is never run again. A killed cell resumes where it was; a failed one is recorded and the others go on.

    Args:
        recipe: YAML file, see `tell.studies.recipe`.
        data: folder that ``${data}`` stands for.
        changes: other variables, overrides and seeds of the recipe.
        out: the study's folder; default ``<root>/<name of the recipe>``. Cells packed there are not run,
            except comparisons of hidden states, and where adapters are kept.
        root: folder of the cells.
        execution: the executor and its options; its time limit counts from the call.
        display: shows progress.

    Returns:
        The study's folder; its ``failed()`` has the errors of failed cells.

    Raises:
        TellError: bad recipe or data, before anything is run.
        Interrupted: SIGINT or SIGTERM; tables and page show what is finished, and the same call resumes. A time limit
            ends the call as if all were done.
    """
    if execution.minutes is not None and execution.minutes < 0:
        remedy = "Give at least 0; 0 draws what is there and begins nothing."
        raise TellError(f"{execution.minutes:g} is negative", where="--minutes", remedy=remedy)
    begin, seconds = time.monotonic(), None if execution.minutes is None else 60 * execution.minutes
    display = display or Silent()
    study = open_study(recipe, data=data, changes=changes, out=out, root=root, display=display)
    check_packages(study.recipe)
    study.check_scorers()
    study.check_folder()
    stop = Stop(study.folder.root)
    keep = execution.keeps(study.recipe)
    restore_cells(study, keep_adapters=keep, display=display)
    queue = CellQueue(study, display=display, stop=stop, retry_failed=execution.retry_failed, keep_adapters=keep)
    write_text(study.folder.recipe, study.recipe.to_yaml())
    queue.adopt()
    queue.write()
    if queue.waiting:
        executor = execution.start(study.recipe.resources)
        if seconds is not None:
            queue.deadline = begin + seconds
        left = None if queue.deadline is None else max(0.0, queue.deadline - time.monotonic())
        with stop.listening(), stop.after(left):
            try:
                with _given_back(queue):
                    (_predict if left is None else _predict_one_by_one)(study, queue)
                    with display.bar(f"study {study.folder.root.name}", len(queue.waiting), "cells") as queue.advance:
                        queue.start()
                        executor.run(queue)
            except (Interrupted, KeyboardInterrupt) as error:
                done = queue.counts()["done"]
                if done and execution.render:
                    _write(study)
                if queue.deadline is not None and time.monotonic() >= queue.deadline:
                    display.note(f"the time limit stopped it with {done} of {len(study.cells)} cells done")
                    return study.folder
                raise Interrupted(
                    f"stopped with {done} of {len(study.cells)} cells done",
                    where=str(study.folder.root),
                    remedy="Run the same command again to resume.",
                ) from error
    counts = queue.counts()
    if counts["done"] and execution.render:
        _write(study)
    if counts["waiting"]:
        display.note(f"{counts['waiting']} cells were not begun: they would not end within the time limit")
    return study.folder


def check_packages(recipe: Recipe) -> None:
    """Raise TellError now if a package is missing that the recipe's figures and fits need after hours of runs."""
    wanted = {
        "matplotlib": recipe.figures or recipe.pareto or recipe.separate,
        "scipy": recipe.fits or recipe.efficiency,
        "sklearn": recipe.separate,
    }
    missing = [name for name, asked in wanted.items() if asked and find_spec(name) is None]
    if missing:
        raise needs(f"the recipe needs {' and '.join(missing)}")


@contextmanager
def _given_back(queue: CellQueue) -> Iterator[None]:
    """Give back the cells that did not end, before they are counted."""
    try:
        yield
    finally:
        queue.give_back()


def _write(study: Study) -> None:
    from tell.studies.page.study_page import write_study  # imported here, because it loads matplotlib

    with reading(study.folder.root):
        write_study(study.folder.root)


def _predict_one_by_one(study: Study, queue: CellQueue) -> None:
    """Let the queue predict a cell when its turn comes: under a time limit the others would only wait for it."""
    planner = Planner(study.root, InnerDisplay(queue.advance, "plan"))
    queue.predict = lambda cell: seconds_of(planner.cost(cell))
    queue.display.note(f"{len(queue.waiting)} of {len(study.cells)} cells to run within the time limit")


def _predict(study: Study, queue: CellQueue) -> None:
    """Predict the seconds of each waiting cell; refuse a study none of whose cells can be run."""
    display = queue.display
    if done := len(study.cells) - len(queue.waiting):
        display.note(f"{done} of {len(study.cells)} cells are already done or failed")
    predicted: dict[str, float] = {}
    errors: set[str | None] = set()
    for cell, cost in plan_cells(study.root, queue.waiting, display):
        queue.stop.check()
        predicted[cell.name] = seconds_of(cost)
        errors.add(cost["error"])
    if len(errors) == 1 and None not in errors and len(queue.waiting) == len(study.cells) > 1:
        raise TellError(f"no cell can be run: {errors.pop()}", where=str(study.source))
    queue.predicted = predicted
    display.note(f"{len(queue.waiting)} cells to run, predicted {span(sum(predicted.values()))}")
