"""What can be tested of training on a GPU without one: indices, arguments, a step over a reference attention."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tell.config_sections import TrainConfig
from tell.kernels.ops import kernels_for, why_none
from tell.train import packing as batches
from tell.train.attention import PackedPlan, Rule
from tell.train.fast import cuda
from tell.train.fast.cuda import Sequences, VarlenPlan, _torch_varlen, find_varlen, packed_plan
from tell.train.fast.fused import fuse_modules, unfuse_modules
from tell.train.lora import add_lora
from tell.train.loss import GPU_LOGITS, LOSS_ROWS, block_size
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.row_losses import row_losses
from tell.train.step import Body, StepRules, step_loss
from train.packed import (
    Fetches,
    assert_close,
    gradients,
    load,
    make_rows,
    make_table,
    reference_varlen,
    varlen_plan,
    wake,
)

CONFIG = TrainConfig(lora_dropout=0.0, lora_r=4)
LENGTHS = (70, 41, 41, 40, 12, 2)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    prefix=st.integers(0, 12),
    window=st.none() | st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    parts=st.none() | st.lists(st.floats(0, 1), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_sequences_attend_as_blocks_do(lengths, prefix, window, heads, parts, seed):
    """Forward and all gradients of both plans, where all rows or some have the prefix or a part of it."""
    generator = torch.Generator().manual_seed(seed)
    total, rule, results = prefix + sum(lengths), Rule(0.3, window, None), []
    ahead = None if parts is None else [round(part * prefix) for part in parts[: len(lengths)]]
    tensors = [torch.randn(1, n, total, 8, generator=generator) for n in (heads[0], heads[1], heads[1])]
    slope = torch.randn(1, total, heads[0], 8, generator=generator)
    for plan in (varlen_plan(lengths, prefix=prefix, ahead=ahead), PackedPlan(lengths, prefix=prefix, ahead=ahead)):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = plan.attend(None, *leaves, rule)
        results.append([out, *torch.autograd.grad(out, leaves, slope)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_keys_of_a_row_are_the_prefix_and_its_own():
    positions, (ends_q, ends_k, *longest), copies = VarlenPlan([3, 1], prefix=2, device="cpu").layout
    assert positions.tolist() == [0, 1, 2, 3, 4, 2]
    assert ends_q.tolist() == [0, 2, 5, 6] and ends_k.tolist() == [0, 2, 7, 10]
    assert copies.token.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5]
    assert copies.keys.tolist() == [0, 2, 7, 1, 3, 8, 4, 5, 6, 9] and copies.starts.tolist() == [0, 3, 6, 7, 8, 9]
    assert longest == [3, 5]
    positions, (ends_q, ends_k, *longest), copies = VarlenPlan([3, 1], device="cpu").layout
    assert copies is None and ends_q is ends_k and ends_q.tolist() == [0, 3, 4] and longest == [3, 3]


def test_a_row_may_have_a_part_of_the_prefix():
    positions, (_, ends_k, *_), copies = VarlenPlan([2, 1, 1], prefix=2, ahead=[0, 2, 1], device="cpu").layout
    assert positions.tolist() == [0, 1, 0, 1, 2, 1] and ends_k.tolist() == [0, 2, 4, 7, 9]
    assert copies.token.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 5]


def test_gradients_of_the_prefix_are_summed_in_fp32():
    """In bf16 a sum over many rows would stop growing at 256."""
    rows = 1000
    plan = VarlenPlan([1] * rows, prefix=1, device="cpu", find=lambda q, v: lambda q, k, v, *_, **__: v[:, :1])
    q, k = (torch.zeros(1, 1, rows + 1, 8, dtype=torch.bfloat16) for _ in range(2))
    v = torch.zeros(1, 1, rows + 1, 8, dtype=torch.bfloat16, requires_grad=True)
    plan.attend(None, q, k, v, Rule(1.0, None, None)).sum().backward()
    assert v.grad[0, 0, 0, 0] == torch.tensor(rows + 1.0).bfloat16() and v.grad[0, 0, 1:].eq(1).all()


def test_what_flash_attention_cannot_serve_is_attended_to_in_blocks():
    def refuse(*_, **__):
        raise AssertionError("asked")

    x = torch.randn(1, 2, 9, 8)
    capped = VarlenPlan([5, 4], device="cpu", find=lambda q, v: refuse).attend(None, x, x, x, Rule(1.0, None, 5.0))
    torch.testing.assert_close(capped, PackedPlan([5, 4]).attend(None, x, x, x, Rule(1.0, None, 5.0)))
    assert find_varlen(x, x) is None  # not on a GPU
    plan = VarlenPlan([5, 4], device="cpu")
    torch.testing.assert_close(
        plan.attend(None, x, x, x, Rule(1.0, None, None)),
        PackedPlan([5, 4]).attend(None, x, x, x, Rule(1.0, None, None)),
    )
    assert type(packed_plan([3])) is PackedPlan


def test_torch_takes_our_arguments():
    """Shapes and schema of torch's own operations, forward and backward, by its rules for tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(9, 4, 8, dtype=torch.bfloat16), torch.empty(13, 2, 8, dtype=torch.bfloat16)
        leaves = [x.requires_grad_() for x in (q, k, k.clone())]
        ends = torch.empty(3, dtype=torch.int32)
        for left in (-1, 6):
            out = _torch_varlen()(*leaves, Sequences(ends, ends, 5, 7), 0.3, left)
            assert out.shape == q.shape and out.dtype == q.dtype
            for x, grad in zip(leaves, torch.autograd.grad(out, leaves, torch.empty_like(out)), strict=True):
                assert grad.shape == x.shape and grad.dtype == x.dtype


