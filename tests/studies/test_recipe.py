"""Recipes: keys, variables, grids."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tell.errors import TellError
from tell.nested import dig, nest
from tell.studies.recipe import PARTS, Recipe, load_recipe, make_recipe, points
from tell.studies.recipe_docs import recipe_docs


def written(tmp_path: Path, **keys) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ({"figuers": []}, "did you mean figures?"),
        ({"config": {"general": {"token": 5}}}, "did you mean general.tokens?"),
        ({"grid": {"task.row": [1]}}, "did you mean task.rows?"),
        ({"grid": [{"mix.repeat": [1]}, {"general.ratoi": [1]}]}, "did you mean general.ratio?"),
        ({"figures": [{"x": "task.rows", "y": "accuracy", "panel": "seed"}]}, "did you mean figures[0].panels?"),
        ({"resources": {"cpu": 1}}, "did you mean resources.cpus?"),
        ({"arms": ["base", "tel"]}, "arms.1"),
        ({"arms": ["base", "stf"]}, "did you mean sft?"),
        ({"seeds": []}, "seeds"),
        ({"grid": {"task.rows": []}}, "grid.task.rows has no value"),
        ({"grid": {"task.rows": 15}}, "grid.task.rows"),
        ({"grid": {"seed": [1, 2]}}, "Set seeds"),
        ({"config": {"eval": {"arms": ["tell"]}}}, "Set arms"),
        ({"build": {"halu": {"source": "x"}}}, "build.halu names no dataset"),
        ({"figures": [{"kind": "map", "x": "task.rows", "y": "mix.repeat"}]}, "a map needs value"),
    ],
)
def test_a_wrong_key_or_value_is_named(keys, hint):
    with pytest.raises(TellError) as error:
        make_recipe(keys, where="fig.yaml")
    assert hint in str(error.value) and str(error.value).startswith("fig.yaml")


def test_variables(tmp_path):
    path = written(
        tmp_path,
        build={"halu": {"dataset": "halu-cot-json", "source": "${data}/rows.jsonl"}},
        config={"task": {"data": "${halu}/train.jsonl"}, "general": {"source": "${where}/${what}.jsonl"}},
        variables={"what": "alpaca"},
    )
    with pytest.raises(TellError, match=r"\$\{data\} in build\.halu\.source is not given.*Add --data DIR"):
        load_recipe(path)
    with pytest.raises(TellError, match=r"\$\{where\} in config\.general\.source is not given.*--var where=VALUE"):
        load_recipe(path, data=tmp_path)
    with pytest.raises(TellError, match=r"no \$\{were\}; did you mean where\?"):
        load_recipe(path, data=tmp_path, variables={"were": "x"})
    with pytest.raises(TellError, match=r"--data .*no such folder"):
        load_recipe(path, data=tmp_path / "nowhere", variables={"where": "x"})
    recipe = load_recipe(path, data=tmp_path, variables={"where": "/g"})
    assert recipe.variables == {"data": str(tmp_path), "where": "/g", "what": "alpaca"}
    again = written(tmp_path, **yaml.safe_load(recipe.to_yaml()))
    assert load_recipe(again) == recipe  # the resolved recipe needs nothing beside it


def test_recipe_is_the_folder_of_the_file(tmp_path):
    path = written(tmp_path, config={"task": {"data": "${recipe}/train.jsonl"}})
    assert load_recipe(path).variables == {"recipe": str(tmp_path)}


def test_variables_of_variables(tmp_path):
    config = {"general": {"source": "${file}"}}
    path = written(tmp_path, config=config, variables={"sub": "${data}/x", "file": "${sub}/g.jsonl"})
    assert load_recipe(path, data=tmp_path).variables["file"] == f"{tmp_path}/x/g.jsonl"
    assert load_recipe(path, variables={"sub": "/y"}).variables["file"] == "/y/g.jsonl"
    with pytest.raises(TellError, match=r"\$\{data\} in variables.sub is not given.*--data DIR"):
        load_recipe(path)
    path = written(tmp_path, config=config, variables={"file": "${sub}/g.jsonl", "sub": "${file}"})
    with pytest.raises(TellError, match=r"variables.\w+ contains itself"):
        load_recipe(path)
    build = {"halu": {"dataset": "halu-cot-json", "source": "x.jsonl"}}
    path = written(tmp_path, config=config, variables={"file": "${halu}/g.jsonl"}, build=build)
    with pytest.raises(TellError, match=r"variables.file contains \$\{halu\}, which is built later"):
        load_recipe(path)


def test_overrides_and_seeds(tmp_path):
    path = written(
        tmp_path,
        config={"general": {"ratio": 20}},
        grid=[{"task.rows": [15, 115], "mix.repeat": [1, 2]}, {"mix.repeat": [8]}],
    )
    recipe = load_recipe(path, overrides=["task.rows=30", "general.tokens=1e4", "train.lora_r=2"], seeds=[7, 7, 8])
    assert recipe.grid == ({"task.rows": [30], "mix.repeat": [1, 2]}, {"mix.repeat": [8]})
    # one amount replaces another; products without the key take it from there
    assert recipe.config == {"task": {"rows": 30}, "general": {"tokens": 1e4}, "train": {"lora_r": 2}}
    assert recipe.seeds == (7, 8)


def test_an_override_that_the_grid_would_undo_is_refused(tmp_path):
    path = written(tmp_path, grid=[{"task.rows": [15]}, {"general.tokens": [0, 1e4]}])
    with pytest.raises(
        TellError, match=r"--set general.ratio: the grid has general.tokens, .* Set general.tokens instead"
    ):
        load_recipe(path, overrides=["general.ratio=5"])
    with pytest.raises(TellError, match=r"--set general.ratio: the grid has general.tokens"):
        load_recipe(path, overrides=["general={ratio: 5}"])  # the same, said as a whole section
    whole = load_recipe(path, overrides=["general={tokens: 7, source: x}"])
    assert whole.grid == ({"task.rows": [15]}, {"general.tokens": [7]})
    sections = written(tmp_path, grid=[{"mix": [{"repeat": 1, "order": "shuffle"}, {"repeat": 4}]}])
    assert load_recipe(sections, overrides=["mix.repeat=2"]).grid == (
        {"mix": [{"repeat": 2, "order": "shuffle"}, {"repeat": 2}]},
    )
    for text, remedy in (("seed=1", "--seeds"), ("eval={arms: [tell]}", "arms in the recipe")):
        with pytest.raises(TellError, match=rf"--set (seed|eval.arms): .*{remedy}"):
            load_recipe(path, overrides=[text])
    with pytest.raises(TellError, match=r"max_minutes is set under config.* cells cut short"):
        make_recipe({"config": {"max_minutes": 5}})


def test_a_union_of_products_has_each_point_once():
    recipe = make_recipe({"grid": [{"task.rows": [1, 2], "mix.repeat": [1]}, {"mix.repeat": [1], "task.rows": [2, 3]}]})
    assert [point["task.rows"] for point, _ in points(recipe, 42)] == [1, 2, 3]
    assert points(make_recipe({}), 42) == [({}, ("base", "sft", "sft-matched", "tell"))]


def test_a_product_with_arms_and_seeds_of_its_own(tmp_path):
    grid = [
        {"task.rows": [1], "arms": ["tell"]},
        {"task.rows": [1, 2], "arms": ["sft"], "seeds": [42]},
        {"task.rows": [3], "seeds": [43, 44]},
    ]
    path = written(tmp_path, arms=["base", "sft", "tell"], grid=grid)
    recipe = load_recipe(path)
    assert points(recipe, 42) == [({"task.rows": 1}, ("sft", "tell")), ({"task.rows": 2}, ("sft",))]
    assert points(recipe, 44) == [({"task.rows": 1}, ("tell",)), ({"task.rows": 3}, ("base", "sft", "tell"))]
    one = load_recipe(path, seeds=[43, 7], overrides=["task.rows=5"])
    assert one.grid == ({"task.rows": [5], "arms": ["tell"]}, {"task.rows": [5], "seeds": [43]})
    assert points(one, 7) == [({"task.rows": 5}, ("tell",))]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"arms": ["tel"]}, r"arm 'tel', which the recipe's arms lack; did you mean tell\?.* They are base, sft"),
        ({"arms": ["icl"]}, "arm 'icl', which the recipe's arms lack"),
        ({"seeds": [7]}, "seed 7, which the recipe's seeds lack.* They are 42, 43, 44"),
        ({"seeds": []}, "grid.seeds has no value"),
        ({"task.tokens": [500]}, "has task.rows and task.tokens, which give the same amount twice"),
    ],
)
def test_arms_and_seeds_of_a_product_are_among_the_recipes(grid, message):
    with pytest.raises(TellError, match=message):
        make_recipe({"grid": [{"task.rows": [15]}, {"task.rows": [30], **grid}]})


def test_seeds_that_no_product_is_run_with(tmp_path):
    path = written(tmp_path, grid={"task.rows": [15], "seeds": [42]})
    with pytest.raises(TellError, match=r"nothing in the grid is run with seed 43, 44.* use one of those"):
        load_recipe(path, seeds=[43, 44])


@given(st.lists(st.text("abc_", min_size=1), min_size=1, max_size=4), st.integers())
def test_nested_keys_are_found_again(parts, value):
    assert dig(nest(".".join(parts), value), ".".join(parts)) == value


def test_the_documentation_has_every_key():
    text = recipe_docs()
    page = Path(__file__).parents[2] / "docs/reference/recipe.md"
    assert page.read_text(encoding="utf-8") == text, "run python -m tell.studies.recipe_docs > docs/reference/recipe.md"
    for model in (Recipe, *PARTS.values()):
        assert all(f"| `{name}` |" in text for name in model.model_fields)
    example = text.partition("\n\n    ")[2].partition("\n\n")[0]
    assert make_recipe(yaml.safe_load(textwrap.dedent(f"    {example}"))).arms[-1] == "tell"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"figures": [{"x": "task.row", "y": "m"}]}, r"figures\[0\].x is 'task.row'.*did you mean task.rows\?"),
        ({"figures": [{"x": "task.rows", "y": "m", "lines": "general.rows"}]}, r"figures\[0\].lines is 'general.rows'"),
        ({"figures": [{"x": "task.rows", "y": "m", "panels": "seed"}]}, r"figures\[0\].panels is 'seed'"),
        (
            {"figures": [{"kind": "map", "x": "task.rows", "y": "general.token", "value": "m"}]},
            r"figures\[0\].y is 'general.token'.*did you mean general.tokens\?",
        ),
        ({"fits": [{"x": "mix.repeat", "y": "m"}]}, r"fits\[0\].x is 'mix.repeat', which is not a key of the grid"),
        ({"fits": [{"x": "task.rows", "y": "m", "arm": "general"}]}, r"fits\[0\].arm is general.*Use base, sft"),
        ({"figures": [{"kind": "map", "x": "task.rows", "y": "general.tokens", "value": "m", "arm": "icl"}]}, "is icl"),
        ({"efficiency": [{"x": "task.rows", "y": "m", "arms": ["icl", "tell"]}]}, r"efficiency\[0\].arms is icl"),
        ({"efficiency": [{"x": "rows", "y": "m"}]}, r"efficiency\[0\].x is 'rows'.* Use general.tokens or task.rows"),
    ],
)
def test_what_is_drawn_is_a_key_of_the_grid(tmp_path, keys, message):
    """Said before hours of cells, not after them."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"grid": {"task.rows": [15], "general.tokens": [0, 10]}, **keys}), encoding="utf-8")
    with pytest.raises(TellError, match=message):
        load_recipe(path)


