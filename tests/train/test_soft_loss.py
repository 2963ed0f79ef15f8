"""Cross-entropy against distributions: the blocked one against plain torch in fp64, and its zero at the teacher."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tell.train.loss as module
from tell.train.soft_loss import blocked_soft_cross_entropy, capped_logits, soft_cross_entropy, top_distribution

VOCAB, WIDTH = 50, 16


def drawn(n: int, k: int, seed: int, dtype: torch.dtype = torch.float64):
    """(states, head, bias, ids, probs, weights) of n positions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:k] for _ in range(n)])
    probs = torch.softmax(2 * normal(n, k + 1), dim=1)
    return normal(n, WIDTH), normal(VOCAB, WIDTH), normal(VOCAB), ids, probs, normal(n).abs()


def written_out(logits: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """(n,) the definition, position by position: k tokens and one bucket of all others."""
    out = []
    for row, top, goal in zip(torch.softmax(logits, dim=1), ids, probs, strict=True):
        others = torch.ones(len(row), dtype=torch.bool)
        others[top] = False
        out.append(-(goal[:-1] * row[top].log()).sum() - goal[-1] * row[others].sum().log())
    return torch.stack(out)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    k=st.integers(1, VOCAB - 1),
    block=st.integers(1, 30),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_equal_the_definition_in_fp64(n, k, block, softcap, biased, seed):
    hidden, head, bias, ids, probs, weights = drawn(n, k, seed)
    bias = bias if biased else None
    a, b, c = (hidden.clone().requires_grad_() for _ in range(3))
    old, module.LOSS_ROWS = module.LOSS_ROWS, block
    try:
        loss, each = blocked_soft_cross_entropy(a, head, (ids, probs), weights, softcap, bias)
    finally:
        module.LOSS_ROWS = old
    (3 * loss).backward()
    for states, function in ((b, written_out), (c, soft_cross_entropy)):
        logits = torch.nn.functional.linear(states, head, bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        known = function(logits, ids, probs)
        (3 * (known * weights).sum()).backward()
        torch.testing.assert_close(each, known.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.grad, states.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(loss.detach(), (each * weights).sum(), rtol=1e-12, atol=1e-12)
    assert not each.requires_grad


def test_gradcheck():
    hidden, head, bias, ids, probs, weights = drawn(5, 4, 3)
    assert torch.autograd.gradcheck(
        lambda states: blocked_soft_cross_entropy(states, head, (ids, probs), weights, 5.0, bias)[0],
        hidden.requires_grad_(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near(dtype):
    hidden, head, bias, ids, probs, weights = drawn(9, 6, 1)
    exact, low = hidden.clone().requires_grad_(), hidden.to(dtype).requires_grad_()
    loss, _ = blocked_soft_cross_entropy(exact, head, (ids, probs), weights, None, bias)
    rough, each = blocked_soft_cross_entropy(
        low, head.to(dtype), (ids, probs.float()), weights.float(), None, bias.to(dtype)
    )
    loss.backward()
    rough.backward()
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    assert each.dtype == torch.float32 and low.grad.dtype == dtype
    assert float(rough) == pytest.approx(float(loss), rel=tolerance)
    assert (low.grad.double() - exact.grad).norm() < tolerance * exact.grad.norm()


@given(k=st.integers(1, VOCAB - 1), softcap=st.sampled_from([None, 5.0]), seed=st.integers(0, 99))
def test_a_student_equal_to_its_teacher_pays_the_entropy_and_gets_no_gradient(k, softcap, seed):
    hidden, head, bias, _, _, weights = drawn(7, k, seed)
    ids, probs = top_distribution(hidden, head, k, softcap, bias)
    full = torch.softmax(capped_logits(hidden, head, softcap, bias), dim=1)
    torch.testing.assert_close(probs[:, :-1], full.sort(1, descending=True).values[:, :k])
    torch.testing.assert_close(probs.sum(1), torch.ones(7, dtype=torch.float64))
    student = hidden.clone().requires_grad_()
    loss, each = blocked_soft_cross_entropy(student, head, (ids, probs), weights, softcap, bias)
    loss.backward()
    torch.testing.assert_close(each, torch.special.entr(probs).sum(1))
    assert student.grad.abs().max() < 1e-12
    other = (hidden + 0.1 * torch.randn(hidden.shape, dtype=hidden.dtype)).requires_grad_()
    worse, more = blocked_soft_cross_entropy(other, head, (ids, probs), weights, softcap, bias)
    worse.backward()
    assert (more >= each - 1e-12).all() and more.sum() > each.sum() and other.grad.abs().max() > 1e-6


def test_a_certain_teacher_is_the_cross_entropy_of_its_token():
    hidden, head, bias, _, _, weights = drawn(8, 1, 5)
    targets = torch.arange(8)
    sure = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(8, 2)
    _, each = blocked_soft_cross_entropy(hidden, head, (targets[:, None], sure), weights, None, bias)
    logits = torch.nn.functional.linear(hidden, head, bias)
    torch.testing.assert_close(each, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_a_bucket_without_mass_stays_finite():
    """Logits so far apart that the other tokens' probabilities underflow."""
    hidden = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    head = torch.tensor([[1.0], [0.0], [0.0], [-1.0]])
    goal = torch.tensor([[0]] * 2), torch.tensor([[1.0, 0.0], [0.75, 0.25]])
    loss, each = blocked_soft_cross_entropy(hidden, head, goal, torch.ones(2))
    loss.backward()
    assert each.isfinite().all() and hidden.grad.isfinite().all()
    assert float(each[0].detach()) == 0 and hidden.grad[0] == 0
