import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell.score.intervals import difference, estimate, is_gain, newcombe_paired, wilson
from tell.score.label import LabelScorer
from tell.score.means import mean_metric
from tell.score.text import TextScorer


def pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([1.0, 1.0, 0.0, 0.0], [both, only_a, only_b, neither])
    b = np.repeat([1.0, 0.0, 1.0, 0.0], [both, only_a, only_b, neither])
    return a, b


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al. 2000, Statistics with Confidence, thallium stress test
        ((59, 6, 16, 80), -0.1186, -0.0046),  # Fagerland et al. 2017, Statistical Analysis of Contingency Tables, ch. 8
    ],
)
def test_newcombe_equals_published_examples(table, low, high):
    digits = len(str(low).split(".")[1])
    assert [round(limit, digits) for limit in newcombe_paired(*pairs(*table))] == [low, high]


def test_wilson_equals_published_example():
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
    for (r, n), limits in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(r, n) == pytest.approx(limits, abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


@pytest.mark.parametrize(
    "table", [(0, 50, 0, 0), (0, 0, 50, 0), (50, 0, 0, 0), (0, 0, 0, 50), (25, 0, 0, 25), (1, 0, 0, 0)]
)
def test_degenerate_pairs_have_honest_width(table):
    a, b = (mean_metric(rows, binary=True) for rows in pairs(*table))
    result = difference(a, b, seed=0)
    low, high = result["ci"]
    assert -1 <= low < high <= 1 and high - low > 0.02
    assert low <= result["value"] <= high


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(lambda table: sum(table) > 0))
def test_newcombe_properties(table):
    a, b = pairs(*table)
    low, high = newcombe_paired(a, b)
    assert -1 - 1e-9 <= low <= a.mean() - b.mean() <= high <= 1 + 1e-9
    assert newcombe_paired(b, a) == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    ("n", "shares"),
    [(30, (0.91, 0.06, 0.02, 0.01)), (100, (0.5, 0.3, 0.1, 0.1)), (60, (0, 0.9, 0, 0.1)), (100, (0.98, 0.01, 0.01, 0))],
)
def test_newcombe_covers_the_truth(n, shares):
    rng = np.random.default_rng(1)
    truth, tables = shares[1] - shares[2], rng.multinomial(n, shares, size=500)
    limits = np.array([newcombe_paired(*pairs(*table)) for table in tables])
    assert np.mean((limits[:, 0] <= truth) & (truth <= limits[:, 1])) >= 0.93


def test_bootstrap_alone_would_not_cover_binary_differences():
    """The figures in the docstring of `difference`: why binary pairs do not use the bootstrap."""
    rng = np.random.default_rng(0)
    shares, n = (0.91, 0.06, 0.02, 0.01), 30
    hits = []
    for table in rng.multinomial(n, shares, size=300):
        a, b = pairs(*table)
        gaps = rng.choice(a - b, (400, n)).mean(axis=1)
        low, high = np.percentile(gaps, (2.5, 97.5))
        hits.append(low - 1e-9 <= 0.04 <= high + 1e-9)
    assert 0.75 < np.mean(hits) < 0.9


def test_binary_estimate_is_wilson():
    metric = mean_metric([1] * 93 + [0] * 7, binary=True)
    assert estimate(metric, seed=0) == {"value": 0.93, "ci": [round(x, 6) for x in wilson(93, 100)], "n": 100}


def test_continuous_mean_that_is_all_zero_is_not_certain():
    zeros, ones = mean_metric(np.zeros(40)), mean_metric(np.ones(40))
    assert estimate(zeros, seed=0)["ci"] == [0.0, pytest.approx(wilson(0, 40)[1], abs=1e-6)]
    assert difference(ones, zeros, seed=0)["ci"][0] < 0.95


def test_bootstrap_mean_matches_theory():
    rows = np.random.default_rng(3).normal(5, 2, 400)
    result = estimate(mean_metric(rows), seed=7, samples=4000)
    half = 1.96 * rows.std() / 20
    assert result["value"] == pytest.approx(rows.mean(), abs=1e-6)
    assert result["ci"] == pytest.approx([rows.mean() - half, rows.mean() + half], abs=0.03)


