"""The recipes for one GPU: `grid` has the cells of the figures, and the most telling first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tell.studies.cells import grid_of
from tell.studies.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "gpu"
FIGURES = ("fig7_8", "fig11", "fig12", "map")


@pytest.fixture
def cells_of(tmp_path):
    (tmp_path / "anchor.txt").write_text("Do as the task asks.")

    def cells(name, **variables):
        recipe = load_recipe(FOLDER / f"{name}.yaml", data=tmp_path, variables=variables)
        return grid_of(recipe, {**recipe.variables, "halu": str(tmp_path)}, where=name)

    return cells


def test_the_grid_has_the_cells_of_the_figures(cells_of):
    every = {cell.name for cell in cells_of("grid")[1]}
    parts = [{cell.name for cell in cells_of(name)[1]} for name in FIGURES]
    assert every == set().union(*parts)


def test_the_most_telling_cells_come_first(cells_of):
    rows, cells = cells_of("grid")
    tokens = [cell.config.general.tokens or 0 for cell in cells]
    assert max(tokens) == 1e7 and max(tokens[: len(cells) // 2]) <= 1e6
    assert {row.seed for row in rows[:90]} == {42, 43, 44}  # a first curve with its three seeds
    assert {cell.config.train.learning_rate for cell in cells if cell.arm != "base"} == {1e-3}


def test_another_model_by_name_or_folder(cells_of, tmp_path):
    _, cells = cells_of("grid", model="some/model", rate="5e-4")
    assert {cell.config.model.name for cell in cells} == {"some/model"}
    assert {cell.config.train.learning_rate for cell in cells if cell.arm != "base"} == {5e-4}
