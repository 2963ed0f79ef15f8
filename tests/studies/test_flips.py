"""Which rows turn right where, and whether they stay."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.made import curve_of
from tell.studies.stats.flips import flips, flips_back, turning

X = [0, 10_000, 30_000, 100_000, 300_000]


def quanta(seed: int, rows: int = 60, spread: int = 0) -> np.ndarray:
    """Each row turns at its own amount and stays; ``spread`` moves the amounts from seed to seed."""
    at = np.random.default_rng(0).integers(0, len(X) + 1, rows)
    at = np.clip(at + np.random.default_rng(seed).integers(-spread, spread + 1, rows), 0, len(X))
    return np.arange(len(X))[None] >= at[:, None]


def chance(seed: int, rows: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(rows, len(X))) < np.linspace(0.1, 0.9, len(X))


def found(tables, rows: str = ""):
    return flips(curve_of(tables, X, rows=rows), "m", "general.tokens")


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=20))
def test_turning_is_the_first_amount_of_the_last_right_run(table):
    right = np.array(table)
    expected = [next((i for i in range(4) if all(row[i:])), 4) for row in table]
    assert turning(right).tolist() == expected
    assert flips_back(right) == sum(a and not b for row in table for a, b in pairwise(row))


def test_rows_that_turn_for_good():
    tables = {s: quanta(s) for s in (1, 2, 3)}
    result = found(tables)
    at = turning(tables[1])
    assert result["share"] == pytest.approx([(at == i).mean() for i in range(5)], abs=1e-6)
    assert result["never"] == pytest.approx((at == 5).mean(), abs=1e-6)
    assert result["back"]["value"] == 0 < result["back"]["by_chance"]["value"] and result["back"]["p"] < 0.01
    assert sum(result["seeds"]["1"]["turn_at"].values()) + result["seeds"]["1"]["never"] == 60
    assert "tend to stay right (0.0 flips back a seed" in result["verdict"]
    turns = result["rows"]["2"]
    assert len(turns) == 60 and set(turns.values()) <= {*X, None}
    assert result["agreement"] is None  # every seed has its own test rows


def test_few_rows_that_turn_tell_nothing_against_quanta():
    """Perfect quanta, 20 rows, three amounts: where no flip at all could have happened by chance, none is no sign."""
    rng, x, said = np.random.default_rng(1), [0, 30_000, 100_000], []
    for _ in range(30):
        at = rng.choice([1, 2, *[3] * 8], 20)
        table = np.arange(3)[None] >= at[:, None]
        result = flips(curve_of({42: table}, x, samples=50), "m", "general.tokens")
        if result is not None and not table[:, 1].all():
            said.append(result["verdict"])
            assert ("Too few rows" in said[-1]) == (result["back"]["p_at_none"] >= 0.025)
    assert len(said) > 20 and not any("speaks against" in each for each in said)


def test_where_rows_turn_stands_beside_what_shuffling_gives():
    """A level curve of rows right at random: many are wrong before the last amount and right there."""
    table = np.random.default_rng(0).uniform(size=(1000, len(X))) < 0.4
    result = found({42: table})
    assert result["share"][-1] > 0.15
    assert result["share_by_chance"] == pytest.approx(result["share"], abs=0.04)
    assert result["entropy_by_chance"] == pytest.approx(result["entropy"], abs=0.1)
    assert "after which nothing was measured" in result["verdict"]
    assert result["verdict"].count("if rows were shuffled") == 2


def test_rows_that_are_right_by_chance():
    result = found({s: chance(s) for s in (1, 2, 3)})
    assert result["back"]["p"] > 0.025 and "speaks against quanta" in result["verdict"]
    low, high = result["back"]["by_chance"]["ci"]
    assert low <= result["back"]["value"] <= high


def test_seeds_agree_where_rows_have_amounts_of_their_own():
    same = found({s: quanta(s) for s in (1, 2)}, rows="same")["agreement"]
    assert same["value"] == 1.0 and same["p"] < 0.01
    near = found({s: quanta(s, spread=1) for s in (1, 2)}, rows="same")["agreement"]
    assert near["by_chance"]["value"] < near["value"] < 1
    result = found({s: chance(s) for s in (1, 2)}, rows="same")
    assert result["agreement"]["p"] > 0.025 and "no more often than by chance" in result["verdict"]


def test_rows_that_never_turn_are_no_agreement():
    """Nor are rows that are right from the start: only when the others turn may tell of amounts of their own."""

    def table(seed: int) -> np.ndarray:
        at = np.full(200, len(X))
        at[:60] = np.random.default_rng(seed).integers(1, len(X), 60)
        at[180:] = 0
        return np.arange(len(X))[None] >= at[:, None]

    result = found({s: table(s) for s in (1, 2)}, rows="same")
    assert result["agreement"]["p"] > 0.025 and result["agreement"]["value"] == pytest.approx(0.25, abs=0.12)
    ten, nine = (found({s: table(s)[i:] for s in (1, 2)}, rows="same")["agreement"] for i in (50, 51))
    assert ten is not None and nine is None  # of rows that turn; the others are as many as before


def test_how_close_together_rows_turn():
    """All at one amount: no entropy; equally many in equal steps of the logarithm: as a line."""
    at_once = np.tile(np.array(X) >= 100_000, (40, 1))
    assert found({1: at_once})["entropy"] == 0
    result = found({1: np.repeat(np.eye(5, dtype=bool).cumsum(axis=1) > 0, 8, axis=0)})
    assert result["entropy"] == pytest.approx(np.log2(3), abs=1e-3)
    assert result["even_entropy"] == pytest.approx(np.log2(3), abs=1e-2)  # 1e4, 3e4, 1e5, 3e5: nearly equal steps


def test_nothing_turns():
    result = found({1: np.zeros((30, 5), dtype=bool)})
    assert result["verdict"].startswith("No test row turns right") and "Too few rows change" in result["verdict"]


def test_what_has_no_flips():
    graded = curve_of({1: np.full((10, 5), 0.5)}, X)
    graded.draws[0] = type(graded.draws[0])(0.5, graded.draws[0].draws, {1: 0.5}, 10, False)
    assert flips(graded, "m", "general.tokens") is None
    short = curve_of({1: chance(1)[:, :2]}, X[:2])
    assert flips(short, "m", "general.tokens") is None
