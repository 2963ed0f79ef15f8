"""Shapes of curves: what is found in curves of known shape, and what is not claimed."""

from __future__ import annotations

import numpy as np
import pytest

from tell.studies.stats.curve_fit import SHAPES, Fits, fit_curve, held_out, profile
from tell.studies.stats.curves import Curve
from tell.studies.stats.seed_means import Draws

X = np.geomspace(1e4, 1e7, 8)
FREE = (-np.inf, np.inf)


def made(y, x=X, error: float = 0.01, samples: int = 400) -> Curve:
    """A curve whose resamples scatter around it."""
    rng = np.random.default_rng(0)
    draws = [
        Draws(float(v), v + rng.normal(0, error, samples), {s: float(v) for s in (1, 2, 3)}, 100, False) for v in y
    ]
    return Curve("tell", {}, list(x), draws, [[] for _ in x], False)


def logistic(x, floor=0.05, ceiling=0.9, slope=5.0, middle=5.5) -> np.ndarray:
    return floor + (ceiling - floor) / (1 + np.exp(-slope * (np.log10(x) - middle)))


def fitted(y, metric: str = "schema_adherence", **more) -> Fits:
    return fit_curve(made(y, **more), metric)


def test_an_s_curve_is_found_and_measured():
    found = fitted(logistic(X))
    facts = found.facts
    assert facts["verdict"].startswith(
        "S-curve favoured over straight line in log amount, power law and constant by held-out error (8 amounts above"
    )
    for name, truth in {"floor": 0.05, "ceiling": 0.9, "slope": 5.0, "middle": 10**5.5, "threshold": 10**5.1}.items():
        number = facts["logistic"][name]
        assert number["value"] == pytest.approx(truth, rel=0.02), name
        assert number["ci"][0] <= truth * 1.02 and number["ci"][1] >= truth * 0.98, name
    assert facts["held_out_error"]["logistic"]["value"] < 0.02 < facts["held_out_error"]["line"]["value"]
    np.testing.assert_allclose(found.mark.y[[0, -1]], logistic(X)[[0, -1]], atol=0.01)
    assert found.mark.threshold[0] == facts["logistic"]["threshold"]["value"]


def test_the_threshold_is_where_the_steepest_tangent_leaves_the_floor():
    facts = fitted(logistic(X)).facts["logistic"]
    u = np.linspace(3, 8, 20_001)
    y = logistic(10**u)
    at = np.gradient(y, u).argmax()
    tangent = u[at] - (y[at] - 0.05) / np.gradient(y, u)[at]
    assert np.log10(facts["threshold"]["value"]) == pytest.approx(tangent, abs=0.01)


def test_a_falling_loss_is_an_s_curve_too():
    facts = fitted(logistic(X, floor=2.4, ceiling=1.1), "answer_loss").facts
    assert "S-curve favoured over straight line" in facts["verdict"]
    assert facts["logistic"]["floor"]["value"] == pytest.approx(2.4, abs=0.03)
    assert facts["logistic"]["ceiling"]["value"] == pytest.approx(1.1, abs=0.03)


def test_a_score_that_falls_takes_off_nowhere():
    found = fitted(logistic(X)[::-1])
    assert found.facts["logistic"]["ceiling"]["value"] < found.facts["logistic"]["floor"]["value"]
    assert "It gets worse from" in found.facts["verdict"] and "takes off" not in found.facts["verdict"]
    assert found.mark is not None and found.mark.threshold is None
    assert "It gets worse from" in fitted(logistic(X, floor=1.1, ceiling=2.4), "answer_loss").facts["verdict"]


@pytest.mark.parametrize(
    ("y", "best"),
    [(0.1 + 0.2 * (np.log10(X) - 4), "line"), (0.9 - 0.6 * (X / X[0]) ** -0.8, "power law"), (0 * X + 0.4, "constant")],
)
def test_other_shapes_are_not_called_s_curves(y, best):
    facts = fitted(y).facts
    errors = {name: e["value"] for name, e in facts["held_out_error"].items()}
    assert errors[best] <= min(errors.values()) + 1e-6
    name = {"line": "straight line in log amount", "power law": "power law", "constant": "constant"}[best]
    favoured = facts["verdict"].split(" by held-out error")[0] if "favoured" in facts["verdict"] else ""
    assert name not in favoured.removeprefix("S-curve favoured over") or not favoured.startswith("S-curve")


def test_a_level_curve_takes_off_nowhere():
    found = fitted(0 * X + 0.4)
    assert found.mark is None and "takes off" not in found.facts["verdict"]
    assert "not distinguishable" in found.facts["verdict"]


def test_noise_leaves_shapes_open():
    y = logistic(X, 0.3, 0.5)
    assert "S-curve favoured" in fitted(y).facts["verdict"]
    verdict = fitted(y, error=0.15).facts["verdict"]
    assert "straight line in log amount" in verdict.split("not distinguishable")[0] and "not distinguishable" in verdict


def test_zero_is_left_out_and_said_so():
    x = [0, *X]
    with_zero = fitted([0.0, *logistic(X)], x=x).facts
    assert with_zero["left_out"] == [0] and with_zero["amounts"] == list(X)
    assert "0 itself has no logarithm and is left out" in with_zero["verdict"]
    assert with_zero["logistic"]["threshold"]["value"] == pytest.approx(10**5.1, rel=0.02)
    assert [p["x"] for p in with_zero["points"]] == x


def test_few_amounts_are_said_to_be_few():
    four = fitted(logistic(X[:4]), x=X[:4])
    assert four.facts["verdict"].startswith("Too few amounts to tell an S-curve from simpler shapes")
    assert set(four.facts["held_out_error"]) == {"line", "power law", "constant"} and four.mark is None
    three = fitted(logistic(X[:3]), x=X[:3]).facts
    assert three["verdict"].startswith("3 amounts above 0 are too few") and "held_out_error" not in three
    assert "logistic" in fitted(logistic(X[:5]), x=X[:5]).facts["held_out_error"]


def test_shares_hold_floor_and_ceiling():
    """A rise that has not ended yet: its ceiling stays a share."""
    y = logistic(X, 0, 1.8, 3, 7)
    assert fitted(y).facts["logistic"]["ceiling"]["value"] <= 1
    assert fitted(y, "answer_loss").facts["logistic"]["ceiling"]["value"] > 1.5


def test_least_squares_and_held_out_errors():
    rng = np.random.default_rng(1)
    u, y = np.log10(X), rng.normal(size=(3, len(X)))
    _, numbers = profile(SHAPES["line"], u, y, FREE)
    slope, intercept = np.polyfit(u, y.T, 1)
    np.testing.assert_allclose(numbers, np.stack([intercept, slope], axis=1), rtol=1e-6)
    rest = [np.delete(y, i, axis=1).mean(axis=1) - y[:, i] for i in range(len(X))]
    np.testing.assert_allclose(held_out(SHAPES["constant"], u, y, FREE), np.sqrt(np.mean(np.square(rest), axis=0)))
    for name in ("logistic", "power law"):  # what has the shape is predicted where it was left out
        curve = logistic(X)[None] if name == "logistic" else (0.9 - 0.6 * (X / X[0]) ** -0.8)[None]
        assert held_out(SHAPES[name], u, curve, FREE)[0] < 0.02
