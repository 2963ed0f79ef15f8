"""Points and arms with different seeds: only what has the same seeds is compared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from studies.made import make_study
from tell.studies.page.study_page import notices
from tell.studies.results import Study, read_results
from tell.studies.stats.analyses import analyse
from tell.studies.stats.comparable_seeds import compared_seeds, seed_sets, seeds_name, with_seeds
from tell.studies.stats.curves import curves
from tell.studies.stats.results_table import lines
from tell.studies.stats.seed_means import Bootstrap

X, Y = "general.tokens", "schema_adherence"
LARGEST = 1_000_000
RECIPE = {"fits": [{"x": X, "y": Y}], "pareto": [{"gain": Y, "cost": "probe loss"}]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Study:
    folder = make_study(
        tmp_path_factory.mktemp("made"), recipe=RECIPE, loss=lambda arm, point: 1.7 - point[X] / 1e7 * (arm == "tell")
    )
    return read_results(folder)


@pytest.fixture(scope="module")
def study(whole) -> Study:
    """The largest amount has one of three seeds."""
    return replace(whole, outcomes=[o for o in whole.outcomes if o.point[X] < LARGEST or o.seed == 42])


def without(study: Study) -> Study:
    return replace(study, outcomes=[o for o in study.outcomes if o.point[X] < LARGEST])


def test_sets(study, whole):
    assert seed_sets(whole) == [(42, 43, 44)] and seed_sets(study) == [(42, 43, 44), (42,)]
    assert with_seeds(study, (42, 43, 44)).outcomes == without(study).outcomes
    assert {o.seed for o in with_seeds(study, (42,)).outcomes} == {42}
    assert len(with_seeds(study, (42,)).outcomes) == len(study.outcomes) - 2 * len(without(study).outcomes) / 3
    assert (seeds_name((42,)), seeds_name((42, 43))) == ("seed 42 alone", "seeds 42, 43")


def test_one_entry_for_all_seeds_and_one_for_all_points(study):
    found = analyse(study, Bootstrap(study, 300))
    assert [(f["compared"], f["amounts"][-1], f["seeds"]) for f in found.entries["fits"]] == [
        ("seeds 42, 43, 44", 300_000, 3),
        ("seed 42 alone", LARGEST, 1),
    ]
    assert [(e["compared"], len(e["points"])) for e in found.entries["pareto"]] == [
        ("seeds 42, 43, 44", 2 + 5),
        ("seed 42 alone", 2 + 6),
    ]
    assert found.entries["pareto"][1]["heading"] == "seed 42 alone"


def test_the_points_with_all_seeds_are_judged_as_if_there_were_no_others(study):
    """No resample is lost to a seed that another point lacks."""
    three = analyse(study, Bootstrap(study, 300))
    alone = analyse(without(study), Bootstrap(without(study), 300))
    assert [{**three.entries["fits"][0], "compared": ""}] == alone.entries["fits"]
    assert three.entries["pareto"][0]["points"] == alone.entries["pareto"][0]["points"]


def test_with_equal_seeds_nothing_is_said(whole):
    found = analyse(whole, Bootstrap(whole, 100))
    assert [entry["compared"] for entry in (*found.entries["fits"], *found.entries["pareto"])] == ["", ""]
    assert not any("different seeds" in text for text in notices(whole))


def test_an_arm_stands_once_in_table_and_figure(study, whole):
    def table(study: Study) -> list[tuple]:
        return [(line.arm, line.point[X], line.seeds) for line in lines(study, Bootstrap(study, 50))]

    one = [(arm, x, 1 if (arm, x) == ("tell", "1,000,000") else seeds) for arm, x, seeds in table(whole)]
    assert table(study) == one
    drawn = {c.arm: c for c in curves(study, Bootstrap(study, 50), x=X, y=Y)}
    assert len(drawn) == 3 and drawn["base"].flat and drawn["base"].rest == {} and len(drawn["base"].x) == 6
    assert {len(group) for group in drawn["base"].groups} == {3} and not drawn["tell"].flat


def test_cells_of_unlike_machines_are_named(tmp_path, whole):
    assert whole.machines == {"cpu bf16": 54} and not any("number formats" in text for text in notices(whole))
    mixed = read_results(make_study(tmp_path, seeds=(0, 1)))
    assert "18 in cpu fp32, 18 in cpu bf16" in " ".join(notices(mixed))


def test_the_page_says_so(study):
    text = " ".join(notices(study))
    assert "different seeds (seeds 42, 43, 44; seed 42 alone)" in text


def test_what_all_share_is_compared_too(whole):
    """Each of two amounts lacks another seed: over the third alone every amount has its place."""
    amounts = [o for o in whole.outcomes if o.arm == "tell"]
    lacks = {(LARGEST, 42), (300_000, 43)}
    study = replace(whole, outcomes=[o for o in amounts if (o.point[X], o.seed) not in lacks])
    assert seed_sets(study) == [(42, 43, 44), (42, 44), (43, 44)]
    assert compared_seeds(study) == [(42, 43, 44), (42, 44), (43, 44), (44,)]
    assert compared_seeds(whole) == seed_sets(whole)
    found = analyse(study, Bootstrap(study, 200))
    assert [(f["compared"], f["amounts"][-1], len(f["amounts"])) for f in found.entries["fits"]][-1] == (
        "seed 44 alone",
        LARGEST,
        5,
    )
