"""A study from its recipe to its page: which cells there are, which are still to run, and who runs them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from tell.errors import Interrupted, TellError
from tell.files import write_text
from tell.folder import reading
from tell.progress import Display, Silent
from tell.run.stop import Stop
from tell.score.custom import CustomScorer
from tell.studies.cells import Cell, Row, grid_of
from tell.studies.datasets import build_data
from tell.studies.queue import Queue, span
from tell.studies.recipe import Recipe, load_recipe
from tell.studies.study_folder import Root, StudyFolder
from tell.studies.study_plan import plan_cells, plan_table, seconds_of


class Executor(Protocol):
    """Runs the cells that a queue hands out, and tells it how each ended."""

    def run(self, queue: Queue) -> None: ...


@dataclass
class Study:
    """A recipe made out: its folder, its rows and cells."""

    recipe: Recipe
    source: Path  # the recipe's file
    folder: StudyFolder
    root: Root
    rows: list[Row]
    cells: list[Cell]

    def head(self) -> dict[str, Any]:
        """What ``study.json`` says besides rows and cells."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        if self.folder.state.exists():
            created = self.folder.read().get("created", created)
        recipe = self.recipe.model_dump(mode="json")
        root = os.path.relpath(self.root.path, self.folder.root)  # where ``cells`` lies
        about = {"title": self.recipe.title, "claim": self.recipe.claim, "source": str(self.source), "recipe": recipe}
        return {**about, "created": created, "root": root}

    def check_folder(self) -> None:
        """Refuse a folder where another recipe's study lies, or no study: its tables and page would be lost.

        Raises:
            TellError: it was written from another file, whose runs are others; or files of ours are there without it.
        """
        if not self.folder.state.exists():
            found = [path.name for path in (self.folder.page, self.folder.recipe) if path.exists()]
            if found:
                raise TellError(
                    f"has {found[0]}, which no study wrote",
                    where=str(self.folder.root),
                    remedy="Move it away, or give another folder with --out.",
                )
            return
        there, own = self.folder.read(), self.head()
        same_runs = all(there.get("recipe", {}).get(key) == own["recipe"][key] for key in ("config", "grid"))
        if there.get("source") not in (None, own["source"]) and not same_runs:
            raise TellError(
                f"holds the study of {there['source']}",
                where=str(self.folder.root),
                remedy="Give this one a folder of its own with --out; finished cells are shared all the same.",
            )

    def queue(self, display: Display, stop: Stop, **rules: bool) -> Queue:
        """Its cells as they are to be handed out."""
        return Queue(self.folder, self.root, self.head(), self.rows, self.cells, display=display, stop=stop, **rules)


def open_study(
    recipe: str | Path,
    *,
    data: str | Path | None = None,
    variables: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    root: str | Path = "studies",
    display: Display | None = None,
) -> Study:
    """Read a recipe, build its data sets where they are missing, and name its cells.

    The arguments are those of `run_study`.
    """
    path = Path(recipe)
    made = load_recipe(path, data=data, variables=variables, overrides=overrides, seeds=seeds)
    place = Root(root)
    filled = build_data(made, place, display or Silent(), where=str(path))
    rows, cells = grid_of(made, filled, where=str(path))
    if not made.title:
        made.title = path.stem
    return Study(made, path.resolve(), StudyFolder(out or place.path / path.stem), place, rows, cells)


def check_packages(recipe: Recipe) -> None:
    """Refuse to run for hours what could not be drawn or fitted at the end.

    Raises:
        TellError: a package of the extra ``study`` is missing.
    """
    wanted = {
        "matplotlib": recipe.figures or recipe.pareto or recipe.separate,
        "scipy": recipe.fits or recipe.efficiency,
        "sklearn": recipe.separate,
    }
    missing = [name for name, asked in wanted.items() if asked and find_spec(name) is None]
    if missing:
        raise TellError(
            f"what the recipe asks for needs {' and '.join(missing)}",
            where="tell study",
            remedy='Install it: pip install "tell-llm[study]".',
        )


def plan_study(
    recipe: str | Path, *, retry_failed: bool = False, display: Display | None = None, **options: Any
) -> dict[str, Any]:
    """Cells of a study with steps, tokens, FLOPs and predicted seconds; nothing is run.

    Args:
        retry_failed: failed cells count as left to do.
        options: as of `run_study`, up to ``root``.

    Returns:
        See `tell.studies.study_plan.plan_table`; and ``title``, ``folder``.

    Raises:
        TellError: bad recipe or data.
    """
    display = display or Silent()
    study = open_study(recipe, display=display, **options)
    _check_scorers(study)
    queue = study.queue(display, Stop(study.folder.root), retry_failed=retry_failed)
    table = plan_table(study.root, study.cells, queue.states, queue.points, display)
    return {"title": study.recipe.title, "folder": str(study.folder.root), **table}


