"""Curves and tables: what belongs together, and cells that points share."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from studies.made import make_study
from tell.studies.labels import key_name, point_name, rounded, value_name
from tell.studies.results import read_results
from tell.studies.stats.curves import curves
from tell.studies.stats.results_table import ANY, gaps, lines, to_csv, to_markdown
from tell.studies.stats.seed_means import Bootstrap

GRID = [{"task.rows": n, "mix.repeat": k, "general.tokens": g} for n in (15, 115) for k in (1, 4) for g in (30_000, 0)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return read_results(make_study(tmp_path_factory.mktemp("study"), points=GRID))


@pytest.fixture(scope="module")
def bootstrap(study):
    return Bootstrap(study, 200)


def test_a_curve_for_each_value_of_the_other_keys(study, bootstrap):
    found = curves(study, bootstrap, x="general.tokens", y="schema_adherence")
    rests = {arm: [c.rest for c in found if c.arm == arm] for arm in ("base", "sft", "tell")}
    assert rests == {
        "base": [{}],  # one cell, whatever the point
        "sft": [{"task.rows": 15}, {"task.rows": 115}],  # its cells know no repetition
        "tell": [{"task.rows": n, "mix.repeat": k} for n in (15, 115) for k in (1, 4)],
    }
    assert all(c.x == [0, 30_000] and c.numeric for c in found)
    assert {c.arm: c.flat for c in found} == {"base": True, "sft": True, "tell": False}
    tell = found[-1]
    own = [o for o in study.outcomes if o.arm == "tell" and o.point == GRID[-1]]
    assert tell.groups[0] == own and tell.values[0] == pytest.approx(
        np.mean([o.measured.metrics["schema_adherence"].value for o in own])
    )
    assert tell.samples.shape == (200, 2)


def test_some_arms_and_points_only(study, bootstrap):
    found = curves(study, bootstrap, x="mix.repeat", y="answer_loss", arms=["tell"], within={"task.rows": 115})
    assert [c.rest for c in found] == [{"task.rows": 115, "general.tokens": g} for g in (0, 30_000)]  # ascending
    assert curves(study, bootstrap, x="mix.repeat", y="nothing") == []
    assert curves(study, bootstrap, x="train.lora_r", y="schema_adherence") == []


def test_a_level_arm_is_one_curve_where_contexts_have_fewer_amounts(tmp_path):
    study = read_results(make_study(tmp_path, points=[*GRID, {"task.rows": 15, "mix.repeat": 8, "general.tokens": 0}]))
    found = curves(study, Bootstrap(study, 100), x="general.tokens", y="schema_adherence")
    assert [(c.rest, c.x) for c in found if c.arm == "base"] == [({}, [0, 30_000])]
    assert [c.x for c in found if c.rest.get("mix.repeat") == 8] == [[0]]


def test_a_key_without_effect_is_left_out_of_a_panel_where_it_has_one_value(tmp_path):
    """Two amounts of repetition without general data, one with: the untuned model is one line in both panels."""
    points = [
        {"task.rows": rows, "mix.repeat": times, "general.tokens": tokens}
        for times, tokens in ((1, 0), (4, 0), (4, 30_000))
        for rows in (15, 115)
    ]
    study = read_results(make_study(tmp_path, points=points))
    for within in ({"general.tokens": 0}, {"general.tokens": 30_000}):
        found = curves(study, Bootstrap(study, 50), x="task.rows", y="answer_loss", within=within)
        rests = {arm: [c.rest for c in found if c.arm == arm] for arm in ("base", "sft", "tell")}
        assert rests["base"] == rests["sft"] == [{}]
        assert all(len(group) == 3 for c in found for group in c.groups)  # one outcome a seed, however many points
        assert [set(rest) for rest in rests["tell"]] == [{"mix.repeat", "general.tokens"}] * len(rests["tell"])


def test_keys_that_only_vary_together_may_be_without_effect_too(tmp_path):
    points = [
        {"task.rows": n, "mix.repeat": k, "general.tokens": g} for k, g in ((1, 0), (4, 30_000)) for n in (15, 115)
    ]
    study = read_results(make_study(tmp_path, points=points))
    found = curves(study, Bootstrap(study, 50), x="task.rows", y="answer_loss")
    assert [(c.arm, c.rest) for c in found if c.arm != "tell"] == [("base", {}), ("sft", {})]
    assert len([c for c in found if c.arm == "tell"]) == 2


def test_keys_that_are_no_numbers_keep_their_order(tmp_path):
    points = [{"anchor.text": text} for text in ("none", "auto", "@a/anchor.txt")]
    study = read_results(make_study(tmp_path, points=points, chance=lambda arm, p, s: 0.5))
    found = curves(study, Bootstrap(study, 100), x="anchor.text", y="schema_adherence", arms=["tell"])
    assert found[0].x == ["none", "auto", "@a/anchor.txt"] and not found[0].numeric


def test_a_line_for_each_group_of_cells(study, bootstrap):
    table = lines(study, bootstrap)
    assert [(line.arm, tuple(line.point.values())) for line in table[:3]] == [
        ("base", (ANY, ANY, ANY)),
        ("sft", ("15", ANY, ANY)),
        ("sft", ("115", ANY, ANY)),
    ]
    assert len(table) == 1 + 2 + 8 and {line.seeds for line in table} == {3}
    tell = table[-1]
    assert list(tell.cells) == ["schema_adherence", "answer_loss", "probe loss", "probe loss change"]
    assert tell.costs["flops"] == 2.5e13 and table[0].costs["flops"] == 0
    rows = list(csv.DictReader(io.StringIO(to_csv(study, table))))
    assert [row["arm"] for row in rows] == [line.arm for line in table]
    assert float(rows[-1]["schema_adherence"]) == tell.cells["schema_adherence"].value
    assert float(rows[-1]["answer_loss low"]) == tell.cells["answer_loss"].ci[0]
    assert rows[-1]["general.tokens"] == "0" and rows[-1]["test rows"] == "60"


def test_tell_against_every_arm_once(study, bootstrap):
    found = gaps(study, bootstrap)
    assert len(found) == 2 * 8 and {gap.arm for gap in found} == {"base", "sft"}
    means = {(line.arm, *line.point.values()): line.cells for line in lines(study, bootstrap)}
    for gap in found:
        tell = means[("tell", *gap.point.values())]["schema_adherence"].value
        other = means[("base", ANY, ANY, ANY) if gap.arm == "base" else ("sft", gap.point["task.rows"], ANY, ANY)]
        assert gap.cells["schema_adherence"].value == pytest.approx(tell - other["schema_adherence"].value, abs=2e-6)
        assert "probe loss" in gap.cells  # by the change, with its narrow interval
        assert np.ptp(gap.cells["probe loss"].ci) < 0.1 < np.ptp(other["probe loss"].ci)


def test_markdown(study, bootstrap):
    text = to_markdown(study, lines(study, bootstrap), gaps(study, bootstrap))
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 and text.startswith("# Made <up>\n")
    for rows in tables:
        assert len({row.count("|") for row in rows}) == 1
    assert "| any | any | any | base |" in text and "2.5 × 10¹³" in text


def test_words():
    assert key_name("general.tokens") == "general tokens" and key_name("train.beta") == "train.beta"
    assert [value_name(v) for v in (30_000, 0.5, None, "@a/b/anchor.txt", "two words / x", ["a", "b"], True)] == [
        *("30,000", "0.5", "not set", "anchor.txt", "two words / x", "a, b", "True")
    ]
    assert value_name("auto", "anchor.text") == "automatic"
    assert point_name({"task.rows": 15, "mix.repeat": 1, "model.name": "x"}) == "15 task rows, once, model: x"
    assert [rounded(v) for v in (24_350, 0.123456, 1_000_000)] == ["24,400", "0.123", "1,000,000"]
