"""What a study's folder says: files, pictures, the page."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from studies.made import POINTS, curve_of, make_study
from tell.errors import TellError
from tell.report.palette import CYCLE
from tell.studies.page.drawing import PAPER, Axis, drawing, label_left, save
from tell.studies.page.figure_kinds import Contents, map_figure
from tell.studies.page.figures import _looks, draw_front
from tell.studies.page.inline import inline_svg
from tell.studies.page.study_page import notices, write_study
from tell.studies.results import read_results
from tell.studies.stats.analyses import Analyses
from tell.studies.stats.seed_means import Bootstrap

RECIPE = {
    "metrics": ["schema_adherence"],
    "figures": [
        {"x": "general.tokens", "y": "schema_adherence", "lines": "arm", "panels": "task.rows"},
        {"x": "general.tokens", "y": "probe"},
        {"kind": "map", "x": "general.tokens", "y": "task.rows", "value": "schema_adherence"},
        {"x": "general.tokens", "y": "schema_adherence", "lines": "task.rows"},
        {"x": "general.tokens", "y": "no such metric"},
    ],
    "fits": [{"x": "general.tokens", "y": "schema_adherence", "arm": "tell"}],
    "efficiency": [{"x": "task.rows", "y": "schema_adherence", "arms": ["sft", "tell"]}],
    "pareto": [{"gain": "schema_adherence", "cost": "probe"}],
}
TWO = [{**point, "task.rows": n} for n in (15, 115) for point in POINTS]
FILES = ("table.csv", "table.md", "fits.json", "efficiency.json", "flips.json", "pareto.json", "index.html")


def chance(arm: str, point: dict, seed: int) -> float:
    more = 0.3 * np.log10(point["task.rows"] / 15)
    if arm == "tell":
        return 0.1 + more + 0.5 / (1 + np.exp(-6 * (np.log10(1 + point["general.tokens"]) - 4.8)))
    return {"base": 0.05, "sft": 0.1 + more}[arm]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole study, written; do not write into it."""
    made = make_study(tmp_path_factory.mktemp("page"), points=TWO, recipe=RECIPE, chance=chance)
    assert write_study(made) == made / "index.html"
    return made


class Page(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_every_file_is_there(folder):
    assert all((folder / name).stat().st_size for name in FILES)
    names = sorted(path.name for path in (folder / "figures").iterdir())
    stems = ["figure1", "figure2", "figure3", "figure4", "front1"]  # the fifth asks for a metric that no cell has
    text = Page((folder / "index.html").read_text(encoding="utf-8")).text
    assert "The recipe requests no such metric, which no finished cell has. They have answer_loss, probe loss," in text
    assert names == sorted(f"{stem}.{kind}" for stem in stems for kind in ("svg", "png"))
    for path in (folder / "figures").glob("*.svg"):
        ElementTree.parse(path)
    fits = json.loads((folder / "fits.json").read_text())
    assert [fit["where"] for fit in fits] == [{"task.rows": n} for n in (15, 115)]
    flips = json.loads((folder / "flips.json").read_text())
    assert flips[0]["amounts"] == [p["general.tokens"] for p in POINTS] and len(flips[0]["rows"]["42"]) == 20
    efficiency = json.loads((folder / "efficiency.json").read_text())
    assert [entry["where"] for entry in efficiency] == [{"general.tokens": p["general.tokens"]} for p in POINTS]
    pareto = json.loads((folder / "pareto.json").read_text())
    assert [entry["heading"] for entry in pareto] == ["15 task rows", "115 task rows"]


def test_the_page_is_one_file_without_scripts_or_style_attributes(folder):
    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "image"}
    for tag, attributes in page.tags:
        assert "style" not in attributes, tag  # the page's policy forbids them
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    titles = [i for i in ids if i.endswith("-title")]
    assert len(titles) == len(set(titles)) == 5
    assert "Made <up>" in page.text and "x < y" in page.text  # escaped in the source
    fit = json.loads((folder / "fits.json").read_text())[0]
    assert fit["verdict"].replace(" %", "\u202f%") in page.text
    assert "45 of 45 finished" in page.text


