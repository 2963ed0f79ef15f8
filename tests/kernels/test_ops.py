"""Each kernel against the torch operations it replaces, in both number formats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tell.kernels.library import reason
from tell.kernels.ops import GELU_TANH, SILU, kernels_for
from tell.kernels.packed_attention import row_attention
from tell.train.attention import PackedPlan
from tell.train.fast.fused_ops import Attention, AttentionCall, Gated, GatedProjection, Projection, RmsNorm, joined
from tell.train.fast.stacked import Lora, Stack

pytestmark = pytest.mark.skipif(kernels_for(torch.zeros(1)) is None, reason=f"no kernels: {reason()}")
DTYPES = [torch.float32, torch.bfloat16]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a few roundings of the actual's format, measured against the largest value."""
    eps = 2e-5 if actual.dtype == torch.float32 else 2e-2
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= eps * expected.double().abs().max().clamp(min=1e-3)


def leaf(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gradients(out: torch.Tensor, inputs: list[torch.Tensor], seed: int = 9) -> list[torch.Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return list(torch.autograd.grad((out.double() * weight).sum(), inputs))


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(dtype, heads, offset):
    x, weight = leaf(7, heads * 48, dtype=dtype), leaf(48, dtype=dtype, seed=1).detach()
    out = RmsNorm.apply(x, weight, 1e-5, offset)
    (xd,) = double(x)
    parts = xd.view(7, heads, 48)
    expected = parts * (parts.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * (offset + weight.double())
    close(out, expected.reshape(7, -1))
    close(gradients(out, [x])[0], gradients(expected.reshape(7, -1), [xd])[0])


def test_norm_of_columns_of_a_wider_tensor():
    wide = torch.randn(5, 200)
    weight = torch.randn(64)
    view = wide[:, 72:136]
    torch.testing.assert_close(
        RmsNorm.apply(view, weight, 1e-6, 0.0), RmsNorm.apply(view.contiguous(), weight, 1e-6, 0.0)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "act"),
    [(SILU, torch.nn.functional.silu), (GELU_TANH, lambda x: torch.nn.functional.gelu(x, approximate="tanh"))],
)
def test_gated(dtype, kind, act):
    both = (leaf(6, 80, dtype=dtype).detach() * 4).requires_grad_()
    g, u = both.split(40, dim=1)
    out = Gated.apply(g, u, kind)
    (bd,) = double(both)
    gd, ud = bd.split(40, dim=1)
    close(out, act(gd) * ud)
    close(gradients(out, [both])[0], gradients(act(gd) * ud, [bd])[0])


@pytest.mark.parametrize("kind", [SILU, GELU_TANH])
def test_gate_far_from_zero_stays_finite(kind):
    g = torch.tensor([[-1e4, -100.0, -30.0, 30.0, 100.0, 1e4]], requires_grad=True)
    out = Gated.apply(g, torch.ones(1, 6), kind)
    assert torch.isfinite(out).all() and torch.isfinite(gradients(out, [g])[0]).all()
    torch.testing.assert_close(out[0, 3:], g[0, 3:].detach())
    assert out[0, :3].abs().max() < 1e-6


def _reference_attention(q, k, v, cosine, sine, lengths, prefix, heads, kv, scaling, window):
    """Row by row: prefix and own tokens through plain softmax attention."""
    width = q.shape[1] // heads

    def turn(x, count):
        x = x.view(len(x), count, width)
        rot = cosine.shape[1]
        head, tail = x[..., :rot], x[..., rot:]
        a, b = head.chunk(2, dim=-1)
        return torch.cat([head * cosine[:, None] + torch.cat([-b, a], -1) * sine[:, None], tail], -1)

    q, k, v = turn(q, heads), turn(k, kv), v.view(len(v), kv, width)
    spans, at = ([list(range(prefix))] if prefix else []), prefix
    for n in lengths:
        spans.append([*range(prefix), *range(at, at + n)])
        at += n
    out = torch.zeros_like(q)
    for number, span in enumerate(spans):
        n = len(span)
        i = torch.arange(n)
        hidden = (i[None] > i[:, None]) | (i[None] <= i[:, None] - (window or n))
        for h in range(heads):
            scores = (q[span, h] * scaling) @ k[span, h // (heads // kv)].T
            rows = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[span, h // (heads // kv)]
            keep = 0 if prefix and number == 0 else prefix
            out[span[keep:], h] = rows[keep:]
    return out.reshape(len(q), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("prefix", [0, 6])
@pytest.mark.parametrize("rot", [8, 16])
def test_attention(dtype, window, prefix, rot):
    heads, kv, width, lengths = 4, 2, 16, (9, 1, 8, 5)
    total = prefix + sum(lengths)
    q, k, v = (
        leaf(total, heads * width, dtype=dtype),
        leaf(total, kv * width, dtype=dtype, seed=1),
        leaf(total, kv * width, dtype=dtype, seed=2),
    )
    plan = PackedPlan(lengths, prefix=prefix)
    angle = plan.positions()[0][:, None] * torch.rand(rot // 2, generator=torch.Generator().manual_seed(3))
    angle = torch.cat([angle, angle], dim=1)
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    out = Attention.apply(q, k, v, AttentionCall(plan, cosine, sine, heads, kv, 0.3, window))
    qd, kd, vd = double(q, k, v)
    expected = _reference_attention(qd, kd, vd, cosine.double(), sine.double(), lengths, prefix, heads, kv, 0.3, window)
    close(out, expected)
    for actual, wanted in zip(gradients(out, [q, k, v]), gradients(expected, [qd, kd, vd]), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float32, 2e-6)])  # several roundings
@pytest.mark.parametrize("by_rows", [True, False])  # and by the library's batched products
@pytest.mark.parametrize(("prefix", "window", "width"), [(0, None, 64), (37, None, 80), (37, 50, 16)])
def test_attention_of_long_rows(prefix, window, width, by_rows, dtype, tolerance, monkeypatch):
    if by_rows and dtype == torch.float32:
        assert row_attention(dtype, width) is not None
    if not by_rows:
        monkeypatch.setattr("tell.train.fast.fused_ops.row_attention", lambda *_: None)
    heads, kv, lengths, scale = 6, 2, (7, 203, 1, 98), width**-0.5
    total = prefix + sum(lengths)
    whole = leaf(total, (heads + 2 * kv) * width, dtype=dtype)
    parts = whole.split([heads * width, kv * width, kv * width], dim=1)
    plan = PackedPlan(lengths, prefix=prefix)
    angle = plan.positions()[0][:, None] * torch.rand(8, generator=torch.Generator().manual_seed(3))
    angle = torch.cat([angle, angle], dim=1).to(dtype)
    cosine, sine = angle.cos(), angle.sin()
    out = Attention.apply(*parts, AttentionCall(plan, cosine, sine, heads, kv, scale, window))
    (exact,) = double(whole)
    qd, kd, vd = exact.split([heads * width, kv * width, kv * width], dim=1)
    expected = _reference_attention(
        qd, kd, vd, cosine.double(), sine.double(), lengths, prefix, heads, kv, scale, window
    )
    found = gradients(out, parts)
    pairs = zip([out, *found], [expected, *gradients(expected, [qd, kd, vd])], strict=True)
    again = Attention.apply(*parts, AttentionCall(plan, cosine, sine, heads, kv, scale, window))
    for one, two in zip(found, gradients(again, parts), strict=True):
        assert torch.equal(one, two)
    for actual, wanted in pairs:
        assert (actual.double() - wanted).norm() < tolerance * wanted.norm()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(0, 12))
def test_positions_and_slots_of_any_plan(lengths, prefix):
    plan = PackedPlan(lengths, prefix=prefix)
    expected = [*range(prefix), *(prefix + i for n in lengths for i in range(n))]
    assert plan.positions()[0].tolist() == expected
    index, inverse, holes = plan.indices
    assert torch.equal(index[inverse], torch.arange(plan.total))
    assert len(index) == plan.total + (0 if holes is None else len(holes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_of_three_layers_two_adapted(dtype):
    widths, scales, rank = (12, 6, 10), (2.0, None, 0.5), 3
    x, weight, bias = leaf(2, 5, 16, dtype=dtype), leaf(28, 16, dtype=dtype, seed=1).detach(), torch.randn(28).to(dtype)
    a1, b1, a2, b2 = (
        leaf(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(rank, 16), (12, rank), (rank, 16), (10, rank)])
    )
    parts = Projection.apply(x, Stack(weight, bias, widths, scales, 0.0), a1, b1, a2, b2)
    assert [p.shape for p in parts] == [(2, 5, n) for n in widths]
    leaves = double(x, a1, b1, a2, b2)
    xd, a1d, b1d, a2d, b2d = leaves
    expected = xd @ weight.double().T + bias.double()
    delta = torch.cat([2.0 * xd @ a1d.T @ b1d.T, torch.zeros(2, 5, 6), 0.5 * xd @ a2d.T @ b2d.T], -1)
    close(torch.cat(parts, -1), expected + delta)
    got = gradients(torch.cat(parts, -1), [x, a1, b1, a2, b2])
    for actual, wanted in zip(got, gradients(expected + delta, leaves), strict=True):
        close(actual.to(dtype), wanted)  # adapters' gradients are products in the model's format, kept in fp32
    assert all(g.dtype == torch.float32 for g in got[1:])


@pytest.mark.parametrize("widths", [(12, 6, 10), (28,)])
def test_many_rows_meet_weights_with_their_adapters_folded_in(widths, monkeypatch):
    """As many rows as inputs, in fp32: one product a way; the same numbers as with the adapter beside the weight."""
    scales = (2.0, None, 0.5) if len(widths) > 1 else (2.0,)
    adapted = [width for width, scale in zip(widths, scales, strict=True) if scale]
    shapes = [shape for width in adapted for shape in ((4, 16), (width, 4))]
    leaves = [leaf(20, 16, dtype=torch.float32), *(leaf(*s, dtype=torch.float32, seed=i) for i, s in enumerate(shapes))]
    stack = Stack(leaf(28, 16, dtype=torch.float32, seed=9).detach(), torch.randn(28), widths, scales, 0.0)
    folds = []
    original = Lora.folded
    monkeypatch.setattr(Lora, "folded", lambda self, *args: folds.append(self) or original(self, *args))
    whole = torch.cat(Projection.apply(leaves[0], stack, *leaves[1:]), -1)
    found = [whole, *gradients(whole, leaves)]
    assert len(folds) == 2
    monkeypatch.setattr(Lora, "__init__", unfolded(Lora.__init__))
    apart = torch.cat(Projection.apply(leaves[0], stack, *leaves[1:]), -1)
    for actual, expected in zip(found, [apart, *gradients(apart, leaves)], strict=True):
        close(actual, expected)
    assert len(folds) == 2


def unfolded(init):
    def without(self, *args):
        init(self, *args)
        self.folds = False

    return without


def check_gated_projection(dtype, dropout):
    """Recomputing the gated product on the way back changes nothing, dropout's mask included."""
    g, u = leaf(9, 24, dtype=dtype), leaf(9, 24, dtype=dtype, seed=1)
    weight = leaf(10, 24, dtype=dtype, seed=2).detach()
    a, b = leaf(3, 24, dtype=torch.float32, seed=3), leaf(10, 3, dtype=torch.float32, seed=4)
    stack = Stack(weight, None, (10,), (2.0,), dropout)
    torch.manual_seed(5)
    whole = GatedProjection.apply(g, u, SILU, stack, a, b)
    torch.manual_seed(5)
    (parts,) = Projection.apply(Gated.apply(g, u, SILU), stack, a, b)
    assert torch.equal(whole, parts)
    for actual, wanted in zip(gradients(whole, [g, u, a, b]), gradients(parts, [g, u, a, b]), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gated_projection_equals_its_parts(dtype, dropout):
    check_gated_projection(dtype, dropout)


def test_projection_draws_a_mask_for_each_layer_and_keeps_it_for_the_way_back():
    torch.manual_seed(0)
    x = torch.ones(400, 8, requires_grad=True)
    weight = torch.zeros(16, 8)
    a, b = (torch.eye(8).requires_grad_() for _ in range(2))
    c, d = (torch.eye(8).requires_grad_() for _ in range(2))
    first, second = Projection.apply(
        x, Stack(weight, None, (8, 8), (1.0, 1.0), 0.25), a, b, c, d
    )  # each output shows its mask
    # each output shows its mask
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert not torch.equal(first, second)
    (gx,) = torch.autograd.grad(first.sum() + 10 * second.sum(), [x])
    torch.testing.assert_close(gx, first.detach() + 10 * second.detach())  # the same masks, scaled alike


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_learn_from_the_inputs_they_were_given(dtype):
    """With identities for A and B and ones for inputs, gradients of A and B add up what dropout let through."""
    torch.manual_seed(0)
    n, adapters = 32, [torch.eye(32).requires_grad_() for _ in range(4)]
    stack = Stack(torch.zeros(2 * n, n, dtype=dtype), None, (n, n), (1.0, 1.0), 0.25)
    outs = Projection.apply(torch.ones(50, n, dtype=dtype), stack, *adapters)
    grads = torch.autograd.grad(outs[0].sum() + outs[1].sum(), adapters)
    for out, a, b in zip(outs, grads[0::2], grads[1::2], strict=True):
        let_through = out.detach().double().sum(dim=0)  # each output shows its mask
        assert len(let_through.unique()) > 3
        close(a.to(dtype), let_through.expand(n, n))
        close(b.to(dtype), let_through.expand(n, n))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_is_bernoulli(p):
    """Share, neighbours, and two seeds: no more alike than independent draws (5 standard errors)."""
    n = 1 << 20
    kernels, x = kernels_for(torch.zeros(1)), torch.ones(1 << 20)
    masks = []
    for seed in (1, 2):
        y = torch.empty(n)
        kernels.dropout(x, y, p, seed)
        assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
        masks.append((y == 0).double())
    for pair in (
        masks[0],
        masks[1],
        masks[0] * masks[1],
        masks[0][1:] * masks[0][:-1],
        masks[0][576:] * masks[0][:-576],
    ):
        expected = p if pair is masks[0] or pair is masks[1] else p * p
        assert abs(float(pair.mean()) - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    logits = leaf(9, 1000, dtype=dtype)
    targets, weights = torch.randint(1000, (9,)), torch.rand(9)
    nll, work = torch.empty(9), logits.detach().clone()
    kernels_for(work).cross_entropy(work, targets, weights, nll)
    (ld,) = double(logits)
    expected = torch.nn.functional.cross_entropy(ld, targets, reduction="none")
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    close(work, torch.autograd.grad((expected * weights).sum(), [ld])[0])
    again = logits.detach().clone()
    kernels_for(again).cross_entropy(again, targets, None, nll)
    assert torch.equal(again, logits.detach())


def test_nan_is_not_hidden():
    logits = torch.randn(2, 64)
    logits[1, 7] = math.nan
    nll = torch.empty(2)
    kernels_for(logits).cross_entropy(logits, torch.tensor([1, 2]), torch.ones(2), nll)
    assert math.isfinite(nll[0]) and math.isnan(nll[1])


def test_joined_copies_only_when_it_must():
    whole = torch.randn(4, 9)
    parts = whole.split([2, 3, 4], dim=1)
    assert joined(parts).data_ptr() == whole.data_ptr() and torch.equal(joined(parts), whole)
    other = [parts[0], parts[1].clone(), parts[2]]
    assert joined(other).data_ptr() != whole.data_ptr() and torch.equal(joined(other), whole)
