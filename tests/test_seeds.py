"""The order of rows is the same under every numpy."""

import numpy as np
import pytest

from tell.seeds import shuffled


def test_published_splits_stay():
    assert shuffled(12, 42).tolist() == [0, 7, 6, 9, 11, 3, 5, 2, 4, 10, 1, 8]
    assert sorted(shuffled(1000, 7)) == list(range(1000))
    assert shuffled(0, 1).tolist() == [] and shuffled(1, 1).tolist() == [0]


@pytest.mark.parametrize("n", [2, 7, 64, 65, 3000])
def test_equals_the_numpy_that_published_them(n):
    for seed in (0, 1, 42, 2**40):
        assert shuffled(n, seed).tolist() == np.random.default_rng(seed).permutation(n).tolist()
