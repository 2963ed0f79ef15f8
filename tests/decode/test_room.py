"""Rows decoded at once stay within a share of the free memory."""

from __future__ import annotations

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from tell.decode import engine as engines
from tell.decode.engine import Engine
from tell.decode.kv_cache import PrefillPlan, Store
from tell.decode.room import answer_limits, rows_that_fit, token_bytes
from tell.decode.sampler import Decoding
from tell.errors import TellError
from tell.pass_memory import SHARE
from tell.train.attention import use_plan
from tell.train.device import free_bytes
from tell.train.step import Body
from train.packed import load


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=6), st.integers(1, 30), st.booleans())
def test_answers_end_with_the_context(rows, most, own):
    """Each answer gets what was asked for, or what the prompt leaves of 31 tokens."""
    prompts, limits = [[7] * length for length, _ in rows], [limit for _, limit in rows]
    got = answer_limits(prompts, most, limits if own else None, 31)
    for (length, limit), n in zip(rows, got, strict=True):
        assert n == min(limit if own else most, 31 - length) >= 1


def test_prompts_and_limits_that_cannot_be():
    with pytest.raises(TellError, match=r"prompt 2: the prompt has 1,031 tokens and the model takes 1,031\. Shorten"):
        answer_limits([[7], [7] * 1031], 8, None, 1031)
    for limits in ([3], [3, 4, 5], [3, 0]):
        with pytest.raises(ValueError, match=f"{len(limits)} limits for 2 prompts, each must be at least 1"):
            answer_limits([[7], [7]], 8, limits, 31)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_token_takes_what_the_cache_stores(family, tiny_model):
    body, store, prompt = Body(load(tiny_model(family))), Store(1, 3), [1, 2, 3]
    plan = PrefillPlan([len(prompt)], [0], store, 0, "cpu")
    with torch.no_grad(), use_plan(plan):
        body.core(input_ids=torch.tensor([prompt]), position_ids=plan.positions(), use_cache=False)
    stored = sum(x.nbytes for pair in store.own.values() for x in pair)
    with torch.no_grad():
        assert token_bytes(body.core, "cpu") == stored / len(prompt)


@given(st.integers(1, 500), st.integers(1, 5000), st.integers(1, 10**6), st.integers(0, 10**11))
def test_rows_that_fit(wanted, capacity, token, free):
    rows = rows_that_fit(wanted, capacity, token, free)
    assert 1 <= rows <= wanted
    if rows > 1:
        assert rows * capacity * token <= free // SHARE
    if rows < wanted:
        assert (rows + 1) * capacity * token > free // SHARE


def test_free_bytes_of_this_machine():
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_short_memory_changes_no_answer(tiny_model, monkeypatch):
    engine = Engine(load(tiny_model("llama")))
    prompts = [[5, 6, 7 + i] for i in range(6)]
    decoding = Decoding(8, (2,), batch_size=128)
    sizes: list[int] = []
    make = Engine._batch

    def watched(self, decoding, slots, capacity, prefix):
        sizes.append(slots)
        return make(self, decoding, slots, capacity, prefix)

    monkeypatch.setattr(Engine, "_batch", watched)
    plenty = engine.generate(prompts, decoding)
    with torch.no_grad():
        token = token_bytes(engine.body.core, "cpu")
    row = token * 9  # one token behind the shared prefix and eight new ones
    monkeypatch.setattr(engines, "free_bytes", lambda device: 2 * SHARE * row)
    assert engine.generate(prompts, decoding) == plenty
    assert sizes == [6, 2]


def test_memory_of_other_devices(monkeypatch):
    free = psutil.virtual_memory()._replace(available=10**12)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    for name, value in (("memory_reserved", 500), ("memory_allocated", 200), ("mem_get_info", (1000, 9999))):
        monkeypatch.setattr(torch.xpu, name, lambda device, value=value: value)
    assert free_bytes(torch.device("xpu")) == 1300
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1000)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 400)
    assert free_bytes(torch.device("mps")) == 600