def test_the_same_cells_give_the_same_files(folder, tmp_path):
    again = make_study(tmp_path, points=TWO, recipe=RECIPE, chance=chance)
    write_study(again)
    for name in (*FILES, "figures/figure1.svg", "figures/front1.svg"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_study_under_way(tmp_path):
    states = {("sft", 42): "running", ("sft", 43): "waiting", ("sft", 44): "failed", ("tell", 44): "waiting"}
    made = make_study(tmp_path, recipe=RECIPE, states=states)
    write_study(made)
    page = Page((made / "index.html").read_text(encoding="utf-8"))
    assert "Not complete. Of 54 rows of the study, 6 running, 12 waiting, 6 failed." in page.text
    assert "out of memory <here>" in page.text
    assert json.loads((made / "efficiency.json").read_text()) == []


def test_one_seed_is_said_to_be_one(tmp_path):
    made = make_study(tmp_path, seeds=[42], points=POINTS[:1])
    write_study(made)
    assert "One seed only: intervals cover the choice of test rows" in (made / "index.html").read_text(encoding="utf-8")


def test_pictures_of_an_earlier_recipe_go(tmp_path):
    made = make_study(tmp_path, recipe={"figures": RECIPE["figures"][:2]})
    write_study(made)
    assert len(list((made / "figures").iterdir())) == 4
    assert "One seed only" not in (made / "index.html").read_text(encoding="utf-8")
    data = json.loads((made / "study.json").read_text())
    data["recipe"]["figures"] = RECIPE["figures"][:1]
    (made / "study.json").write_text(json.dumps(data), encoding="utf-8")
    write_study(made)
    assert sorted(p.name for p in (made / "figures").iterdir()) == ["figure1.png", "figure1.svg"]


def test_a_study_with_nothing_finished(tmp_path):
    made = make_study(
        tmp_path, recipe=RECIPE, states={(arm, s): "waiting" for arm in ("base", "sft", "tell") for s in (42, 43, 44)}
    )
    write_study(made)
    assert "No cell of this study is finished." in (made / "index.html").read_text(encoding="utf-8")
    assert (made / "table.csv").read_text().count("\n") == 1


def test_without_matplotlib(tmp_path, monkeypatch):
    made = make_study(tmp_path, recipe={"figures": RECIPE["figures"][:1]})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TellError, match=r'matplotlib.*pip install "tell-llm\[study\]"'):
        write_study(made)


def test_zero_stands_apart_on_a_logarithmic_axis():
    axis = Axis([0, 10, 100, 1000])
    places = [axis.at(v) for v in axis.values]
    assert axis.log and places[1:] == [1, 2, 3] and places[0] == axis.zero <= 0.65
    assert not Axis([1, 2, 3]).log and Axis([1, 2, 3]).at(2) == 2
    assert Axis(["b", "a"]).at("a") == 1


def test_a_drawing_inside_a_page(tmp_path):
    with drawing(1, height=2) as (figure, (axes,)):
        axes.plot([0, 1], [1, 0], color="#123456", marker="o")
        axes.set_title("<title>")
    save(figure, tmp_path / "a")
    svg = inline_svg((tmp_path / "a.svg").read_text(encoding="utf-8"), key="k", title="a < b")
    root = ElementTree.fromstring(svg)
    assert root.find("title").text == "a < b" and root.attrib["aria-labelledby"] == "k-title"
    ids = {e.attrib["id"] for e in root.iter() if "id" in e.attrib}
    assert ids and all(i.startswith("k-") for i in ids)
    used = re.findall(r'(?:href="|url\()#([\w.-]+)', svg)
    assert used and set(used) <= ids
    assert "currentColor" in svg and "var(--soft)" in svg and "#123456" in svg
    assert PAPER not in svg and "<style" not in svg and "metadata" not in svg


@pytest.mark.parametrize(("panels", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (7, (3, 3))])
def test_at_most_three_panels_stand_side_by_side(panels, shape):
    with drawing(panels, height=2) as (figure, every):
        label_left(every, "share")
    assert len(every) == len(figure.axes) == panels
    assert every[0].get_subplotspec().get_gridspec().get_geometry() == shape
    named = [axes.get_ylabel() == "share" for axes in every]
    assert sum(named) == shape[0] and named[0]


