import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell.errors import TellError
from tell.mix.orderings import ORDERINGS, get_ordering, ordering, shuffle, spread

counts = st.dictionaries(st.sampled_from(["task", "general", "probe", "extra"]), st.integers(0, 60), min_size=1)
seeds = st.integers(0, 2**32)


def windows(stream, index):
    """(n + 1, n + 1) rows of one source in every window [a, b)."""
    seen = np.concatenate([[0], np.cumsum(stream == index)])
    return seen[None, :] - seen[:, None]


def lengths(n):
    return np.arange(n + 1)[None, :] - np.arange(n + 1)[:, None]


@pytest.mark.parametrize("name", ["shuffle", "spread"])
@given(counts=counts, seed=seeds)
def test_each_source_occurs_exactly_as_often_as_asked(name, counts, seed):
    stream = ORDERINGS[name](counts, seed)
    assert stream.dtype == np.int8
    assert np.bincount(stream, minlength=len(counts)).tolist() == list(counts.values())


@pytest.mark.parametrize("name", ["shuffle", "spread"])
@given(counts=counts, seed=seeds, data=st.data())
def test_order_of_keys_does_not_matter(name, counts, seed, data):
    keys = data.draw(st.permutations(list(counts)))
    other = {key: counts[key] for key in keys}
    named = np.array(list(counts))[ORDERINGS[name](counts, seed)]
    assert (named == np.array(keys)[ORDERINGS[name](other, seed)]).all()


@given(task=st.integers(1, 60), general=st.integers(0, 200), seed=seeds)
def test_spread_gives_every_window_its_share_within_one_row(task, general, seed):
    stream = spread({"task": task, "general": general}, seed)
    n = len(stream)
    for index, count in enumerate((task, general)):
        off = np.triu(np.abs(windows(stream, index) * n - lengths(n) * count))
        assert off.max() < n  # whole numbers: less than one row


@given(counts=counts, seed=seeds)
def test_spread_of_k_sources_is_less_than_k_minus_one_rows_off(counts, seed):
    stream = spread(counts, seed)
    n, k = len(stream), sum(count > 0 for count in counts.values())
    for index, count in enumerate(counts.values()):
        off = np.triu(np.abs(windows(stream, index) * n - lengths(n) * count))
        assert off.max() < max(k - 1, 1) * max(n, 1)


@given(task=st.integers(1, 60), more=st.integers(1, 400), seed=seeds)
def test_spread_leaves_near_equal_gaps(task, more, seed):
    stream = spread({"task": task, "general": task + more}, seed)
    at = np.flatnonzero(stream == 0)
    gaps = np.diff(np.append(at, at[0] + len(stream)))  # round the end: the phase is less than a gap
    assert gaps.max() - gaps.min() <= 1


def test_spread_phase_is_seeded():
    first = {int(np.flatnonzero(spread({"task": 10, "general": 990}, seed) == 0)[0]) for seed in range(200)}
    assert min(first) < 10 and max(first) > 89 and max(first) < 100


def test_shuffle_reaches_every_place():
    mean = np.mean([shuffle({"task": 5, "general": 45}, seed) == 0 for seed in range(3000)], axis=0)
    assert np.abs(mean - 0.1).max() < 5 * (0.1 * 0.9 / 3000) ** 0.5


def test_places_of_a_seed_never_change():
    """A change here changes every user's mixture: old manifests could not be made again."""
    counts = {"task": 3, "general": 9}
    assert "".join(map(str, shuffle(counts, 42))) == "010111111110"
    assert "".join(map(str, spread(counts, 42))) == "111011101110"


def test_unknown_ordering_names_the_nearest():
    with pytest.raises(TellError, match=r"'sprad' is unknown; did you mean spread\? Use shuffle or spread"):
        get_ordering("sprad")


def test_negative_count_is_refused():
    with pytest.raises(TellError, match="source 'task': count -1 is negative"):
        shuffle({"task": -1}, 0)


def test_an_ordering_can_be_added():
    @ordering("blocks")
    def blocks(counts, seed):
        return np.repeat(np.arange(len(counts)), list(counts.values())).astype(np.int8)

    try:
        assert get_ordering("blocks")({"task": 2, "general": 1}, 0).tolist() == [0, 0, 1]
    finally:
        del ORDERINGS["blocks"]


def test_an_ordering_is_declared_once():
    with pytest.raises(ValueError, match="'spread' is declared twice"):
        ordering("spread")(shuffle)