def test_paired_difference_uses_the_same_rows_for_both():
    rng = np.random.default_rng(5)
    hard = rng.normal(0, 10, 200)
    a, b = mean_metric(hard + 1 + rng.normal(0, 0.1, 200)), mean_metric(hard)
    low, high = difference(a, b, seed=0)["ci"]
    assert 0.95 < low < high < 1.05  # unpaired it would be some 4 wide
    assert difference(b, b, seed=0)["ci"] == [0.0, 0.0]


def test_pairs_of_zeros_and_ones_stay_pairs():
    """Newcombe's interval counts the four kinds of pairs: of other partners it would be another."""
    a, b = pairs(40, 9, 3, 20)
    result = difference(mean_metric(a, binary=True), mean_metric(b, binary=True), seed=0)
    assert result["ci"] == [round(limit, 6) for limit in newcombe_paired(a, b)]


def test_nan_rows_are_ignored_in_both():
    nan = np.nan
    a, b = mean_metric([0.5, nan, 0.7, 0.9, 0.1]), mean_metric([0.5, 0.2, nan, 0.4, 0.1])
    assert estimate(a, seed=0)["n"] == 4
    result = difference(a, b, seed=0)
    assert result["n"] == 3 and result["value"] == pytest.approx(0.5 / 3, abs=1e-6)
    binary = estimate(mean_metric([1, nan, 0, nan], binary=True), seed=0)
    assert binary["n"] == 2 and binary["value"] == 0.5


def test_no_row_and_one_row():
    nothing = {"value": None, "ci": [None, None], "n": 0}
    empty = mean_metric([np.nan, np.nan])
    assert estimate(empty, seed=0) == difference(empty, empty, seed=0) == nothing
    assert estimate(mean_metric([0.4]), seed=0) == {"value": 0.4, "ci": [0.4, 0.4], "n": 1}
    one = estimate(mean_metric([1], binary=True), seed=0)
    assert one["value"] == 1 and one["ci"][0] == pytest.approx(0.2065, abs=1e-3)


@settings(max_examples=25)
@given(st.lists(st.floats(-100, -1) | st.floats(1.5, 100), min_size=1, max_size=30), st.integers(0, 5))
def test_same_seed_same_interval_and_it_is_ordered(rows, seed):
    metric = mean_metric(rows)
    first = estimate(metric, seed=seed, samples=200)
    assert first == estimate(metric, seed=seed, samples=200)
    low, high = first["ci"]
    assert min(rows) - 1e-5 <= low <= high <= max(rows) + 1e-5


def test_chunks_do_not_change_the_result(monkeypatch):
    metric = mean_metric(np.random.default_rng(0).normal(size=50))
    whole = estimate(metric, seed=3, samples=300)
    monkeypatch.setattr("tell.score.intervals._CHUNK", 50 * 7)
    assert estimate(metric, seed=3, samples=300) == whole


def test_corpus_metrics_go_through():
    texts = ["a quick brown fox", "jumps over it", "the lazy dog sleeps", "again and again"]
    metric = TextScorer().score(texts, [t.replace("a", "o") for t in texts])["chrf"]
    result = estimate(metric, seed=0, samples=200)
    assert result["ci"][0] < result["value"] < result["ci"][1] and result["n"] == 4
    f1 = LabelScorer(["x", "y"]).score(["x", "y", "x", "z"], ["x", "y", "y", "y"])["macro_f1"]
    result = estimate(f1, seed=0, samples=200)
    assert result["n"] == 4 and result["ci"][0] < result["value"] < result["ci"][1]


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 and 3 rows"):
        difference(mean_metric([1, 2]), mean_metric([1, 2, 3]), seed=0)


@pytest.mark.parametrize(("before", "after", "n", "seen"), [(22, 27, 30, True), (23, 27, 30, False), (5, 5, 9, False)])
def test_a_gain_is_seen_where_its_interval_excludes_zero(before, after, n, seen):
    a, b = np.arange(n) < after, np.arange(n) < before
    found = difference(mean_metric(a, binary=True), mean_metric(b, binary=True), seed=0)
    assert is_gain(before, after, n) == (found["ci"][0] > 0) == seen
