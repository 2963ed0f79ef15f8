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
from tell.train import packing as batches
from tell.train.attention import PackedPlan, Rule
from tell.train.fast import cuda
from tell.train.fast.cuda import Sequences, VarlenPlan, _torch_varlen, find_varlen, liger_forwards, packed_plan
from tell.train.fast.fused import fuse_modules, unfuse_modules
from tell.train.lora import add_lora
from tell.train.loss import BLOCK, GPU_LOGITS, block_size
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.step import Body, StepRules, row_losses, step_loss
from train.packed import Fetches, assert_close, gradients, load, make_rows, make_table, wake

CONFIG = TrainConfig(lora_dropout=0.0, lora_r=4)
LENGTHS = (70, 41, 41, 40, 12, 2)


def reference_varlen(query, key, value, sequences, scale, left):
    """Variable-length attention by its definition, one sequence at a time; the signature of ``Varlen``."""
    cu_seqlens_q, cu_seqlens_k, max_q, max_k = sequences
    for ends, x in ((cu_seqlens_q, query), (cu_seqlens_k, key)):
        assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(x)
    assert max_q == cu_seqlens_q.diff().max() and max_k == cu_seqlens_k.diff().max()
    group, out = query.shape[1] // key.shape[1], []
    for q, k, v in zip(
        query.tensor_split(cu_seqlens_q[1:-1].long()),
        *(x.tensor_split(cu_seqlens_k[1:-1].long()) for x in (key, value)),
        strict=True,
    ):
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        at = torch.arange(len(q))[:, None] + len(k) - len(q)  # the last query stands at the last key
        keys = torch.arange(len(k))[None]
        hidden = keys > at
        if left >= 0:
            hidden |= keys < at - left
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v))
    return torch.cat(out)


def unseen_varlen(*args):
    """The reference looks at its indices, which flash attention leaves on the device."""
    Fetches.paused = True
    try:
        return reference_varlen(*args)
    finally:
        Fetches.paused = False


def varlen_plan(lengths, *, prefix=0, device="cpu"):
    return VarlenPlan(lengths, prefix=prefix, device=device, find=lambda q, v: unseen_varlen)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    prefix=st.integers(0, 12),
    window=st.none() | st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    seed=st.integers(0, 99),
)
def test_sequences_attend_as_blocks_do(lengths, prefix, window, heads, seed):
    """Forward and all gradients of both plans."""
    generator = torch.Generator().manual_seed(seed)
    total, rule, results = prefix + sum(lengths), Rule(0.3, window, None), []
    tensors = [torch.randn(1, n, total, 8, generator=generator) for n in (heads[0], heads[1], heads[1])]
    slope = torch.randn(1, total, heads[0], 8, generator=generator)
    for plan in (varlen_plan(lengths, prefix=prefix), PackedPlan(lengths, prefix=prefix)):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = plan.attend(None, *leaves, rule)
        results.append([out, *torch.autograd.grad(out, leaves, slope)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_keys_of_a_row_are_the_prefix_and_its_own():
    plan = VarlenPlan([3, 1], prefix=2, device="cpu")
    ends_q, ends_k, *longest = plan.sequences
    assert ends_q.tolist() == [0, 2, 5, 6] and ends_k.tolist() == [0, 2, 7, 10]
    assert plan.key_index.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5]
    assert longest == [3, 5]
    alone = VarlenPlan([3, 1], device="cpu")
    assert alone.key_index is None and alone.sequences.ends_q.tolist() == alone.sequences.ends_k.tolist() == [0, 3, 4]


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


@pytest.mark.skipif(_torch_varlen() is None, reason="this torch has no varlen_attn with windows")
def test_torch_takes_our_arguments():
    """Shapes and schema of torch's own function, by its rule for tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(9, 4, 8, dtype=torch.bfloat16), torch.empty(13, 2, 8, dtype=torch.bfloat16)
        ends = torch.empty(3, dtype=torch.int32)
        for left in (-1, 6):
            out = _torch_varlen()(q, k, k, Sequences(ends, ends, 5, 7), 0.3, left)
            assert out.shape == q.shape and out.dtype == q.dtype


@pytest.mark.parametrize("flagged", [True, False])
def test_grouped_heads_need_no_flag(flagged, monkeypatch):
    """torch 2.11 takes grouped heads without being told; from 2.12 on it wants ``enable_gqa``."""
    seen = []

    def old(query, key, value, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        seen.append((scale, window_size))
        return query

    def new(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        seen.append((scale, window_size, enable_gqa))
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new if flagged else old)
    q, k, ends = torch.ones(3, 4, 8), torch.ones(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    _torch_varlen.__wrapped__()(q, k, k, Sequences(ends, ends, 3, 3), 0.5, 6)
    assert seen == [(0.5, (6, 0), True) if flagged else (0.5, (6, 0))]


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
@pytest.mark.parametrize("prefix", [0, 9])
def test_a_step_over_sequences_equals_a_plain_one(family, prefix, tiny_model, monkeypatch):
    """Loss, gradients and norm of several passes; on the way nothing is fetched from the device."""
    rows = make_rows([n + prefix for n in LENGTHS], prefix=prefix, task=(0, 3))
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
    assert block_size(torch.device("cpu"), 49152) == BLOCK
    assert (
        block_size(torch.device("cuda"), 49152) * 49152
        <= GPU_LOGITS
        < (block_size(torch.device("cuda"), 49152) + 1) * 49152
    )
    assert block_size(torch.device("cuda"), 1 << 24) == BLOCK


def test_row_losses_of_no_rows(tiny_model):
    table = make_table(make_rows((5, 6)), "general")
    assert row_losses(load(tiny_model("llama")), table, []).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_on_a_gpu(family, tiny_model):
    """bf16 on a GPU, flash attention and Liger where they are, against fp32 on the processor."""
    rows = make_rows(LENGTHS, task=(0, 3))
    out = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        model = add_lora(load(tiny_model(family), dtype=dtype).to(device), CONFIG, seed=1)
        wake(model)
        body = Body(model)
        if device == "cuda" and liger_forwards() and family != "gemma2":
            assert fuse_modules(model.get_base_model())["mlp"]
        out.append(step_loss(body, rows, StepRules("example", micro_tokens=90)))
    assert out[0].loss == pytest.approx(out[1].loss, rel=0.02)
    assert np.allclose(np.sort(out[0].rows), np.sort(out[1].rows), rtol=0.05)
