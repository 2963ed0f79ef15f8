"""Amounts for the same score, and their factors."""

from __future__ import annotations

import numpy as np
import pytest

from tell.studies.stats.curves import Curve
from tell.studies.stats.efficiency import efficiency
from tell.studies.stats.seed_means import Draws

X = [15, 40, 115, 320, 883]

LEVEL = [0.3] * 5


def made(arm: str, y, x=X, error: float = 0.01, flat: bool = False) -> Curve:
    rng = np.random.default_rng(len(arm))
    draws = [Draws(float(v), v + rng.normal(0, error, 400), {1: float(v)}, 100, False) for v in y]
    return Curve(arm, {}, list(x), draws, [[] for _ in x], flat)


def line(x, factor: float = 1.0) -> np.ndarray:
    """A straight line in log x that reaches each score with ``factor`` times the amount."""
    return 0.1 + 0.4 * np.log10(np.asarray(x) / 15 / factor)


def compare(*curves: Curve, y: str = "schema_adherence", reference: str = "tell"):
    return efficiency(curves, x="task.rows", y=y, reference=reference)


def test_a_factor_is_found():
    found = compare(made("sft", line(X, 4)), made("tell", line(X)))
    assert found["levels"] == [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    needs = found["arms"]["tell"]["amounts"]
    np.testing.assert_allclose(needs, 15 * 10 ** ((np.array(found["levels"]) - 0.1) / 0.4), rtol=1e-3)
    reached = [e for e in found["factors"]["sft"]["by_level"] if e["factor"]]
    assert len(reached) == 4  # 0.57 at most with four times the rows
    for e in [*reached, found["factors"]["sft"]["mean"]]:
        assert e["factor"] == pytest.approx(4, rel=0.01) and e["ci"][0] <= 4 <= e["ci"][1]
    assert (
        "SFT, one epoch needs 4 times the task rows that TELL needs for the same schema adherence" in found["verdict"]
    )
    assert (
        "mean over scores from 20.0" in found["verdict"]
        and "not significantly different from 1" not in found["verdict"]
    )


def test_not_reached_is_a_result():
    found = compare(made("sft", line(X, 4)), made("tell", line(X)))
    assert found["arms"]["sft"]["amounts"][-1] is None and found["arms"]["sft"]["not_reached"][-1] == 1.0
    assert found["factors"]["sft"]["by_level"][-1] == {"score": 0.8, "factor": None, "ci": [None, None]}
    assert "SFT, one epoch does not reach 60.0\u202f% with 883 task rows; TELL does at about 267" in found["verdict"]


def test_an_interval_may_end_in_not_reached():
    """A score near the rival's best: in some resamples it is reached, in others not."""
    found = compare(made("sft", line(X, 4), error=0.08), made("tell", line(X)))
    at = next(i for i, e in enumerate(found["factors"]["sft"]["by_level"]) if e["score"] == 0.5)
    share = found["arms"]["sft"]["not_reached"][at]
    entry = found["factors"]["sft"]["by_level"][at]
    assert 0.1 < share < 0.9 and entry["factor"] and entry["ci"][0] is not None and entry["ci"][1] is None


def test_equal_arms_are_not_unique_labels():
    found = compare(made("sft-matched", line(X), error=0.03), made("tell", line(X), error=0.03))
    low, high = found["factors"]["sft-matched"]["mean"]["ci"]
    assert low < 1 < high and "not significantly different from 1" in found["verdict"]


def test_an_arm_that_needs_less_has_a_factor_below_one():
    found = compare(made("sft-matched", line(X, 0.5)), made("tell", line(X)))
    assert found["factors"]["sft-matched"]["mean"]["factor"] == pytest.approx(0.5, rel=0.02)
    assert found["factors"]["sft-matched"]["mean"]["ci"][1] < 1


def test_losses_fall():
    found = compare(made("sft", 3 - line(X, 4)), made("tell", 3 - line(X)), y="answer_loss")
    assert found["factors"]["sft"]["mean"]["factor"] == pytest.approx(4, rel=0.01)
    assert all(2.1 < level < 2.9 for level in found["levels"])


def test_a_dip_is_smoothed_not_reached_twice():
    dip = np.array([0.1, 0.5, 0.3, 0.6, 0.9])
    found = compare(made("sft", line(X)), made("tell", dip, error=0.0))
    needs = dict(zip(found["levels"], found["arms"]["tell"]["amounts"], strict=True))
    assert needs[0.3] < 40 < needs[0.5]  # 0.5 and 0.3 pool to 0.4


def test_nothing_to_compare():
    assert compare(made("tell", line(X))) is None
    assert compare(made("sft", line(X))) is None
    assert compare(made("tell", line(X)), made("sft", LEVEL, flat=True)) is None
    level = compare(made("sft", LEVEL, error=0.0), made("tell", LEVEL, error=0.0))
    assert level["levels"] == [] and level["verdict"].startswith("No score of schema adherence")
