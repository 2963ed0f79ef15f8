"""Cells that compare hidden states: named by what moves them, run once, shown on the page."""

from __future__ import annotations

import csv

import pytest

import tell
from run.runs import EXAMPLES, read
from studies.studies import recipe_of
from tell.errors import TellError
from tell.progress import Silent
from tell.studies.cells import grid_of
from tell.studies.recipe import make_recipe
from tell.studies.results import read_results
from tell.studies.separation_cells import ADDED, CONTRASTS
from tell.studies.stats.curves import curves
from tell.studies.stats.seed_means import Bootstrap


def cells_of(model, grid, **keys):
    return grid_of(make_recipe({**recipe_of(model), "arms": [], "separate": {"queries": 8}, **keys, "grid": grid}), {})


def test_numbers_table_and_pictures(recipe, tmp_path):
    root, shown = tmp_path / "studies", Silent()
    metrics = ["linear_probe", "silhouette", "mmd2", "length_probe"]
    keys = {
        "grid": [{"anchor.text": ["Sort this mail.", "none"]}],
        "arms": [],
        "separate": {"queries": 8},
        "metrics": metrics,
        "seeds": [1, 2],
        "figures": [{"x": "anchor.text", "y": "silhouette"}],
    }
    plan = tell.plan_study(recipe(**keys), root=root)
    assert plan["left"]["cells"] == 4 and plan["left"]["flops"] == 0 and plan["left"]["seconds"] > 0
    folder = tell.run_study(recipe(**keys), root=root, display=shown)
    data = folder.read()
    assert {name.partition("-")[0] for name in data["cells"]} == {"separate"} and not folder.failed()
    assert sum(text.startswith("✓") and "silhouette" in text for text in shown.notes) == 4
    separated = {
        name: tell.separate(
            tell.load_config(root / "cells" / name / "run.yaml"),
            compare=tell.Comparison(queries=8),
            out=tmp_path / name,
        )
        for name in data["cells"]
    }
    for row in data["rows"]:
        cell, alone = root / "cells" / row["cell"], separated[row["cell"]]
        layer = alone["layers"][str(alone["picture"]["layer"])]
        found = read(cell / "metrics.json")["arms"][row["arm"]]
        if row["arm"] == ADDED:
            assert found == {"silhouette": layer["with - without"]["silhouette"]}
        else:
            assert [found[m] for m in metrics[:3]] == [layer[row["arm"]][m] for m in ("probe", "silhouette", "mmd2")]
            assert found["length_probe"] == alone["length"][row["arm"]]
    lines = list(csv.DictReader((folder.root / "table.csv").open(encoding="utf-8")))
    assert [line["arm"] for line in lines if line["anchor.text"] != "none"] == [*CONTRASTS, ADDED]
    assert [line["arm"] for line in lines if line["anchor.text"] == "none"] == ["without anchor"]
    assert all(line["seeds"] == "2" and float(line["silhouette"]) for line in lines)
    drawn = {path.name for path in (folder.root / "figures").iterdir()}
    assert drawn == {
        f"{stem}.{kind}" for stem in ("figure1", "figure-states1", "figure-states2") for kind in ("svg", "png")
    }
    page = folder.page.read_text(encoding="utf-8")
    assert "Hidden states" in page and "length alone" in page
    before = {path: path.stat().st_mtime_ns for path in root.glob("cells/*/metrics.json")}
    tell.run_study(recipe(**keys), root=root)
    assert before == {path: path.stat().st_mtime_ns for path in root.glob("cells/*/metrics.json")}


def test_a_data_set_comes_with_its_own_anchor(recipe, tmp_path):
    """The anchor goes along with the data: one curve over the data, no column in the table."""
    grid = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "anchor.txt").write_text(f"Sort {name}.")
        (folder / "train.jsonl").write_text((EXAMPLES / "support/train.jsonl").read_text(encoding="utf-8"))
        grid.append({"task.data": [f"${{{name}}}/train.jsonl"], "anchor.text": [f"@${{{name}}}/anchor.txt"]})
    keys = {"grid": grid, "arms": [], "separate": {"queries": 8}, "figures": [{"x": "task.data", "y": "silhouette"}]}
    path = recipe(**keys, variables={name: str(tmp_path / name) for name in ("one", "two")})
    folder = tell.run_study(path, root=tmp_path / "studies")
    study = read_results(folder.root)
    drawn = curves(study, Bootstrap(study), x="task.data", y="silhouette")
    assert [(c.arm, len(c.x), c.rest) for c in drawn] == [(name, 2, {}) for name in (*CONTRASTS, ADDED)]
    lines = list(csv.DictReader((folder.root / "table.csv").open(encoding="utf-8")))
    assert "anchor.text" not in lines[0] and {line["task.data"] for line in lines} == {
        "one/train.jsonl",
        "two/train.jsonl",
    }


def test_beside_arms_that_train(tiny_model):
    model = tiny_model("llama")
    rows, cells = cells_of(model, {"general.rows": [4, 8], "train.learning_rate": [1e-3, 1e-2]}, arms=["tell"])
    compared = [cell for cell in cells if cell.separate is not None]
    assert len(compared) == 1 and len(cells) == 5  # neither amounts nor training move the untuned model's states
    assert sum(row.cell == compared[0].name for row in rows) == 4 * 4


@pytest.mark.parametrize(
    "change", [{"anchor.text": ["Other."]}, {"seed": 7}, {"general.source": ["self"]}, {"task.test_rows": [5]}]
)
def test_what_moves_the_states_names_the_cell(tiny_model, change):
    model = tiny_model("llama")
    seeds = [change.pop("seed", 42)]
    assert cells_of(model, {})[1][0].name != cells_of(model, change, seeds=seeds)[1][0].name


def test_options_name_the_cell(tiny_model):
    model = tiny_model("llama")
    names = {
        cells_of(model, {}, separate=options)[1][0].name
        for options in ({"queries": 8}, {"queries": 9}, {"state": "mean"}, {"layer": 1}, {"match_length": True})
    }
    assert len(names) == 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arms": []}, "arms is empty"),
        ({"arms": [], "separate": {"querys": 8}}, "unknown key separate.querys; did you mean separate.queries"),
        ({"arms": [], "separate": {"layer": "all"}}, "separate.layer: .*neither middle nor a number"),
        ({"arms": [], "separate": {"queries": 2}}, "separate.queries"),
    ],
)
def test_bad_recipes(keys, message):
    with pytest.raises(TellError, match=message):
        make_recipe(keys)
