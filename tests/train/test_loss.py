"""Blocked cross-entropy against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tell.train.loss as module
from tell.train.loss import blocked_cross_entropy
from tell.train.step import StepRules


@settings(max_examples=40)
@given(
    n=st.integers(1, 40),
    block=st.integers(1, 50),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_cross_entropy(n, block, softcap, biased, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    hidden, head, bias = normal(n, 16), normal(50, 16), normal(50) if biased else None
    targets = torch.randint(50, (n,), generator=generator)
    weights = torch.rand(n, generator=generator)
    a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    old, module.LOSS_ROWS = module.LOSS_ROWS, block
    try:
        loss, nll = blocked_cross_entropy(a, head, targets, weights, softcap, bias)
    finally:
        module.LOSS_ROWS = old
    (loss * 3).backward()
    logits = torch.nn.functional.linear(b, head, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    single = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (3 * (single * weights).sum()).backward()
    torch.testing.assert_close(nll, single.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, (single * weights).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert not nll.requires_grad


def test_without_gradient():
    hidden, head = torch.randn(3, 4), torch.randn(5, 4)
    loss, nll = blocked_cross_entropy(hidden, head, torch.tensor([0, 4, 2]), torch.ones(3))
    assert not loss.requires_grad and loss == pytest.approx(float(nll.sum()))


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    weight=st.sampled_from([0.5, 1.0, 4.0]),
    data=st.data(),
)
def test_weights_sum_to_one(counts, weight, data):
    """Each row has the same say under ``example``, each token under ``token``; task rows ``weight`` times that."""
    flags = [data.draw(st.booleans()) for _ in counts]
    row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    trained, task = torch.tensor(counts), torch.tensor(flags)
    say = [weight if flag else 1.0 for flag in flags]
    for normalization, amounts in (("example", say), ("token", [s * n for s, n in zip(say, counts, strict=True)])):
        total = torch.tensor(sum(amounts))
        got = StepRules(normalization, weight).position_weights(trained[row], task[row], total)
        by_row = torch.zeros(len(counts)).index_add_(0, row, got)
        torch.testing.assert_close(by_row, torch.tensor(amounts) / total, rtol=1e-5, atol=1e-6)
