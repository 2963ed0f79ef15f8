import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell.errors import TellError
from tell.mix import ORDERINGS, build, build_repeated, general_rows
from tell.mix.mixture import build_counted

from .tables import make_table

lengths = st.lists(st.integers(3, 40), min_size=1, max_size=30)
seeds = st.integers(0, 2**32)
orders = st.sampled_from(sorted(ORDERINGS))


def occurrences(mixture, source):
    here = mixture.source == mixture.sources.index(source)
    return mixture.row[here], mixture.repetition[here]


@given(task=lengths, general=lengths, rows=st.integers(0, 90), repeat=st.integers(1, 5), order=orders, seed=seeds)
def test_every_task_row_occurs_exactly_k_times_and_no_general_row_is_lost(task, general, rows, repeat, order, seed):
    tables = {"task": make_table("task", task), "general": make_table("general", general)}
    draw = general_rows(tables["general"].unit, task_tokens=1, rows=rows, seed=seed)
    mixture = build(tables, general=draw, repeat=repeat, ordering=order, seed=seed)
    assert len(mixture) == len(task) * repeat + rows
    row, repetition = occurrences(mixture, "task")
    assert (np.bincount(row, minlength=len(task)) == repeat).all()
    # repetition r of every row before repetition r + 1 of any
    assert repetition.tolist() == np.repeat(np.arange(repeat), len(task)).tolist()
    if rows:
        row, repetition = occurrences(mixture, "general")
        assert row.tolist() == draw.indices.tolist()
        assert repetition.tolist() == (np.arange(rows) // len(general)).tolist()


@given(task=lengths, general=lengths, rows=st.integers(1, 60), order=orders, seed=seeds, repeat=st.integers(1, 3))
def test_counts_are_those_of_the_rows(task, general, rows, order, seed, repeat):
    tables = {"task": make_table("task", task), "general": make_table("general", general)}
    draw = general_rows(tables["general"].unit, task_tokens=1, rows=rows, seed=seed)
    counts = build(tables, general=draw, repeat=repeat, ordering=order, seed=seed).counts()
    assert counts["rows"] == {"task": len(task) * repeat, "general": rows}
    assert counts["unique_rows"] == {"task": len(task), "general": min(rows, len(general))}
    for key, name in (("tokens", "tokens"), ("trained_tokens", "trained"), ("unit_tokens", "unit")):
        drawn = getattr(tables["general"], name)[draw.indices]
        assert counts[key] == {"task": int(getattr(tables["task"], name).sum()) * repeat, "general": int(drawn.sum())}
    once = int(tables["task"].unit.sum())
    assert counts["ratio"] == pytest.approx(int(tables["general"].unit[draw.indices].sum()) / once)
    assert (counts["repeat"], counts["order"], counts["notices"]) == (repeat, order, draw.notices)


def test_the_order_of_sources_does_not_matter_and_the_seed_does():
    task, general = make_table("task", [9, 5, 7] * 5), make_table("general", list(range(3, 90)))
    draw = general_rows(general.unit, task_tokens=100, ratio=10, seed=3)

    def mix(tables, seed):
        return build(tables, general=draw, repeat=2, ordering="shuffle", seed=seed)

    first, second = mix({"task": task, "general": general}, 3), mix({"general": general, "task": task}, 3)
    for name in ("source", "row", "repetition"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()
    assert first.sources == second.sources == ("task", "general")
    assert first.digest() == second.digest() != mix({"task": task, "general": general}, 4).digest()


def test_each_repetition_has_an_order_of_its_own():
    mixture = build({"task": make_table("task", [5] * 30)}, general=None, repeat=3, ordering="shuffle", seed=0)
    row, _ = occurrences(mixture, "task")
    first, second, third = row.reshape(3, 30).tolist()
    assert first != second != third != first


@given(n=st.integers(1, 70), batch=st.integers(1, 40))
def test_steps_drop_nothing(n, batch):
    mixture = build({"task": make_table("task", [5] * n)}, general=None, repeat=1, ordering="spread", seed=0)
    sizes = mixture.examples_per_step(batch).sum(axis=1)
    assert len(sizes) == mixture.steps(batch) and sizes.sum() == n
    assert (sizes[:-1] == batch).all() and 1 <= sizes[-1] <= batch


def test_examples_per_step_are_counted_per_source():
    tables = {"task": make_table("task", [5] * 10), "general": make_table("general", [5] * 150)}
    draw = general_rows(tables["general"].unit, task_tokens=1, rows=150, seed=0)
    per_step = build(tables, general=draw, repeat=1, ordering="spread", seed=0).examples_per_step(16)
    assert per_step.tolist() == [[1, 15]] * 10


@given(task=lengths, total=st.integers(1, 200), seed=seeds)
def test_repeated_rows_are_whole_epochs(task, total, seed):
    mixture = build_repeated(make_table("task", task), total, seed)
    assert len(mixture) == total and mixture.sources == ("task",)
    used = np.bincount(mixture.row, minlength=len(task))
    assert used.max() - used.min() <= 1 and used.max() == mixture.repeat
    assert mixture.repetition.tolist() == (np.arange(total) // len(task)).tolist()


@given(task=lengths, repeat=st.integers(1, 4), seed=seeds)
def test_repeated_equals_the_task_rows_of_the_mix(task, repeat, seed):
    table = make_table("task", task)
    alone = build_repeated(table, len(task) * repeat, seed)
    assert alone.digest() == build({"task": table}, general=None, repeat=repeat, ordering="spread", seed=seed).digest()


def test_a_subset_of_task_rows_is_used_whatever_its_order():
    table = make_table("task", [5] * 20)
    mixtures = [
        build({"task": table}, general=None, repeat=2, ordering="shuffle", seed=1, task_rows=np.array(rows))
        for rows in ([3, 17, 8], [17, 8, 3])
    ]
    assert Counter(mixtures[0].row.tolist()) == {3: 2, 8: 2, 17: 2}
    assert mixtures[0].digest() == mixtures[1].digest()
    assert set(build_repeated(table, 7, 1, task_rows=np.array([4, 5])).row.tolist()) == {4, 5}


def test_the_general_arm_sees_the_general_rows_of_the_tell_arm_in_the_same_order():
    tables = {"task": make_table("task", [5] * 4), "general": make_table("general", [5] * 50)}
    draw = general_rows(tables["general"].unit, task_tokens=1, rows=40, seed=2)
    tell = build(tables, general=draw, repeat=2, ordering="shuffle", seed=2)
    alone = build(
        {"general": tables["general"]},
        general=draw,
        repeat=1,
        ordering="shuffle",
        seed=2,
    )
    assert alone.row.tolist() == occurrences(tell, "general")[0].tolist()
    assert alone.counts()["ratio"] is None and tell.counts()["rows"]["task"] == 8


def test_no_general_rows_is_the_same_as_no_general_source():
    tables = {"task": make_table("task", [5] * 9), "general": make_table("general", [5])}
    none = general_rows(tables["general"].unit, task_tokens=1, ratio=0, seed=5)
    mixture = build(tables, general=none, repeat=1, ordering="shuffle", seed=5)
    alone = build({"task": tables["task"]}, general=None, repeat=1, ordering="shuffle", seed=5)
    assert mixture.digest() == alone.digest()
    assert mixture.counts()["rows"] == {"task": 9} and mixture.counts()["ratio"] == 0


def test_notices_of_the_draw_reach_the_counts():
    tables = {"task": make_table("task", [5]), "general": make_table("general", [5] * 4)}
    draw = general_rows(tables["general"].unit, task_tokens=1, rows=10, seed=0)
    counts = build(tables, general=draw, repeat=1, ordering="shuffle", seed=0).counts()
    assert counts["notices"] == draw.notices and "2.50 times" in counts["notices"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeat": 0}, "mix.repeat: 0 repetitions"),
        ({"ordering": "shufle"}, "did you mean shuffle"),
        ({"task_rows": np.array([2, 2])}, "names a row twice"),
        ({"task_rows": np.array([0, 4])}, "row 4 is not among 4 task rows"),
        ({"task_rows": np.array([-1])}, "row -1 is not among"),
        ({"task_rows": np.array([], dtype=int)}, "has no row"),
    ],
)
def test_bad_mixtures_are_refused(change, message):
    arguments = {"general": None, "repeat": 1, "ordering": "shuffle", "seed": 0, **change}
    with pytest.raises(TellError, match=message):
        build({"task": make_table("task", [5] * 4)}, **arguments)


def test_sources_and_batches_are_checked():
    table = make_table("task", [5])
    with pytest.raises(TellError, match="'tasks' is unknown"):
        build({"tasks": table}, general=None, repeat=1, ordering="shuffle", seed=0)
    with pytest.raises(TellError, match="no general table"):
        draw = general_rows(np.array([3]), task_tokens=1, rows=1, seed=0)
        build({"task": table}, general=draw, repeat=1, ordering="shuffle", seed=0)
    with pytest.raises(TellError, match=r"train\.batch_size: 0"):
        build_repeated(table, 3, 0).steps(0)
    with pytest.raises(TellError, match="0 rows requested of 1 task rows"):
        build_repeated(table, 0, 0)


SCRIPT = """
from tests.mix.tables import make_table
from tell.mix import build, build_repeated, general_rows
names = {"task", "general"}  # the order of a set of strings depends on PYTHONHASHSEED
tables = {name: make_table(name, list(range(3, 40))) for name in names}
draw = general_rows(tables["general"].unit, task_tokens=50, ratio=40, seed=7)
for order in ("shuffle", "spread"):
    print(build(tables, general=draw, repeat=3, ordering=order, seed=7).digest())
print(build_repeated(tables["task"], 100, 7).digest())
"""


def test_same_mixture_in_every_process():
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    outputs = []
    for hash_seed in ("0", "1", "2024"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert outputs[0] == outputs[1] == outputs[2]
    # and on every machine: a change here would change every user's mixture
    assert [digest[:16] for digest in outputs[0]] == ["367b8142f4e51b99", "ce96cd2edaee8d4b", "0e256ea25be0cde3"]


@given(n=st.integers(1, 9), rows=st.integers(0, 12), repeat=st.integers(2, 5), order=orders, seed=seeds)
def test_replaced_rows_keep_their_places_and_repetitions(n, rows, repeat, order, seed):
    """And what was mixed before is as it was."""
    tables = {"task": make_table("task", [9] * n), "general": make_table("general", [7] * 5)}
    draw = general_rows(tables["general"].unit, task_tokens=1, rows=rows, seed=seed)
    plain = build(tables, general=draw, repeat=repeat, ordering=order, seed=seed)
    before = plain.digest()
    places = np.flatnonzero((plain.source == 0) & (plain.repetition % 2 == 1))
    other = make_table("exemplars", list(range(20, 20 + len(places) + 2)))
    use = np.arange(len(places))[::-1] + 1
    mixture = plain.replaced(places, use, other, ["said"])
    assert mixture.sources == (*plain.sources, "exemplars") and mixture.notices == (*plain.notices, "said")
    rest = np.setdiff1d(np.arange(len(plain)), places)
    for name in ("tokens", "hashes"):
        assert np.array_equal(mixture.column(name)[places], getattr(other, name)[use])
        assert np.array_equal(mixture.column(name)[rest], plain.column(name)[rest])
    assert np.array_equal(mixture.repetition, plain.repetition) and plain.digest() == before != mixture.digest()
    counts = mixture.counts()
    assert sum(counts["rows"].values()) == len(plain) and counts["unique_rows"]["exemplars"] == len(places)
    assert counts["ratio"] == plain.counts()["ratio"]
    assert mixture.examples_per_step(4).sum(0).tolist() == list(counts["rows"].values())


def test_replacing_no_row_changes_nothing_but_the_notices():
    plain = build({"task": make_table("task", [5] * 3)}, general=None, repeat=2, ordering="shuffle", seed=0)
    same = plain.replaced(np.empty(0, int), np.empty(0, int), make_table("exemplars", []), ["none fit"])
    assert same.digest() == plain.digest() and same.sources == ("task",) and same.notices == ("none fit",)


def test_replaced_rows_are_of_a_new_source_and_exist():
    plain = build({"task": make_table("task", [5] * 3)}, general=None, repeat=2, ordering="shuffle", seed=0)
    with pytest.raises(ValueError, match="has rows of task"):
        plain.replaced(np.array([0]), np.array([0]), make_table("task", [5]))
    with pytest.raises(TellError, match="row 1 is not among 1 exemplars rows"):
        plain.replaced(np.array([0]), np.array([1]), make_table("exemplars", [5]))


@given(task=lengths, pseudo=lengths, rows=st.integers(0, 40), order=orders, seed=seeds, times=st.integers(1, 4))
def test_a_third_source_changes_nothing_of_the_others(task, pseudo, rows, order, seed, times):
    tables = {
        name: make_table(name, [7] * 40 if name == "general" else list(given))
        for name, given in (("pseudo", pseudo), ("general", []), ("task", task))
    }
    draw = general_rows(tables["general"].unit, task_tokens=1, rows=rows, seed=seed)
    arguments = {"general": draw, "repeat": 3, "ordering": order, "seed": seed}
    mixture = build(tables, **arguments, further={"pseudo": times * len(pseudo)})
    assert mixture.sources == tuple(name for name in ("task", "general", "pseudo") if name != "general" or rows)
    counts = mixture.counts()
    assert counts["rows"]["pseudo"] == times * len(pseudo) and counts["unique_rows"]["pseudo"] == len(pseudo)
    row, repetition = occurrences(mixture, "pseudo")
    assert (np.bincount(row) == times).all() and repetition.tolist() == np.repeat(range(times), len(pseudo)).tolist()
    without = build({name: tables[name] for name in ("task", "general")}, **arguments)
    for source in without.sources:
        for one, other in zip(occurrences(mixture, source), occurrences(without, source), strict=True):
            assert one.tolist() == other.tolist()
    assert counts["ratio"] == without.counts()["ratio"]  # general to task: pseudo-labelled rows are neither


@given(task=lengths, pseudo=lengths, a=st.integers(1, 90), b=st.integers(0, 90), order=orders, seed=seeds)
def test_counted_rows_come_in_whole_epochs(task, pseudo, a, b, order, seed):
    tables = {"pseudo": make_table("pseudo", pseudo), "task": make_table("task", task)}
    mixture = build_counted(tables, {"task": a, "pseudo": b}, ordering=order, seed=seed)
    assert mixture.counts()["rows"] == {"task": a} | ({"pseudo": b} if b else {})
    for source in mixture.sources:
        row, repetition = occurrences(mixture, source)
        n = len(tables[source])
        assert np.ptp(np.bincount(row, minlength=n)) <= 1
        assert repetition.tolist() == (np.arange(len(row)) // n).tolist()
    alone = build_repeated(tables["task"], a, seed)
    assert occurrences(mixture, "task")[0].tolist() == alone.row.tolist()
