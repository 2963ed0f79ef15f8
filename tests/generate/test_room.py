"""Rows decoded at once stay within a share of the free memory."""

from __future__ import annotations

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, GPT2Config

import tiny
from tell.generate import engine as engines
from tell.generate.cache import Store
from tell.generate.engine import Engine
from tell.generate.room import SHARE, free_bytes, rows_that_fit, token_bytes
from tell.generate.sampler import Decoding
from tell.train.attention import PackedPlan, use_plan
from tell.train.step import Body
from train.packed import load


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_token_takes_what_the_cache_stores(family, tiny_model):
    model = load(tiny_model(family))
    body, store = Body(model), Store(1, 1)

    class Plan(PackedPlan):
        def attend(self, layer, query, key, value, rule):
            store.slot_tensors(layer, key, value)
            return super().attend(layer, query, key, value, rule)

    plan = Plan([3])
    with torch.no_grad(), use_plan(plan):
        body.core(input_ids=torch.tensor([[1, 2, 3]]), position_ids=plan.positions(), use_cache=False)
    stored = sum(x.numel() * x.element_size() for pair in store.own.values() for x in pair)
    assert token_bytes(AutoConfig.from_pretrained(tiny_model(family)).get_text_config(), 4) == stored


def test_heads_of_older_configurations():
    assert token_bytes(GPT2Config(n_layer=3, n_head=4, n_embd=64), 2) == 2 * 3 * 64 * 2


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
    row = token_bytes(engine.config, 4) * 9  # one token behind the shared prefix and eight new ones
    monkeypatch.setattr(engines, "free_bytes", lambda device: 2 * SHARE * row)
    assert engine.generate(prompts, decoding) == plenty
    assert sizes == [6, 2]
