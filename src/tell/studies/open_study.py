"""Opens a study before it runs: reads the recipe, builds data sets, names cells."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tell.errors import TellError
from tell.progress import Display, Silent
from tell.score.custom import CustomScorer
from tell.studies.cells import Cell, Row, grid_of
from tell.studies.datasets import build_data
from tell.studies.recipe import Recipe, load_recipe
from tell.studies.study_folder import Root, StudyFolder


@dataclass(frozen=True)
class Changes:
    """Changes to a recipe, from the command line.

    Attributes:
        variables: values of ``${name}`` other than ``${data}``.
        overrides: ``a.b=c`` over keys of every run.
        seeds: replace the recipe's.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    seeds: Sequence[int] | None = None


UNCHANGED = Changes()


@dataclass
class Study:
    """A recipe with its folder, rows and cells."""

    recipe: Recipe
    source: Path  # the recipe's file
    folder: StudyFolder
    root: Root
    rows: list[Row]
    cells: list[Cell]

    def head(self) -> dict[str, Any]:
        """``study.json`` without rows and cells."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        if self.folder.state.exists():
            created = self.folder.read().get("created", created)
        return {
            "title": self.recipe.title,
            "claim": self.recipe.claim,
            "source": str(self.source),
            "recipe": self.recipe.model_dump(mode="json"),
            "created": created,
            "root": os.path.relpath(self.root.path, self.folder.root),
        }

    def check_folder(self) -> None:
        """Refuse to overwrite the tables and page of another recipe's study, or files that no study wrote.

        Raises:
            TellError: the folder has such files.
        """
        if not self.folder.state.exists():
            found = [path.name for path in (self.folder.page, self.folder.recipe) if path.exists()]
            if found:
                remedy = "Move it away, or name another folder with --out."
                raise TellError(f"has {found[0]}, which no study wrote", where=str(self.folder.root), remedy=remedy)
            return
        there, own = self.folder.read(), self.head()
        same_runs = all(there.get("recipe", {}).get(key) == own["recipe"][key] for key in ("config", "grid"))
        if there.get("source") not in (None, own["source"]) and not same_runs:
            remedy = "Use a separate folder with --out; finished cells are shared all the same."
            raise TellError(f"contains the study of {there['source']}", where=str(self.folder.root), remedy=remedy)

    def check_scorers(self) -> None:
        """Raise the TellError of a custom scorer that every cell would fail with."""
        for scorer in dict.fromkeys(cell.config.task.scorer for cell in self.cells):
            if scorer:
                CustomScorer(scorer)


def open_study(
    recipe: str | Path,
    *,
    data: str | Path | None = None,
    changes: Changes = UNCHANGED,
    out: str | Path | None = None,
    root: str | Path = "studies",
    display: Display | None = None,
) -> Study:
    """A study ready to plan or run: recipe read, missing data sets built, cells named.

    The arguments are those of `tell.studies.study.run_study`.
    """
    path, place = Path(recipe), Root(root)
    made = load_recipe(path, data=data, variables=changes.variables, overrides=changes.overrides, seeds=changes.seeds)
    filled = build_data(made, place, display or Silent(), where=str(path))
    rows, cells = grid_of(made, filled, where=str(path))
    if not made.title:
        made.title = path.stem
    folder = StudyFolder(out or place.path / path.stem)
    return Study(made, path.resolve(), folder, place, rows, cells)
