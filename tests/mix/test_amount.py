import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tell.errors import TellError
from tell.mix.amount import general_rows

units = st.lists(st.integers(0, 300), min_size=1, max_size=50).map(np.array)
seeds = st.integers(0, 2**32)


@given(unit=units, rows=st.integers(0, 300), seed=seeds)
def test_rows_are_exact_and_no_row_repeats_before_all_were_used(unit, rows, seed):
    draw = general_rows(unit, task_tokens=10, rows=rows, seed=seed)
    assert len(draw) == rows and draw.indices.dtype == np.int32
    used = np.bincount(draw.indices, minlength=len(unit))
    assert used.max() - used.min() <= 1
    assert draw.epochs == rows / len(unit)
    for start in range(0, rows - len(unit) + 1, len(unit)):
        assert len(set(draw.indices[start : start + len(unit)])) == len(unit)


@given(unit=units, tokens=st.floats(0, 60_000), seed=seeds)
def test_tokens_come_as_near_as_whole_rows_allow(unit, tokens, seed):
    assume(unit.sum() > 0)
    draw = general_rows(unit, task_tokens=10, tokens=tokens, seed=seed)
    got = unit[draw.indices].sum()
    assert abs(got - tokens) <= unit.max() / 2 + 1e-6
    longer = general_rows(unit, task_tokens=10, rows=len(draw) + 1, seed=seed)
    assert abs(got - tokens) <= abs(unit[longer.indices].sum() - tokens)
    if len(draw):
        assert abs(got - tokens) <= abs(unit[draw.indices[:-1]].sum() - tokens)


@given(unit=units, task=st.integers(1, 500), ratio=st.floats(0.01, 50), seed=seeds)
def test_ratio_is_tokens_per_task_token(unit, task, ratio, seed):
    assume(unit.sum() > 0)
    by_ratio = general_rows(unit, task_tokens=task, ratio=ratio, seed=seed)
    by_tokens = general_rows(unit, task_tokens=1, tokens=ratio * task, seed=seed)
    assert by_ratio.indices.tolist() == by_tokens.indices.tolist()


@given(unit=units, small=st.floats(0, 30_000), more=st.floats(0, 30_000), seed=seeds)
def test_a_larger_amount_extends_a_smaller_one(unit, small, more, seed):
    assume(unit.sum() > 0)
    first = general_rows(unit, task_tokens=10, tokens=small, seed=seed)
    second = general_rows(unit, task_tokens=10, tokens=small + more, seed=seed)
    assert second.indices[: len(first)].tolist() == first.indices.tolist()
    assert len(second) >= len(first)


def test_the_subset_is_random_not_a_prefix():
    draw = general_rows(np.full(1000, 5), task_tokens=10, rows=100, seed=1)
    assert draw.indices.max() > 900 and np.mean(draw.indices) == pytest.approx(500, abs=100)
    assert draw.indices.tolist() != general_rows(np.full(1000, 5), task_tokens=10, rows=100, seed=2).indices.tolist()


def test_exhaustion_is_said_aloud():
    draw = general_rows(np.full(400, 5), task_tokens=10, rows=1500, seed=1)
    assert draw.epochs == 3.75
    assert draw.notices == [
        "general data is exhausted: 1,500 rows are requested and the source has 400, so it is passed 3.75 times, "
        "each time in a new order"
    ]
    assert draw.indices[:400].tolist() != draw.indices[400:800].tolist()
    assert general_rows(np.full(400, 5), task_tokens=10, rows=400, seed=1).notices == []


@pytest.mark.parametrize("way", ["ratio", "tokens", "rows"])
def test_nothing_asked_draws_nothing_even_of_an_empty_source(way):
    for unit in (np.full(4, 5), np.empty(0, dtype=int)):
        draw = general_rows(unit, task_tokens=10, seed=1, **{way: 0})
        assert len(draw) == 0 and draw.epochs == 0 and draw.indices.dtype == np.int32 and draw.notices == []


def test_a_target_below_half_a_row_is_said_aloud():
    draw = general_rows(np.full(4, 100), task_tokens=10, tokens=30, seed=1)
    assert len(draw) == 0 and "less than half of one row" in draw.notices[0]


@pytest.mark.parametrize(
    ("unit", "amount", "message"),
    [
        ([], {"rows": 3}, "general.rows: 3 is requested from an empty general source"),
        ([], {"ratio": 20.0}, "general.ratio: 20 is requested from an empty"),
        ([5], {}, "none of ratio, tokens, rows given"),
        ([5], {"rows": 1, "ratio": 2}, "ratio and rows given"),
        ([5], {"rows": -1}, "general.rows: -1 is not a whole number"),
        ([5], {"rows": 1.5}, "1.5 is not a whole number"),
        ([5], {"tokens": -0.5}, "general.tokens: -0.5 is not 0 or more"),
        ([5], {"tokens": float("inf")}, "inf is not 0 or more"),
        ([5], {"ratio": float("nan")}, "nan is not 0 or more"),
        ([0, 0], {"tokens": 5}, "have no tokens"),
        ([5], {"tokens": 1e15}, "requests 200,000,000,000,000 general rows"),
        ([5], {"rows": 10**12}, "requests 1,000,000,000,000 general rows"),
    ],
)
def test_bad_amounts_are_refused(unit, amount, message):
    with pytest.raises(TellError, match=message):
        general_rows(np.array(unit, dtype=int), task_tokens=10, seed=1, **amount)


def test_a_ratio_to_nothing_is_refused():
    with pytest.raises(TellError, match="ratio 2 to 0 task tokens"):
        general_rows(np.array([5]), task_tokens=0, ratio=2, seed=1)


@pytest.mark.parametrize("amount", [{"rows": 10**9}, {"tokens": 1e300}, {"ratio": 1.7e308}, {"tokens": 1e12}])
def test_more_rows_than_can_be_mixed_are_refused(amount):
    with pytest.raises(TellError, match="at most 10,000,000 rows"):
        general_rows(np.array([5, 7]), task_tokens=1000, seed=1, **amount)
