"""What --max-minutes gives up, in which order, and what it never gives up."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from run.runs import ALL_ARMS, PROBE, config_of
from tell.errors import TellError
from tell.names import ARMS as REGISTRY
from tell.run.general_rows import read_general
from tell.run.plan import describe_plan
from tell.run.prepare import Prepared, prepare
from tell.run.task import anchor_of, load_task
from tell.run.time_budget import (
    LEAST_REPEAT,
    LEAST_TEST_ROWS,
    OPTIONAL_ARMS,
    Extent,
    fit_minutes,
    least_general,
    read_extent,
)


@pytest.fixture(scope="module")
def prepared(tiny_model) -> Prepared:
    config = config_of(
        tiny_model("llama"),
        general={"source": str(PROBE), "rows": 300},
        mix={"repeat": 20},
        task={"test_rows": None},
        eval={"arms": ALL_ARMS},
    )
    task = load_task(config)
    return prepare(task, anchor_of(config), read_general(task))


def seconds(prepared, extent: Extent) -> float:
    return describe_plan(extent.apply(prepared))["predicted"]["seconds"]


def fit(prepared, room: float, **more) -> tuple[Extent, list[str]]:
    return fit_minutes(prepared, minutes=(room + 7) / 60, spent=7, **more)


def least(prepared) -> Extent:
    whole, draw = Extent.of(prepared), prepared.draw
    kept = tuple(arm for arm in whole.arms if arm not in OPTIONAL_ARMS)
    short = replace(draw, indices=draw.indices[: least_general(prepared.table, prepared.general, draw)])
    return replace(whole, arms=kept, test_rows=LEAST_TEST_ROWS, repeat=max(LEAST_REPEAT, 20 // 4), draw=short)


def test_what_says_least_of_the_method_is_given_up_first():
    """The controls that have the readout, without which nobody knows what it brings to TELL, and arms asked for by
    name come last."""
    first, last = ["tell-anchor", "general", "sft", "base+anchor"], ["tell-free", "icl-readout", "sft-readout"]
    asked = [arm for arm in OPTIONAL_ARMS if arm not in (*first, *last)]
    assert [*first, *last, *asked] == OPTIONAL_ARMS
    assert {*asked} == {name for name, arm in REGISTRY.items() if not arm.standard} - {"general"}


def test_what_fits_is_left_as_it_is(prepared):
    whole = Extent.of(prepared)
    assert fit(prepared, seconds(prepared, whole) * 1.001) == (whole, [])
    assert whole.arms == tuple(ALL_ARMS) and whole.test_rows == 108 and whole.repeat == 20 and len(whole.draw) == 300


def test_things_are_given_up_in_their_order(prepared):
    """Arms one by one, then test rows, then general rows and repetitions together; each is said."""
    whole, low = Extent.of(prepared), least(prepared)
    for n in (n for n, arm in enumerate(OPTIONAL_ARMS, 1) if arm in whole.arms):
        fewer = replace(whole, arms=tuple(arm for arm in whole.arms if arm not in OPTIONAL_ARMS[:n]))
        extent, notices = fit(prepared, seconds(prepared, fewer) * 1.0001)
        assert extent == fewer and notices[0].endswith(
            f"without the arms {', '.join(arm for arm in whole.arms if arm in OPTIONAL_ARMS[:n])}"
        )
    room = seconds(prepared, replace(fewer, test_rows=84)) * 1.0001
    extent, notices = fit(prepared, room)
    assert 80 <= extent.test_rows <= 84 and extent == replace(fewer, test_rows=extent.test_rows)
    assert f"{extent.test_rows} of 108 test rows" in notices[1]
    room = (seconds(prepared, replace(fewer, test_rows=LEAST_TEST_ROWS)) + seconds(prepared, low)) / 2
    extent, notices = fit(prepared, room)
    assert seconds(prepared, extent) <= room and extent.test_rows == LEAST_TEST_ROWS
    assert low.repeat < extent.repeat < 20 and len(low.draw) < len(extent.draw) < 300
    assert np.array_equal(extent.draw.indices, whole.draw.indices[: len(extent.draw)])
    assert f"{len(extent.draw)} of 300 general rows" in notices[2]
    assert f"{extent.repeat} times instead of 20" in notices[3]


def test_the_least_is_still_the_method(prepared):
    extent, _ = fit(prepared, seconds(prepared, least(prepared)) * 1.0001)
    assert {"base", "icl", "sft-matched", "tell"} <= set(extent.arms) and not {*extent.arms} & {*OPTIONAL_ARMS}
    assert extent.repeat == 5 and extent.test_rows == LEAST_TEST_ROWS
    assert prepared.general.table.unit[extent.draw.indices].sum() >= prepared.table.unit.sum()


def test_less_than_the_least_is_refused_with_minutes_that_do(prepared):
    with pytest.raises(TellError, match="too short") as caught:
        fit(prepared, seconds(prepared, least(prepared)) * 0.5)
    assert caught.value.where.startswith("--max-minutes ")
    minutes = int(re.search(r"--max-minutes (\d+)", caught.value.remedy)[1])
    extent, _ = fit_minutes(prepared, minutes=minutes, spent=7)
    assert len(extent.draw) > 0


def test_what_scores_the_method_stays(prepared):
    """`tell-anchor` is given up first, but not where it alone is scored with TELL's adapter."""
    config = prepared.task.config.model_copy(deep=True)
    config.eval.arms = ("base", "tell-anchor", "sft")
    fewer = replace(prepared, task=replace(prepared.task, config=config))
    cost = seconds(fewer, replace(Extent.of(fewer), arms=("base", "tell-anchor")))
    extent, _ = fit_minutes(fewer, minutes=cost * 1.001 / 60, spent=0)
    assert extent.arms == ("base", "tell-anchor")


def test_fewer_test_rows_are_among_more(prepared):
    whole = Extent.of(prepared)
    few, more = (replace(whole, test_rows=n).apply(prepared) for n in (60, 90))
    few, again = few.task, replace(whole, test_rows=60).apply(more).task
    assert [e.hash for e in again.test] == [e.hash for e in few.test] and len(few.test) == 60
    order = [e.hash for e in prepared.task.test]
    assert [e.hash for e in few.test] == sorted((e.hash for e in few.test), key=order.index)


def test_no_general_rows_where_none_are_wanted(prepared):
    without = replace(prepared, general=None, draw=None)
    extent, notices = fit_minutes(without, minutes=1e6, spent=0)
    assert extent.draw is None and notices == []


def test_after_training_only_what_is_left_is_given_up(prepared):
    """The mixture is trained already; what cannot be met any more is said instead of refused."""
    whole = Extent.of(prepared)
    extent, notices = fit(prepared, 1e-9, trained="tell")
    assert (extent.repeat, len(extent.draw)) == (whole.repeat, len(whole.draw))
    assert extent.test_rows == LEAST_TEST_ROWS and "slower than predicted" in notices[-1]
    trained = describe_plan(prepared)["arms"]["tell"]["seconds"]
    assert fit(prepared, seconds(prepared, whole) - trained * 0.99, trained="tell") == (whole, [])


def test_what_was_decided_is_read_again(prepared):
    draw = prepared.draw
    extent, _ = fit(prepared, seconds(prepared, least(prepared)) * 1.1)
    again = read_extent(extent.to_dict(), draw)
    assert again.to_dict() == extent.to_dict() and np.array_equal(again.draw.indices, extent.draw.indices)


def test_no_more_general_rows_than_were_written(prepared):
    extent, notices = fit(prepared, 1e9, most_general=64)
    assert len(extent.draw) == 64 and "64 of 300 general rows" in notices[0]
