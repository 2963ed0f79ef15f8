"""A batch over a static cache decodes what the others decode, by steps that are recorded once and repeated."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tiny
from decode.static import Operations, static_engine
from decode.test_engine import answers, prompts_of, reference
from tell.decode import static_batch
from tell.decode.engine import Engine
from tell.decode.sampler import Decoding
from train.packed import load


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch):
    """Small sizes, so that a few rows and tokens pass several of them."""
    monkeypatch.setattr(static_batch, "SHORTEST", 8)
    monkeypatch.setattr(static_batch, "ROWS", (1, 2, 4))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_equals_transformers(family, tiny_model):
    """Rows end at different times, and beyond the sliding window of 32; new ones take their places."""
    plain = load(tiny_model(family))
    engine, tape = static_engine(load(tiny_model(family)))
    for prefix in (0, 13, 40):
        prompts = prompts_of((3, 45, 20, 1, 33, 7, 2), prefix=prefix)
        free = Decoding(22, (), greedy=True, repetition_penalty=1.05)
        written = answers(engine, prompts, free)
        stops = (written[0][0][5], written[1][0][20], written[2][0][0])
        decoding = dataclasses.replace(free, stop_ids=stops)
        expected = reference(plain, prompts, decoding)
        assert answers(engine, prompts, decoding, batch_size=3) == expected
    assert engine.trusted is True and tape.repeats > 5 * tape.records > 0