def test_more_values_than_colours_do_not_look_alike():
    table = {42: np.array([[True, False], [True, True]])}
    several = [replace(curve_of(table, [0, 1], samples=50), rest={"mix.repeat": 2**n}) for n in range(len(CYCLE) + 2)]
    looks = _looks(several, [f"{c.rest['mix.repeat']} times" for c in several], "mix.repeat")
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(several)


def test_points_without_general_rows_are_called_sft():
    side = {"value": 0.5, "ci": [0.4, 0.6]}
    entries = [
        {"name": f"{n}", "point": {}, "arm": "tell", "alone": n == 0, "gain": side, "cost": side, "on_front": n > 0}
        for n in (0, 30_000)
    ]
    figure = draw_front([("", entries)], gain="schema_adherence", cost="answer_loss", title="")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["SFT", "TELL"]


def test_a_map_has_a_panel_for_every_other_key(tmp_path):
    points = [
        {"task.rows": n, "general.tokens": g, "mix.repeat": k} for n in (15, 115) for g in (0, 30_000) for k in (1, 8)
    ]
    asked = {"kind": "map", "x": "general.tokens", "y": "task.rows", "value": "schema_adherence"}
    made = make_study(
        tmp_path,
        points=points,
        arms=["tell"],
        recipe={"figures": [asked]},
        chance=lambda arm, point, seed: 0.95 if point["mix.repeat"] == 8 else 0.05,
    )
    study = read_results(made)
    drawn = map_figure(Contents(study, Bootstrap(study, 100), Analyses(), [], []), asked)
    assert drawn is not None
    titled = [axes for axes in drawn[0].axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in titled] == ["once", "8 times"]
    shown = [[text.get_text() for text in axes.texts] for axes in titled]
    assert shown[0] != shown[1]  # not the last of the two in both


def test_a_map_leaves_out_points_without_its_keys(tmp_path):
    made = make_study(
        tmp_path, arms=["tell"], points=[*POINTS[:3], {"general.tokens": 7}, {**POINTS[3], "task.rows": None}]
    )
    study = read_results(made)
    asked = {"kind": "map", "x": "general.tokens", "y": "task.rows", "value": "schema_adherence"}
    drawn = map_figure(Contents(study, Bootstrap(study, 100), Analyses(), [], []), asked)
    assert drawn is not None
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "10k", "30k", "100k"]  # without the 7
    assert [text.get_text() for text in axes.get_yticklabels()] == ["15", "not set"]


def test_weights_that_changed_under_one_name_are_said(tmp_path):
    made = make_study(tmp_path, arms=["base", "sft"], points=POINTS[:1], seeds=[42, 43])
    for path in (tmp_path / "cells").glob("*/findings.json"):
        mark = "aaaa" if path.parent.name.startswith("base") else "bbbb"
        path.write_text(json.dumps({"machine": {"model_fingerprint": mark}}), encoding="utf-8")
        (path.parent / "plan.json").write_text('{"model": {"name": "some/model"}}', encoding="utf-8")
    study = read_results(made)
    assert study.weights == {"some/model": {"aaaa": 2, "bbbb": 2}}
    assert [text for text in notices(study) if "some/model" in text and "2 with aaaa, 2 with bbbb" in text]


def test_tables_are_there_where_scipy_is_not(tmp_path, monkeypatch):
    made = make_study(tmp_path, recipe=RECIPE)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(TellError, match=r"tell-llm\[study\]"):
        write_study(made)
    assert (made / "table.csv").exists() and (made / "table.md").exists()


def test_dollar_signs_and_braces_are_no_formulas(tmp_path: Path) -> None:
    with drawing(1, height=2) as (figure, (axes,)):
        axes.set_title(r"$\frac{ $ and 5 $ and $x$")
        axes.plot([1, 10], [1, 2], label=r"$\undefined$")
        axes.set_xscale("log")
        save(figure, tmp_path / "figure")
    assert (tmp_path / "figure.svg").exists()
