"""Choosing tokens against transformers' own processors and warpers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import tell.decode.sampler as module
from tell.decode.sampler import Decoding, choose, uniforms


def probabilities(logits: torch.Tensor, seen: torch.Tensor, rule: Decoding) -> torch.Tensor:
    """(n, V) in transformers' order: penalty, temperature, top-k, top-p."""
    rows = []
    for scores, flags in zip(logits.clone(), seen, strict=True):
        ids, scores = flags.nonzero()[:, 0][None], scores[None]
        if ids.numel():
            scores = RepetitionPenaltyLogitsProcessor(rule.repetition_penalty)(ids, scores)
        scores = TemperatureLogitsWarper(rule.temperature)(ids, scores)
        if rule.top_k:
            scores = TopKLogitsWarper(rule.top_k)(ids, scores)
        if rule.top_p < 1:
            scores = TopPLogitsWarper(rule.top_p)(ids, scores)
        rows.append(scores.softmax(dim=-1))
    return torch.cat(rows)


@settings(max_examples=120)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([2, 7, 60, 700]),
    temperature=st.sampled_from([0.05, 0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 20, 1000]),
    top_p=st.sampled_from([0.01, 0.3, 0.7, 0.95, 1.0]),
    penalty=st.sampled_from([1.0, 1.05, 2.0, 0.7]),
    wide=st.sampled_from([1, 8, 512]),
)
def test_a_token_is_drawn_as_often_as_its_probability(seed, vocabulary, temperature, top_k, top_p, penalty, wide):
    """Draws on a fine grid meet every token its probability's share of times, and no other token ever."""
    grid = 4000
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocabulary, generator=generator) * 3
    seen = torch.rand(1, vocabulary, generator=generator) < 0.3
    rule = Decoding(1, (), temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    expected = probabilities(logits, seen, rule)[0]
    draws = (torch.arange(grid) + 0.5) / grid
    old, module.WIDE = module.WIDE, wide
    try:
        chosen = choose(logits.repeat(grid, 1), seen.repeat(grid, 1), draws, rule)
    finally:
        module.WIDE = old
    share = torch.bincount(chosen, minlength=vocabulary) / grid
    # a token at the very edge of the nucleus may fall on either side by rounding
    assert (share - expected).abs().max() <= 2 / grid + 1e-3
    assert share[expected == 0].sum() <= 2 / grid + 1e-3


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("top_k", [0, 4, 20])
def test_extreme_draws_stay_among_the_candidates(draw, top_k):
    """0.99999999 is 1.0 in float32: it must take the last candidate left, not one that top-p threw out."""
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.05, 0.3, 0.05]]))
    rule = Decoding(1, (), temperature=1.0, top_k=top_k, top_p=0.7, repetition_penalty=1.0)
    token = int(choose(logits, torch.zeros(1, 5, dtype=torch.bool), torch.tensor([draw]), rule))
    assert token == (3 if draw > 0.625 else 1)


@given(seed=st.integers(0, 999), penalty=st.sampled_from([1.0, 1.3]))
def test_greedy_takes_the_best_after_the_penalty(seed, penalty):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 30, generator=generator)
    seen = torch.rand(4, 30, generator=generator) < 0.5
    rule = Decoding(1, (), greedy=True, repetition_penalty=penalty, temperature=1.0, top_k=0, top_p=1.0)
    expected = probabilities(logits, seen, rule).argmax(dim=-1)
    assert torch.equal(choose(logits.clone(), seen, torch.zeros(4), rule), expected)


def test_banned_tokens_have_no_chance():
    logits = torch.zeros(200, 5)
    rule = Decoding(1, (), temperature=1.0, top_k=0, top_p=1.0, banned_ids=(0, 4))
    draws = torch.linspace(0, 1, 200)
    chosen = choose(logits, torch.zeros(200, 5, dtype=torch.bool), draws, rule)
    assert set(chosen.tolist()) == {1, 2, 3}


def test_numbers_of_a_row():
    """The same for a row whatever is decoded beside it and however long; others for another row or seed."""
    assert np.array_equal(uniforms(5, 2, 10), uniforms(5, 2, 40)[:10])
    assert not np.array_equal(uniforms(5, 2, 10), uniforms(5, 3, 10))
    assert not np.array_equal(uniforms(5, 2, 10), uniforms(6, 2, 10))
    numbers = uniforms(5, 2, 2000)
    assert numbers.min() >= 0 and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.03
