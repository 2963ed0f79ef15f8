"""The recipes that come with the repository: valid, and of cells that can be named."""

from pathlib import Path

import pytest

from tell.studies.cells import grid_of
from tell.studies.recipe import load_recipe, used_variables
from tell.studies.separation_cells import ADDED, CONTRASTS

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe(path, tmp_path):
    recipe = load_recipe(path, data=tmp_path)
    variables = {**recipe.variables, **{name: str(tmp_path) for name in recipe.build}}
    assert set(used_variables(recipe)) <= set(variables)
    for key in ("anchor.txt", "is-en/anchor.txt", "en-is/anchor.txt"):
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_text("Do as the task asks.")
    rows, cells = grid_of(recipe, variables, where=str(path))
    assert {row.seed for row in rows} == {42, 43, 44}
    compared = {*CONTRASTS, ADDED} if recipe.separate else set()
    assert {row.arm for row in rows} == {*recipe.arms, *compared}
    assert {row.cell for row in rows} == {cell.name for cell in cells}
    assert (recipe.title and recipe.claim and recipe.figures) or path.stem in ("a5", "fig3_4")


def test_every_recipe_is_in_the_table():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in RECIPES:
        assert f"`{path.stem}`" in table, f"{path} is missing in recipes/README.md"