def run_study(
    recipe: str | Path,
    *,
    data: str | Path | None = None,
    variables: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    root: str | Path = "studies",
    executor: Literal["local", "ray"] | Executor = "local",
    address: str = "auto",
    cpus: float | None = None,
    gpus: float | None = None,
    retry_failed: bool = False,
    keep_adapters: bool | None = None,
    display: Display | None = None,
) -> StudyFolder:
    """Run every cell of a recipe that is not finished, and write the study's tables, figures and page.

    Cells are run folders under ``<root>/cells``, named by content and shared by all studies of that root: what is
    finished is never run again. A killed cell goes on where it was, a failed one is noted and the others go on.

    Args:
        recipe: YAML file, see `tell.studies.recipe`.
        data: folder that ``${data}`` stands for.
        variables: other variables of the recipe.
        overrides: ``a.b=c`` over keys of every run.
        seeds: other seeds than the recipe's.
        out: the study's folder; default ``<root>/<name of the recipe>``.
        root: folder of the cells.
        executor: ``local``, ``ray``, or an object with ``run(queue)``.
        address: of the Ray cluster: ``auto``, ``ray://HOST:PORT``, or ``local`` for a new one on this machine.
        cpus: of each cell on the cluster; default: as the recipe says.
        gpus: of each cell on the cluster; default: as the recipe says.
        retry_failed: run failed cells again.
        keep_adapters: keep adapters of finished cells; default: as the recipe says.
        display: shows progress.

    Returns:
        The study's folder; its ``failed()`` has the errors of failed cells.

    Raises:
        TellError: bad recipe or data, said before anything is run.
        Interrupted: SIGINT or SIGTERM; tables and page say what is finished, and the same call goes on.
    """
    display = display or Silent()
    options = {"data": data, "variables": variables, "overrides": overrides, "seeds": seeds, "out": out, "root": root}
    study = open_study(recipe, display=display, **options)
    check_packages(study.recipe)
    _check_scorers(study)
    study.check_folder()
    stop = Stop(study.folder.root)
    keep = study.recipe.keep_adapters if keep_adapters is None else keep_adapters
    queue = study.queue(display, stop, retry_failed=retry_failed, keep_adapters=keep)
    write_text(study.folder.recipe, study.recipe.to_yaml())
    queue.adopt()
    queue.write()
    if queue.waiting:
        runner = executor if not isinstance(executor, str) else _executor(executor, study.recipe, address, cpus, gpus)
        with stop.listening():
            try:
                _run(study, queue, runner, display)
            except (Interrupted, KeyboardInterrupt) as error:
                done = queue.counts()["done"]
                if done:
                    _write(study)
                raise Interrupted(
                    f"stopped with {done} of {len(study.cells)} cells done",
                    where=str(study.folder.root),
                    remedy="Give the same command again to go on.",
                ) from error
            finally:
                queue.give_back()
    if queue.counts()["done"]:
        _write(study)
    return study.folder


def _check_scorers(study: Study) -> None:
    """Say now what every cell would say."""
    for scorer in dict.fromkeys(cell.config.task.scorer for cell in study.cells):
        if scorer:
            CustomScorer(scorer)


def _write(study: Study) -> None:
    from tell.studies.page.study_page import write_study  # late: it draws

    with reading(study.folder.root):
        write_study(study.folder.root)


def _run(study: Study, queue: Queue, runner: Executor, display: Display) -> None:
    done = len(study.cells) - len(queue.waiting)
    if done:
        display.note(f"{done} of {len(study.cells)} cells are done or failed already")
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
    with display.bar(f"study {study.folder.root.name}", len(queue.waiting), "cells") as queue.advance:
        queue.start()
        runner.run(queue)


def _executor(name: str, recipe: Recipe, address: str, cpus: float | None, gpus: float | None) -> Executor:
    if name == "local":
        from tell.studies.executors.local import LocalExecutor

        return LocalExecutor()
    if name == "ray":
        from tell.studies.executors.ray import RayExecutor

        given = {key: value for key, value in (("cpus", cpus), ("gpus", gpus)) if value is not None}
        return RayExecutor(address, recipe.resources.model_copy(update=given))
    raise TellError(f"no executor {name!r}", where="--executor", remedy="Use local or ray.")
