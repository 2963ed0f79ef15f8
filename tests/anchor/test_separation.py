"""Numbers of separation against their definitions, and on groups that are equal or apart by construction."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tell.anchor.separation import _without_each, jackknife_error, length_hits, separate_states, tsne
from tell.errors import TellError


def clouds(n, width, shift, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n, width))
    return (a + shift).astype(np.float32), b.astype(np.float32)


def test_groups_apart():
    found = separate_states(*clouds(30, 40, 3.0), seed=1, permutations=200)
    assert found.hits.shape == found.silhouettes.shape == (60,)
    assert found.hits.mean() == 1 and found.silhouettes.min() > 0.3
    assert found.mmd2_ci[0] > 0.3 and found.p == pytest.approx(1 / 201)


def test_equal_groups():
    """The probe is at chance and the permutation test keeps its level: p <= 0.05 in 5 % of the draws."""
    found = [separate_states(*clouds(15, 6, 0.0, seed=s), seed=s, permutations=99) for s in range(40)]
    assert 0.45 < np.mean([f.hits.mean() for f in found]) < 0.55
    assert abs(np.mean([f.mmd2 for f in found])) < 0.01
    assert abs(np.mean([f.silhouettes.mean() for f in found])) < 0.02
    ps = np.array([f.p for f in found])
    assert (ps <= 0.05).sum() <= 6 and 0.35 < ps.mean() < 0.65


def test_mmd_by_its_definition():
    a, b = clouds(7, 5, 0.8)
    found = separate_states(a, b, seed=0, permutations=10)
    both = np.concatenate([a, b]).astype(float)
    both = (both - both.mean(0)) / both.std(0)
    gaps = np.linalg.norm(both[:, None] - both[None], axis=-1)
    kernel = np.exp(-(gaps**2) / (2 * np.median(gaps[np.triu_indices(14, 1)]) ** 2))

    def mmd2(xs, ys):
        own = [np.mean([kernel[i, j] for i in rows for j in rows if i != j]) for rows in (xs, ys)]
        return sum(own) - 2 * np.mean([kernel[i, j] for i in xs for j in ys])

    xs, ys = list(range(7)), list(range(7, 14))
    assert found.mmd2 == pytest.approx(mmd2(xs, ys), abs=1e-6)
    spread = 0.0
    for left_out in (xs, ys):
        values = [mmd2([i for i in xs if i != k], [i for i in ys if i != k]) for k in left_out]
        spread += 6 / 7 * np.sum((np.array(values) - np.mean(values)) ** 2)
    low, high = found.mmd2_ci
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(spread), abs=1e-6)


def test_scale_of_a_dimension_does_not_count():
    """Transformers have dimensions hundreds of times larger than the rest; they must not hide the others."""
    a, b = clouds(12, 30, 1.0)
    scales = np.ones(30)
    scales[3], scales[7] = 1e4, 1e-3
    plain, scaled = (separate_states(x, y, seed=2, permutations=50) for x, y in ((a, b), (a * scales, b * scales)))
    assert scaled.hits.tolist() == plain.hits.tolist()
    assert scaled.silhouettes == pytest.approx(plain.silhouettes, abs=1e-4)
    assert scaled.mmd2 == pytest.approx(plain.mmd2, abs=1e-5) and scaled.p == plain.p


def test_more_dimensions_than_rows_are_no_leak():
    found = separate_states(*clouds(50, 600, 0.0), seed=3, permutations=99)
    assert 0.3 < found.hits.mean() < 0.7 and found.p > 0.05


def test_states_that_are_all_one_point():
    """The embedding of the template's last token."""
    point = np.full((10, 8), 3.3, dtype=np.float32)
    found = separate_states(point, point, seed=0, permutations=20)
    assert (found.hits.mean(), found.mmd2, found.p) == (0.5, 0.0, 1.0) and not found.silhouettes.any()


def test_length_alone():
    rng = np.random.default_rng(0)
    short, long = rng.integers(20, 60, 40), rng.integers(400, 700, 40)
    assert length_hits(short, long, seed=0).mean() == 1
    assert 0.3 < length_hits(short, rng.permutation(short), seed=0).mean() < 0.7
    outside = np.concatenate([rng.integers(10, 20, 20), rng.integers(500, 900, 20)])
    assert length_hits(rng.integers(80, 120, 40), outside, seed=0).mean() > 0.9  # in the middle of the others


def test_picture_places_repeat():
    a, b = clouds(8, 20, 4.0)
    places = tsne(a, b, seed=5)
    assert places.shape == (16, 2) and np.isfinite(places).all() and (tsne(a, b, seed=5) == places).all()


@pytest.mark.parametrize(("left", "right"), [(4, 4), (6, 7)])
def test_too_few_or_unequal(left, right):
    with pytest.raises(TellError, match=f"{left} rows against {right}"):
        separate_states(np.zeros((left, 3)), np.ones((right, 3)), seed=0)


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(TellError, match=r'pip install "tell-llm\[study\]"'):
        separate_states(*clouds(6, 3, 0.0), seed=0)


def test_silhouettes_with_each_row_left_out():
    """By scikit-learn, on the rows that are left."""
    from sklearn.metrics import silhouette_samples
    from sklearn.metrics.pairwise import euclidean_distances

    n, rng = 7, np.random.default_rng(3)
    states = np.concatenate([rng.normal(0.7, 1, (n, 4)), rng.normal(0, 1, (n, 4))])
    distances, group = euclidean_distances(states), np.repeat([1, 0], n)
    for k, mean in enumerate(_without_each(distances, group)):
        kept = np.arange(2 * n) != k
        left = silhouette_samples(distances[np.ix_(kept, kept)], group[kept], metric="precomputed")
        assert mean == pytest.approx(left.mean(), abs=1e-12)


def test_the_silhouettes_interval_holds_what_it_should():
    """The mean over many draws, in about 95 of 100 of them; rows taken as independent would hold it in some 75."""
    rng = np.random.default_rng(5)
    drawn = [
        separate_states(rng.normal(0.6, 1, (30, 3)), rng.normal(0, 1, (30, 3)), seed=0, permutations=1)
        for _ in range(150)
    ]
    values = np.array([d.silhouettes.mean() for d in drawn])
    errors = np.array([jackknife_error(d.silhouettes_without) for d in drawn])
    assert 0.88 <= np.mean(np.abs(values - values.mean()) < 1.96 * errors) <= 1.0
    rows = np.array([d.silhouettes.std() / np.sqrt(60) for d in drawn])
    assert np.mean(np.abs(values - values.mean()) < 1.96 * rows) < 0.88
