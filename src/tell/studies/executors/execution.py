"""Executors by name. To add one, put a module into this folder::

@executor("mine")
def mine(execution: Execution, resources: Resources) -> Executor: ...
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import tell.studies.executors
from tell.errors import TellError
from tell.registry import Registry

if TYPE_CHECKING:
    from tell.studies.queue import CellQueue
    from tell.studies.recipe import Recipe, Resources


class Executor(Protocol):
    """Runs the cells that a queue hands out, and reports how each ended."""

    def run(self, queue: CellQueue) -> None: ...


@dataclass(frozen=True)
class Execution:
    """How the cells of a study are run.

    Attributes:
        executor: the name of a registered executor, or an object with ``run(queue)``.
        address: of the Ray cluster: ``auto``, ``ray://HOST:PORT``, or ``local`` to start one on this machine.
        cpus, gpus: for each cell on a cluster; default: as the recipe says.
        retry_failed: run failed cells again.
        keep_adapters: keep the adapters of finished cells; default: as the recipe says.
        workers: processes of this machine that run cells at the same time (executor ``local``).
        minutes: time limit: a cell that is predicted to end later is not begun, one that still runs is stopped.
        render: write tables and page at the end; what is finished can be rendered later.
    """

    executor: str | Executor = "local"
    address: str = "auto"
    cpus: float | None = None
    gpus: float | None = None
    retry_failed: bool = False
    keep_adapters: bool | None = None
    workers: int = 1
    minutes: float | None = None
    render: bool = True

    def keeps(self, recipe: Recipe) -> bool:
        """Whether adapters of finished cells are kept."""
        return recipe.keep_adapters if self.keep_adapters is None else self.keep_adapters

    def start(self, resources: Resources) -> Executor:
        """The executor, ready to run.

        Args:
            resources: of each cell, as the recipe says.

        Raises:
            TellError: no such executor, or it needs a package that is not installed.
        """
        if not isinstance(self.executor, str):
            return self.executor
        known = executors()
        if self.executor not in known:
            remedy = f"Use {' or '.join(known)}."
            raise TellError(f"no executor {self.executor!r}", where="--executor", remedy=remedy)
        return known[self.executor](self, resources)


LOCAL = Execution()
Factory = Callable[[Execution, "Resources"], Executor]
executor = Registry[Factory]("executor")


@cache
def executors() -> dict[str, Factory]:
    """Every executor of this folder by name; a module that registers none is an error."""
    for module in pkgutil.iter_modules(tell.studies.executors.__path__):
        place = import_module(f"tell.studies.executors.{module.name}")
        if module.name != "execution" and not any(make.__module__ == place.__name__ for make in executor.values()):
            raise ValueError(f"{place.__name__} registers no executor")
    return executor
