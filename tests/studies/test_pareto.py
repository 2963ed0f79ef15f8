"""Fronts of gain against cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.made import make_study, outcome, study_of
from tell.studies.measured import Number
from tell.studies.results import as_change, read_results
from tell.studies.stats.pareto import front, undominated, verdict
from tell.studies.stats.seed_means import Bootstrap

small = st.integers(0, 4)


@given(st.lists(st.tuples(small, small), min_size=1, max_size=12))
def test_the_front_is_what_nobody_beats(points):
    expected = [not any(a >= x and b >= y and (a > x or b > y) for a, b in points) for x, y in points]
    assert undominated(np.array([points], dtype=float))[0].tolist() == expected


def made(share: float, loss: float, arm: str, k: int):
    right = (np.arange(100) < 100 * share).astype(float)
    change = {"probe loss": Number(1.7 + loss, 0.2), "probe loss change": Number(loss, 0.02)}
    return outcome(right, arm=arm, point={"mix.repeat": k}, **change)


def test_points_with_gain_cost_and_how_sure():
    cells = [
        made(0.9, 0.0, "tell", 8),
        made(0.5, 0.3, "sft", 8),
        made(0.3, -0.2, "general", 8),
        made(0.88, 0.01, "tell", 4),
    ]
    study = study_of(cells)
    cost = as_change(study, "probe")
    assert cost == "probe loss change"
    found = front(study, Bootstrap(study, 500), gain="m", cost=cost)
    order = [("tell", 8), ("tell", 4), ("sft", 8), ("general", 8)]
    assert [(e["arm"], e["point"]) for e in found] == [(arm, {"mix.repeat": k}) for arm, k in order]
    on = {e["name"]: (e["on_front"], e["front_share"]) for e in found}
    assert on["SFT, one epoch, 8 times"] == (False, 0.0)
    assert on["general data alone, 8 times"] == (True, 1.0)
    assert on["TELL, 8 times"][0] and not on["TELL, 4 times"][0] and 0.2 < on["TELL, 4 times"][1] < 0.8
    assert found[0]["cost"]["value"] == 0.0  # the change from the untuned model, not the level
    assert verdict(found).startswith("2 of 4 are on the front (1 of general data alone, 1 of TELL)")


def test_task_rows_alone_are_sft_and_are_counted_so():
    alone, mixed = ({"general.tokens": n, "mix.repeat": 4} for n in (0, 30_000))
    right = np.ones(100)
    cells = [
        outcome(right, arm="tell", point=alone, alone=True, **{"probe loss": Number(2.0, 0.1)}),
        outcome(right, arm="tell", point=mixed, **{"probe loss": Number(2.0, 0.1)}),
    ]
    study = study_of(cells)
    found = front(study, Bootstrap(study, 100), gain="m", cost="probe loss")
    assert {e["name"] for e in found} == {"SFT, 4 times", "TELL, 30,000 general tokens, 4 times"}
    assert "1 of TELL" in verdict(found) and "1 of SFT" in verdict(found)


def test_a_loss_is_gained_by_falling():
    cells = [
        outcome([1], arm=a, point={"k": k}, **{"low loss": Number(v, 0), "probe loss": Number(c, 0)})
        for a, k, v, c in (("tell", 1, 1.0, 1.0), ("sft", 1, 2.0, 2.0))
    ]
    study = study_of(cells)
    found = front(study, Bootstrap(study, 100), gain="low loss", cost="probe loss")
    assert [(e["arm"], e["on_front"]) for e in found] == [("tell", True), ("sft", False)]


def test_of_a_study(tmp_path):
    points = [{"task.rows": n, "mix.repeat": k} for n in (15, 115) for k in (1, 4)]
    folder = make_study(
        tmp_path,
        points=points,
        chance=lambda arm, p, s: 0.1 * p["mix.repeat"],
        loss=lambda arm, p: 1.7 + 0.1 * (arm == "sft"),
    )
    study = read_results(folder)
    found = front(study, Bootstrap(study, 200), gain="schema_adherence", cost="probe loss", within={"task.rows": 15})
    assert len(found) == 4  # base and sft once, tell at two repetitions
    assert {e["name"] for e in found} == {"untuned", "SFT, one epoch", "TELL, once", "TELL, 4 times"}
    assert front(study, Bootstrap(study, 100), gain="nothing", cost="probe loss") == []
    assert verdict([]) == ""
    assert found[0]["gain"]["value"] == pytest.approx(max(e["gain"]["value"] for e in found))
