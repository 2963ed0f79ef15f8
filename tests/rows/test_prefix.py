"""Tokens that a plan says training computes are those that its passes compute."""

from __future__ import annotations

import numpy as np
import pytest

from tell.rows.prefix import common_prefix, computed_tokens
from tell.train import packing
from tell.train.packing import TrainRow, pack, split_packs


def rows_of(rng: np.random.Generator, number: int, prefix: int, shared: np.ndarray, *, task: bool) -> list[TrainRow]:
    """Rows of 20 to 60 tokens of their own behind ``prefix`` tokens, of which the first are ``shared``."""
    first = 900 if task else 800  # no token of one kind's prefix occurs in the other
    ahead = np.concatenate([shared, np.full(prefix - len(shared), first)])
    rows = []
    for i in range(number):
        own = rng.integers(0, 400, int(rng.integers(20, 60)))
        own[0] = 2 * i  # rows differ right behind their prefix
        ids = np.concatenate([ahead, own]).astype(np.int32)
        rows.append(TrainRow(ids, np.arange(len(ids)) > len(ids) - 5, 0 if task else 1, task))
    return rows


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("micro_tokens", [600, 4096])
@pytest.mark.parametrize("prefix", [0, 12, 150])
@pytest.mark.parametrize(("task", "other"), [(16, 0), (13, 3), (1, 15), (0, 16)])
def test_planned_tokens_are_those_computed(task, other, prefix, micro_tokens, device, monkeypatch):
    rng = np.random.default_rng(7)
    shared = np.full(min(prefix, 10), 700)
    steps = [
        rows_of(rng, task, prefix, shared, task=True) + rows_of(rng, other, len(shared), shared, task=False)
        for _ in range(3)
    ]
    groups = [split_packs(rows, micro_tokens, share_prefix=True, device=device) for rows in steps]
    monkeypatch.setattr(packing, "prefix_per_row", lambda _: device == "cuda")
    computed = sum(pack(group, share_prefix=True).plan.total for step in groups for group in step)
    every = [row for rows in steps for row in rows]
    said = computed_tokens(
        np.array([[task, other]] * 3),
        np.array([[sum(len(r.ids) for r in rows if r.task == kind) for kind in (True, False)] for rows in steps]),
        prefix=common_prefix([row.ids for row in every if row.task]) if task else 0,
        shared=common_prefix([row.ids for row in every]) if other else 0,
        micro_tokens=micro_tokens,
        per_row=device == "cuda",
    )
    given = sum(len(row.ids) for row in every)
    # The general rows of a step may begin with a token more in common than the rows of all steps.
    assert said == pytest.approx(computed, rel=0.01), given
    if micro_tokens == 4096 and task > 1 and other and prefix > 12:  # on a GPU rows without the prefix share its pass
        assert {len(step) for step in groups} == {2 if device == "cpu" else 1}
    if prefix == 150 and task > 1:
        assert said < 0.8 * given
