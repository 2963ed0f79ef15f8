import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell.mix.amount import drawing_order, general_rows
from tell.mix.nearest import CHUNK, cosine_similarity, nearest_order


def test_task_rows_take_turns():
    """Both task rows want row 2 first; the second gets its next, and so on round by round."""
    similarity = np.array([[0.1, 0.5, 0.9, 0.2], [0.3, 0.4, 0.8, 0.6]])
    assert nearest_order(similarity).tolist() == [2, 3, 1, 0]


def test_one_task_row_is_a_plain_ranking():
    similarity = np.random.default_rng(0).normal(size=(1, 30))
    assert nearest_order(similarity).tolist() == np.argsort(-similarity[0]).tolist()


@given(n=st.integers(1, 6), m=st.integers(0, 25), seed=st.integers(0, 100))
def test_every_row_once_and_each_round_the_nearest_left(n, m, seed):
    similarity = np.random.default_rng(seed).normal(size=(n, m))
    order = nearest_order(similarity)
    assert sorted(order) == list(range(m))
    for k in range(m):
        assert similarity[k % n, order[k]] == similarity[k % n, order[k:]].max()


def test_no_dimension_outweighs_the_others():
    """One dimension a thousand times as large as the others, and one alike in all rows: neither decides."""
    rng = np.random.default_rng(1)
    general = rng.normal(size=(CHUNK + 40, 12)).astype(np.float32)
    task = general[[7, CHUNK + 3]] + 0.01
    scale, shift = np.ones(12), np.zeros(12)
    scale[3], shift[3], scale[5], shift[5] = 1000, 5e4, 0, 9
    similarity = cosine_similarity((task * scale + shift).astype("f4"), (general * scale + shift).astype("f4"))
    assert similarity.shape == (2, CHUNK + 40) and similarity.dtype == np.float32
    assert similarity.argmax(axis=1).tolist() == [7, CHUNK + 3]
    np.testing.assert_allclose(similarity.max(axis=1), 1, atol=0.01)
    both = np.concatenate([task, general]).astype(np.float64)
    z = np.delete((both - both.mean(0)) / both.std(0), 5, axis=1)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(similarity, z[:2] @ z[2:].T, atol=2e-3)


@pytest.mark.parametrize("amount", [{"rows": 12}, {"tokens": 300.0}, {"ratio": 30.0}])
def test_an_order_decides_which_rows_and_the_seed_where_they_are(amount):
    rng = np.random.default_rng(2)
    unit, order = rng.integers(5, 60, 40), rng.permutation(40)
    draw = general_rows(unit, task_tokens=10, seed=3, order=order, **amount)
    assert 0 < len(draw) < 40
    assert sorted(draw.indices) == sorted(order[: len(draw)])
    places = drawing_order(40, 3).tolist()
    assert [places.index(i) for i in draw.indices] == sorted(places.index(i) for i in draw.indices)
    if "rows" not in amount:
        target, reached = 300, np.cumsum(unit[order])
        assert abs(reached[len(draw) - 1] - target) == np.abs(reached - target).min()


@pytest.mark.parametrize("rows", [40, 41, 95])
def test_an_order_changes_nothing_where_all_rows_are_drawn(rows):
    unit, order = np.full(40, 7), np.random.default_rng(4).permutation(40)
    plain = general_rows(unit, task_tokens=10, seed=3, rows=rows)
    assert general_rows(unit, task_tokens=10, seed=3, rows=rows, order=order).indices.tolist() == plain.indices.tolist()


def test_nothing_is_drawn_by_an_order():
    assert len(general_rows(np.full(9, 7), task_tokens=10, seed=3, rows=0, order=np.arange(9))) == 0
