import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell.data.example import Example
from tell.data.split import split, split_given_test
from tell.errors import TellError
from tell.seeds import shuffled


def make(pairs):
    return [Example.pair(prompt, answer, origin=f"f.jsonl:{i}") for i, (prompt, answer) in enumerate(pairs, 1)]


def origins(examples):
    return [example.origin for example in examples]


pairs = st.lists(
    st.tuples(st.sampled_from([f"q{i}" for i in range(12)]), st.sampled_from("ab")), min_size=2, max_size=40
)
fractions = st.floats(0.01, 0.99)


@settings(max_examples=200)
@given(pairs.filter(lambda p: len({q for q, _ in p}) > 1), st.integers(0, 2**31), fractions, st.floats(0, 0.9))
def test_nothing_lost_nothing_doubled_no_prompt_straddles(rows, seed, test_fraction, validation_fraction):
    examples = make(rows)
    parts = split(examples, seed=seed, test_fraction=test_fraction, validation_fraction=validation_fraction)
    together = parts.train + parts.validation + parts.test
    assert Counter(origins(together)) == Counter(origins(examples))
    assert parts.train and parts.test
    prompts = [{example.prompt for example in part} for part in (parts.train, parts.validation, parts.test)]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    assert parts.exact_duplicates == len(rows) - len(set(rows))
    assert parts == split(examples, seed=seed, test_fraction=test_fraction, validation_fraction=validation_fraction)


@settings(max_examples=100)
@given(st.integers(2, 80), st.integers(0, 99), fractions, st.floats(0, 0.9))
def test_sizes_are_exact_where_all_prompts_differ(n, seed, test_fraction, validation_fraction):
    parts = split(
        make((f"q{i}", "a") for i in range(n)),
        seed=seed,
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
    )
    assert len(parts.test) == min(max(1, round(test_fraction * n)), n - 1)
    left = n - len(parts.test)
    assert len(parts.validation) == min(round(validation_fraction * left), left - 1)


def test_two_rows():
    parts = split(make([("a", "1"), ("b", "2")]), seed=0, test_fraction=0.3, validation_fraction=0.1)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (1, 0, 1)


def test_one_large_group_stays_in_training():
    parts = split(
        make([("a", str(i)) for i in range(9)] + [("b", "x")]), seed=3, test_fraction=0.3, validation_fraction=0
    )
    assert origins(parts.test) == ["f.jsonl:10"]


def test_groups_larger_than_the_test_part():
    rows = make([(q, str(i)) for q in "ab" for i in range(5)])
    parts = split(rows, seed=0, test_fraction=0.2, validation_fraction=0.2)
    assert (len(parts.train), len(parts.test)) == (5, 5)


def test_seeds_differ():
    rows = make((f"q{i}", "a") for i in range(40))
    tests = [tuple(origins(split(rows, seed=s, test_fraction=0.3, validation_fraction=0).test)) for s in range(5)]
    assert len(set(tests)) == 5


def test_same_in_any_process():
    code = (
        "from tell.data.example import Example\nfrom tell.data.split import split\n"
        "rows = [Example.pair(f'q{i % 17}', str(i), origin=f'f:{i}') for i in range(50)]\n"
        "parts = split(rows, seed=7, test_fraction=0.3, validation_fraction=0.1)\n"
        "print([[e.origin for e in p] for p in (parts.train, parts.validation, parts.test)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_too_few_rows():
    with pytest.raises(TellError, match=r"f.jsonl: has one row in all; .*--test"):
        split(make([("a", "1")]), seed=0, test_fraction=0.3, validation_fraction=0.1)
    with pytest.raises(TellError, match="has no rows"):
        split([], seed=0, test_fraction=0.3, validation_fraction=0.1)
    with pytest.raises(TellError, match="all 3 rows have the same prompt"):
        split(make([("a", "1"), ("a", "2"), ("a", "1")]), seed=0, test_fraction=0.3, validation_fraction=0.1)


@settings(max_examples=100)
@given(pairs, pairs, st.integers(0, 99), st.floats(0, 0.9))
def test_given_test(train, test, seed, validation_fraction):
    train, test = make(train), make(test)
    held = {example.hash for example in test}
    kept = [example for example in train if example.hash not in held]
    if not kept:
        with pytest.raises(TellError, match="is also in the test file"):
            split_given_test(train, test, seed=seed, validation_fraction=validation_fraction)
        return
    parts = split_given_test(train, test, seed=seed, validation_fraction=validation_fraction)
    assert parts.test == test
    assert Counter(origins(parts.train + parts.validation)) == Counter(origins(kept))
    assert parts.exact_duplicates == len(train) - len(kept)
    assert parts.train
    assert not {e.prompt for e in parts.train} & {e.prompt for e in parts.validation}


def test_given_test_is_not_empty():
    with pytest.raises(TellError, match="--test: has no rows"):
        split_given_test(make([("a", "1")]), [], seed=0, validation_fraction=0)


def classes(part):
    return {example.answer for example in part}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(2, 6), min_size=2, max_size=4), st.integers(0, 9999), st.floats(0.3, 0.7), st.floats(0, 0.5)
)
def test_every_class_is_trained_and_tested(counts, seed, test_fraction, validation_fraction):
    rows = [(f"q{i} {j}", f"class {i}") for i, count in enumerate(counts) for j in range(count)]
    parts = split(make(rows), seed=seed, test_fraction=test_fraction, validation_fraction=validation_fraction)
    wanted = min(max(1, round(test_fraction * len(rows))), len(rows) - 1)
    assert len(parts.test) == wanted if len(rows) - wanted >= len(counts) else len(parts.test) < wanted
    assert classes(parts.train) == {f"class {i}" for i in range(len(counts))}
    if len(parts.test) >= len(counts) and len(rows) - len(parts.test) >= len(counts):
        assert classes(parts.test) == classes(parts.train)


def test_a_class_of_one_row_is_trained():
    rows = make([(f"mail {i}", "fraud" if i == 4 else "fine") for i in range(15)])
    for seed in range(50):
        parts = split(rows, seed=seed, test_fraction=0.3, validation_fraction=0.2)
        assert "fraud" in classes(parts.train) and classes(parts.test) == {"fine"}


def test_validation_takes_no_class_from_training():
    rows = make([(f"mail {i}", "fraud" if i < 2 else "fine") for i in range(30)])
    other = make([("x", "fine")])
    for seed in range(50):
        assert "fraud" in classes(split_given_test(rows, other, seed=seed, validation_fraction=0.4).train)


def test_splits_that_miss_no_class_stay_as_they_were():
    rows = make((f"q{i}", "ab"[i % 2]) for i in range(40))
    parts = split(rows, seed=42, test_fraction=0.3, validation_fraction=0.1)
    order = [f"f.jsonl:{i + 1}" for i in shuffled(40, 42)]
    assert set(origins(parts.test)) == set(order[:12])