def test_a_data_set_is_made_of_earlier_ones():
    one, two = {"dataset": "a", "source": "${b}/x"}, {"dataset": "b"}
    assert make_recipe({"build": {"b": two, "a": one}}).build["a"] == one
    with pytest.raises(TellError, match=r"build.a is made of \$\{b\}, which comes after it. Put b before a"):
        make_recipe({"build": {"a": one, "b": two}})
    with pytest.raises(TellError, match=r"build.b is made of \$\{b\}, which is itself"):
        make_recipe({"build": {"b": one}})


def test_messages_speak_of_what_stands_in_the_file():
    with pytest.raises(TellError, match=r"^r: arms is empty, and nothing is to be separated"):
        make_recipe({"arms": []}, where="r")
    with pytest.raises(TellError, match=r"seeds: Input should be a valid list \(got 42\)"):
        make_recipe({"seeds": 42}, where="r")


def test_a_variable_does_not_hide_a_data_set(tmp_path):
    """Whoever gives it would train on something else without a word."""
    keys = {"build": {"halu": {"dataset": "halu-cot-json", "source": "x"}}, "config": {"task": {"data": "${halu}/a"}}}
    with pytest.raises(TellError, match=r"--var halu: halu is a variable and a data set under build.*Rename"):
        load_recipe(written(tmp_path, **keys), variables={"halu": "/mine"})
    with pytest.raises(TellError, match=r"variables.halu: halu is a variable"):
        load_recipe(written(tmp_path, **keys, variables={"halu": "/mine"}))


def test_a_grid_of_a_billion_cells_is_refused_before_its_points_are_made(tmp_path):
    path = tmp_path / "recipe.yaml"
    values = list(range(1, 1001))
    grid = {"task.rows": values, "general.rows": values, "mix.repeat": values}
    path.write_text(yaml.safe_dump({"config": {"task": {"data": "x.jsonl"}}, "grid": grid}))
    with pytest.raises(TellError, match=r"12,000,000,000 cells; a study has at most 10,000"):
        load_recipe(path)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(TellError, match="a pipe or device"):
            load_recipe(place)
