import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell.data.subset import take_rows, take_tokens
from tell.errors import TellError

units = st.lists(st.integers(1, 500), min_size=1, max_size=60).map(np.array)


@settings(max_examples=200)
@given(units, st.floats(0.001, 1), st.integers(0, 2**32 - 1))
def test_tokens_come_within_one_row_on_the_nearer_side(unit, share, seed):
    budget = share * unit.sum()
    taken = take_tokens(unit, budget, seed)
    assert len(set(taken.tolist())) == len(taken) >= 1
    gap = abs(unit[taken].sum() - budget)
    assert gap <= unit.max()
    order = take_rows(len(unit), len(unit), seed)
    sums = np.cumsum(unit[order])
    assert gap == np.abs(sums - budget).min()


@settings(max_examples=100)
@given(units, st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 99))
def test_subsets_of_one_seed_are_nested(unit, a, b, seed):
    small, large = sorted((a * unit.sum(), b * unit.sum()))
    small, large = take_tokens(unit, small, seed).tolist(), take_tokens(unit, large, seed).tolist()
    assert large[: len(small)] == small


def test_rows_are_nested_random_and_seeded():
    assert take_rows(1000, 115, 3)[:15].tolist() == take_rows(1000, 15, 3).tolist()
    assert take_rows(1000, 15, 3).tolist() != take_rows(1000, 15, 4).tolist()
    assert sorted(take_rows(50, 50, 1).tolist()) == list(range(50))
    assert take_rows(1000, 15, 3).max() > 15  # not the first rows


def test_edges():
    assert len(take_tokens(np.array([100, 100]), 1, 0)) == 1
    assert len(take_tokens(np.array([100, 100]), 200, 0)) == 2
    assert len(take_tokens(np.array([100]), 100, 0)) == 1


def test_refusals_say_how_much_exists():
    with pytest.raises(TellError, match="10,000 tokens are requested, but only 300 exist in 2 rows"):
        take_tokens(np.array([100, 200]), 1e4, 0)
    with pytest.raises(TellError, match="12 rows are requested, but only 9 exist"):
        take_rows(9, 12, 0)
    with pytest.raises(TellError, match="a budget of 0 tokens"):
        take_tokens(np.array([1]), 0, 0)
    with pytest.raises(TellError, match="a budget of nan tokens"):
        take_tokens(np.array([1]), float("nan"), 0)
    with pytest.raises(TellError, match="a budget of 0 rows"):
        take_rows(5, 0, 0)