@pytest.mark.parametrize("left", [-1, 3])
def test_gradients_of_torchs_operations_go_where_they_belong(left, monkeypatch):
    """Over fakes of both operations, which take what torch 2.6 names otherwise by position alone."""
    sequences = Sequences(*(torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 7], [0, 5, 9])), 4, 5)
    made = torch.tensor([7, 7]), torch.tensor(0)

    def forward(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal, mask, *, scale, **window):
        assert (dropout, causal, mask) == (0.0, left < 0, False)
        assert window == {"window_size_left": left, "window_size_right": 0}
        given = Sequences(ends_q, ends_k, longest_q, longest_k)
        return reference_varlen(q, k, v, given, scale, left), torch.ones(4, len(q)), *made, torch.empty(0)

    def backward(
        grad, q, k, v, out, lse, ends_q, ends_k, longest_q, longest_k, dropout, causal, *rest, scale, **window
    ):
        assert torch.equal(lse, torch.ones(4, len(q))) and all(a is b for a, b in zip(rest, made, strict=True))
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            got, *_ = forward(
                *leaves, ends_q, ends_k, longest_q, longest_k, dropout, causal, False, scale=scale, **window
            )
        assert torch.equal(got, out)
        return torch.autograd.grad(got, leaves, grad)

    aten = SimpleNamespace(
        _flash_attention_forward=SimpleNamespace(default=forward),
        _flash_attention_backward=SimpleNamespace(default=backward),
    )
    attend = _torch_varlen()
    monkeypatch.setattr(cuda.torch.ops, "aten", aten)
    generator = torch.Generator().manual_seed(1)
    shapes = ((7, 4, 8), (9, 2, 8), (9, 2, 8))
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    slope = torch.randn(7, 4, 8, generator=generator)
    results = [
        [out.detach(), *torch.autograd.grad(out, leaves, slope)]
        for out in (f(*leaves, sequences, 0.4, left) for f in (attend, reference_varlen))
    ]
    monkeypatch.undo()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_torch_with_other_operations_is_not_called(monkeypatch):
    schema = SimpleNamespace(arguments=[SimpleNamespace(name="query", kwarg_only=False)])
    operation = SimpleNamespace(overloads=lambda: ["default"], default=SimpleNamespace(_schema=schema))
    monkeypatch.setattr(cuda.torch.ops, "aten", SimpleNamespace(_flash_attention_forward=operation))
    assert _torch_varlen.__wrapped__() is None
    monkeypatch.setattr(cuda.torch.ops, "aten", SimpleNamespace())
    assert _torch_varlen.__wrapped__() is None


def test_the_attention_of_a_run_is_said(tiny_model, monkeypatch):
    model = load(tiny_model("llama"))
    assert cuda.attention_note(model) is None  # on a CPU

    def note(dtype, capable=True, own=None):
        monkeypatch.setattr(cuda, "_capable", lambda index: capable)
        monkeypatch.setattr(cuda, "_own_varlen", lambda: own)
        monkeypatch.setattr(cuda, "_package_varlen", lambda: None)
        weight = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
        return cuda.attention_note(
            SimpleNamespace(config=model.config, get_output_embeddings=lambda: SimpleNamespace(weight=weight))
        )

    assert note(torch.bfloat16, own=reference_varlen) == "attention: flash attention (torch)"
    assert "padded blocks (torch" in note(torch.bfloat16)
    assert note(torch.float32, own=reference_varlen) == "attention: padded blocks (the weights are float32)"
    assert "older than Ampere" in note(torch.bfloat16, capable=False, own=reference_varlen)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("prefix", "common"), [(0, 0), (9, 9), (19, 9), (19, 0)])
def test_a_step_over_sequences_equals_a_plain_one(family, prefix, common, tiny_model, monkeypatch):
    """Loss, gradients and norm of several passes; on the way nothing is fetched from the device.

    All rows begin with ``common`` tokens, and task rows with ``prefix``.
    """
    rows = make_rows([n + prefix for n in LENGTHS], prefix=prefix, task=(0, 3))
    others = make_rows([n + common for n in LENGTHS], prefix=common, task=(0, 3))
    rows = [row if row.task else other for row, other in zip(rows, others, strict=True)]
    rules = StepRules(task_weight=2.0, micro_tokens=90, share_prefix=True)
    results = []
    for fast in (True, False):
        model = add_lora(load(tiny_model(family)), CONFIG, seed=1, fused=fast)
        wake(model)
        adapters = [p for p in model.parameters() if p.requires_grad]

        def clip(adapters=adapters):
            return torch.nn.utils.clip_grad_norm_(adapters, 0.5)

        if not fast:
            results.append((plain_step_loss(PlainBody(model), rows, rules, clip=clip), gradients(model)))
            continue
        body = Body(model)
        monkeypatch.setattr(batches, "packed_plan", varlen_plan)
        monkeypatch.setattr(batches, "prefix_per_row", lambda device: True)
        unfuse_modules(model.get_base_model())
        with Fetches() as fetches:
            results.append((step_loss(body, rows, rules, clip=clip), gradients(model)))
        assert fetches.names == []
        monkeypatch.undo()
    (ours, our_grads), (theirs, their_grads) = results
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5) and ours.norm == pytest.approx(theirs.norm, rel=1e-4)
    assert_close(our_grads, their_grads, 1e-4)
    assert float(torch.stack([g.norm() for g in our_grads.values()]).norm()) == pytest.approx(
        min(0.5, ours.norm), rel=1e-4
    )


def test_the_counter_sees_a_fetch():
    with Fetches() as fetches:
        float(torch.ones(()) + 1)
    assert fetches.names == ["_local_scalar_dense"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bodies_are_made_in_inference_mode(family, tiny_model):
    """As the decoding engine may do; what was tried and joined there must serve training afterwards."""
    rows = make_rows(LENGTHS)
    results = []
    for inside in (True, False):
        model = load(tiny_model(family))
        if inside:
            with torch.inference_mode():
                row_losses(model, make_table(rows, "general"))
        tuned = add_lora(model, CONFIG, seed=1)
        wake(tuned)
        if inside:
            with torch.inference_mode():
                body = Body(tuned)
        else:
            body = Body(tuned)
        results.append((step_loss(body, rows, StepRules("example")).loss, gradients(tuned)))
    assert results[0][0] == results[1][0]
    assert_close(results[0][1], results[1][1], 1e-6)


def test_blocks_of_logits_are_larger_on_a_gpu():
    assert block_size(torch.device("cpu"), 49152) == LOSS_ROWS
    assert (
        block_size(torch.device("cuda"), 49152) * 49152
        <= GPU_LOGITS
        < (block_size(torch.device("cuda"), 49152) + 1) * 49152
    )
    assert block_size(torch.device("cuda"), 1 << 24) == LOSS_ROWS


def test_row_losses_of_no_rows(tiny_model):
    table = make_table(make_rows((5, 6)), "general")
    assert row_losses(load(tiny_model("llama")), table, []).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_has_kernels(dtype):
    """Compiled and equal to torch's on small tensors, or why not."""
    assert why_none(torch.zeros(1, device="cuda", dtype=dtype)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_on_a_gpu(family, tiny_model):
    """bf16 on a GPU, by flash attention and Triton where they are, against fp32 on the processor."""
    rows = make_rows(LENGTHS, task=(0, 3))
    out = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        model = add_lora(load(tiny_model(family), dtype=dtype).to(device), CONFIG, seed=1)
        wake(model)
        body = Body(model)
        if device == "cuda" and kernels_for(body.head) is not None and family != "gemma2":
            assert fuse_modules(model.get_base_model())["mlp"]
        out.append(step_loss(body, rows, StepRules("example", micro_tokens=90)))
    assert out[0].loss == pytest.approx(out[1].loss, rel=0.02)
    assert np.allclose(np.sort(out[0].rows), np.sort(out[1].rows), rtol=0.05)
