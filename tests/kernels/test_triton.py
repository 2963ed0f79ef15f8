"""The Triton kernels, interpreted on a CPU: each operation against torch in fp64, and whole models against peft."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import tell.train.loss as loss_module
from kernels.interpreted import in_place_of_c, interpretation
from kernels.test_ops import check_gated_projection, close, double, gradients, leaf
from tell.config_sections import TrainConfig
from tell.kernels import draws, triton_trial
from tell.kernels.draws import device_seed
from tell.kernels.ops import GELU_TANH, SILU, kernels_for, threshold_of, why_none
from tell.kernels.triton_ops import HeadLayout, TritonKernels
from tell.train.fast.fused import fuse_modules, path_notes
from tell.train.fast.fused_ops import Gated, Heads, Projection, RmsNorm
from tell.train.fast.stacked import Stack
from tell.train.lora import add_lora
from tell.train.loss import blocked_cross_entropy
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.step import Body, StepRules, step_loss
from train.packed import assert_close, load, make_rows, wake
from train.packed import gradients as model_gradients
from train.test_cuda import varlen_plan

pytest.importorskip("triton", reason='needs Triton: pip install "tell-llm[test]"')
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIG = TrainConfig(lora_dropout=0.0, lora_r=4)


@pytest.fixture(scope="module")
def interpreted():
    with interpretation() as kernels:
        yield kernels


@pytest.fixture(autouse=True)
def triton_path(interpreted):
    with in_place_of_c(interpreted) as kernels:
        yield kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(1, 576), (3, 7), (2, 1100)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(dtype, heads, width, offset):
    whole, weight = leaf(7, heads * width + 5, dtype=dtype), leaf(width, dtype=dtype, seed=1).detach()
    out = RmsNorm.apply(whole[:, 2 : 2 + heads * width], weight, 1e-5, offset)  # rows are strided
    (exact,) = double(whole)
    expected = F.rms_norm(exact[:, 2 : 2 + heads * width].view(7, heads, width), (width,), eps=1e-5)
    expected = (expected * (offset + weight.double())).view(7, -1)
    close(out, expected)
    close(gradients(out, [whole])[0], gradients(expected, [exact])[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 1500])
@pytest.mark.parametrize(("kind", "act"), [(SILU, F.silu), (GELU_TANH, lambda x: F.gelu(x, approximate="tanh"))])
def test_gated(dtype, width, kind, act):
    both = (leaf(6, 2 * width, dtype=dtype).detach() * 4).requires_grad_()
    out = Gated.apply(*both.split(width, dim=1), kind)
    (exact,) = double(both)
    g, u = exact.split(width, dim=1)
    close(out, act(g) * u)
    close(gradients(out, [both])[0], gradients(act(g) * u, [exact])[0])


@pytest.mark.parametrize("kind", [SILU, GELU_TANH])
def test_gate_far_from_zero_stays_finite(kind):
    g = torch.tensor([[-1e4, -100.0, -30.0, 30.0, 100.0, 1e4]], requires_grad=True)
    out = Gated.apply(g, torch.ones(1, 6), kind)
    assert torch.isfinite(out).all() and torch.isfinite(gradients(out, [g])[0]).all()
    torch.testing.assert_close(out[0, 3:], g[0, 3:].detach())
    assert out[0, :3].abs().max() < 1e-6


def _reference_heads(whole, layout, norms):
    """Queries, keys and values by torch."""
    q, k, v = whole.view(len(whole), -1, layout.width).split([layout.queries, layout.keys, layout.keys], dim=1)
    if norms:
        (qw, kw), offset = norms, layout.offset
        q = F.rms_norm(q, (layout.width,), eps=layout.query_eps) * (offset + qw)
        k = F.rms_norm(k, (layout.width,), eps=layout.key_eps) * (offset + kw)
    if layout.cosine is not None:
        q, k = (_turned(x, layout.cosine.double(), layout.sine.double()) for x in (q, k))
    return q, k, v


def _turned(x, cosine, sine):
    rot = cosine.shape[1]
    a, b = x[..., :rot].chunk(2, dim=-1)
    turned = x[..., :rot] * cosine[:, None] + torch.cat([-b, a], -1) * sine[:, None]
    return torch.cat([turned, x[..., rot:]], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "width"), [(9, 3, 64), (4, 1, 24)])
@pytest.mark.parametrize("share", [None, 0.5, 1.0])  # of a head that is rotated
@pytest.mark.parametrize(("normed", "apart"), [(False, False), (True, False), (True, True)])
def test_heads(dtype, queries, keys, width, share, normed, apart):
    layout = HeadLayout(queries, keys, width)
    if share is not None:
        angle = 5 * torch.rand(5, int(width * share), generator=torch.Generator().manual_seed(3))  # halves differ
        layout = layout._replace(cosine=angle.cos().to(dtype), sine=angle.sin().to(dtype))
    norms = [leaf(width, dtype=dtype, seed=i).detach() for i in (5, 6)] if normed else []
    if normed:
        options = dict(zip(("query_norm", "key_norm"), norms, strict=True))
        layout = layout._replace(**options, query_eps=1e-5, key_eps=0.5, offset=1.0)
    widths = [queries * width, keys * width, keys * width]
    whole = leaf(5, layout.columns, dtype=dtype)
    parts = [part.detach().clone().requires_grad_() for part in whole.split(widths, dim=1)] if apart else [whole]
    out = Heads.apply(layout, *parts)
    assert [x.shape for x in out] == [(5, n, width) for n in (queries, keys, keys)]
    (exact,) = double(whole)
    expected = _reference_heads(exact, layout, [norm.double() for norm in norms])
    for actual, wanted in zip(out, expected, strict=True):
        close(actual, wanted)
    found = gradients(torch.cat([x.flatten(1) for x in out], dim=1), parts)
    wanted = gradients(torch.cat([x.flatten(1) for x in expected], dim=1), [exact])[0]
    close(torch.cat(found, dim=1), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [3, 1000, 5000])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy(dtype, vocabulary, softcap, triton_path):
    logits = (leaf(9, vocabulary, dtype=dtype).detach() * 4).requires_grad_()
    targets, weights = torch.arange(9) * 7 % vocabulary, torch.rand(9)
    nll, work = torch.empty(9), logits.detach().clone()
    triton_path.cross_entropy(work, targets, weights, nll, softcap)
    (exact,) = double(logits)
    seen = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    expected = F.cross_entropy(seen, targets, reduction="none")
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    close(work, torch.autograd.grad((expected * weights).sum(), [exact])[0])
    again = logits.detach().clone()
    triton_path.cross_entropy(again, targets, None, nll, softcap)
    assert torch.equal(again, logits.detach())


def test_nan_is_not_hidden(triton_path):
    logits = torch.randn(2, 5000)
    logits[1, 4777] = torch.nan
    nll = torch.empty(2)
    triton_path.cross_entropy(logits, torch.tensor([1, 2]), torch.ones(2), nll)
    assert torch.isfinite(nll[0]) and torch.isnan(nll[1])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_loss_takes_the_kernel_with_and_without_a_soft_cap(softcap, monkeypatch):
    calls, original = [], TritonKernels.cross_entropy
    monkeypatch.setattr(TritonKernels, "cross_entropy", lambda *args: calls.append(args) or original(*args))
    monkeypatch.setattr(loss_module, "LOSS_ROWS", 4)
    hidden, head, targets = leaf(9, 16, dtype=torch.float32), torch.randn(50, 16), torch.arange(9)
    weights = torch.rand(9)
    loss, nll = blocked_cross_entropy(hidden, head, targets, weights, softcap)
    logits = hidden @ head.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    single = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nll, single.detach())
    close(torch.autograd.grad(loss, hidden)[0], torch.autograd.grad((single * weights).sum(), hidden)[0])
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.05, 0.7])
def test_dropout_keeps_what_the_reference_keeps(dtype, p, triton_path):
    x, y = (leaf(3, 1111, dtype=dtype, seed=i).detach() for i in (0, 1))
    words = triton_trial._mix(triton_trial._mix(torch.arange(x.numel())) + 12345)
    kept = (words >= threshold_of(p)).view_as(x)
    assert abs(float(kept.double().mean()) - 1 + p) < 0.05
    expected = torch.where(kept, x.double() / (1 - p), 0.0)
    out = torch.empty_like(x)
    triton_path.dropout(x, out, p, 12345)
    close(out, expected)
    out = y.clone()
    triton_path.dropout(x, out, p, 12345, add=True)
    close(out, expected + y.double())


def test_the_shift_draws_other_masks_and_is_undone(triton_path):
    """What a captured graph is given anew before each replay: the numbers in one tensor, always at one address."""
    x, shift = torch.ones(500), device_seed(torch.device("cpu"))
    assert shift.tolist() == [0] and device_seed(x.device) is shift
    masks = []
    for value in (0, 17, -5, 0):
        shift.fill_(value)
        masks.append(torch.empty_like(x))
        triton_path.dropout(x, masks[-1], 0.5, 99)
    assert torch.equal(masks[0], masks[3])
    assert all(not torch.equal(masks[0], mask) for mask in masks[1:3])
    moved = torch.empty_like(x)
    triton_path.dropout(x, moved, 0.5, 99 + 17)
    assert torch.equal(moved, masks[1])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_projection_equals_its_parts(dropout, dtype):
    check_gated_projection(dtype, dropout)


def test_masks_of_a_projection_are_those_of_its_way_back():
    torch.manual_seed(0)
    x = torch.ones(40, 8, requires_grad=True)
    adapters = [torch.eye(8).requires_grad_() for _ in range(4)]
    first, second = Projection.apply(x, Stack(torch.zeros(16, 8), None, (8, 8), (1.0, 1.0), 0.25), *adapters)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75]) and not torch.equal(first, second)
    (gx,) = torch.autograd.grad(first.sum() + 10 * second.sum(), [x])
    torch.testing.assert_close(gx, first.detach() + 10 * second.detach())


@pytest.mark.parametrize(
    ("family", "prefix", "lengths"),
    [
        ("llama", 0, (7, 4, 2)),
        ("llama", 3, (7, 5)),
        ("qwen3", 0, (7, 4)),
        ("gemma3", 0, (7, 4)),
        ("phi3", 3, (7, 5)),
        ("gemma2", 0, (7, 4)),
    ],
)
def test_models_train_as_transformers_and_peft_do(family, prefix, lengths, tiny_model, monkeypatch):
    """The path of a GPU over CPU tensors, by variable-length attention; fewer tokens than inputs, so nothing folds."""
    rows, rules = make_rows(lengths, prefix=prefix, task=(0, 2)), StepRules(task_weight=2.0, share_prefix=True)
    results = []
    for fast in (True, False):
        model = add_lora(load(tiny_model(family)), CONFIG, seed=1, fused=fast)
        wake(model)
        if fast:
            body = Body(model)
            layers = model.config.get_text_config().num_hidden_layers
            counts = fuse_modules(model.get_base_model())
            assert counts["attention"] == counts["mlp"] == layers and counts["norm"] > 2 * layers
            monkeypatch.setattr("tell.train.packing.packed_plan", varlen_plan)
        out = step_loss(body, rows, rules) if fast else plain_step_loss(PlainBody(model), rows, rules)
        results.append((out.loss, model_gradients(model)))
    (loss, ours), (expected, theirs) = results
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3", torch.float16), *((x, torch.bfloat16) for x in ("llama", "gemma3", "phi3"))],
)
def test_half_precision_differs_by_rounding_only(family, dtype, tiny_model, monkeypatch):
    rows, grads = make_rows((7, 4, 2)), {}
    for name, form in (("exact", torch.float32), ("fast", dtype), ("plain", dtype)):
        model = add_lora(load(tiny_model(family), dtype=form), CONFIG, seed=1, fused=name == "fast")
        wake(model)
        if name == "fast":
            step_loss(Body(model), rows, StepRules())
        else:
            plain_step_loss(PlainBody(model), rows, StepRules())
        grads[name] = torch.cat([g.double().flatten() for g in model_gradients(model).values()])

    def error(name: str) -> float:
        return float((grads[name] - grads["exact"]).norm() / grads["exact"].norm())

    assert error("fast") < 0.1 and error("fast") < 2 * error("plain")  # of few tokens: either may be lucky


def test_the_trial_passes_and_finds_a_wrong_kernel(interpreted, monkeypatch):
    device = torch.device("cpu")
    assert triton_trial.failures(interpreted, device) == []
    wrong = {("rmsnorm_back", 4): "gradients of norms", ("heads", 1): "rotary positions", ("dropout", 1): "dropout"}
    for (name, output), words in wrong.items():
        original = getattr(TritonKernels, name)

        def spoiled(self, *tensors, original=original, output=output, **options):
            original(self, *tensors, **options)
            tensors[output].mul_(1.01)

        with monkeypatch.context() as patch:
            patch.setattr(TritonKernels, name, spoiled)
            assert set(triton_trial.failures(interpreted, device)) == {words}


@pytest.mark.parametrize("seed", [1, 2**31 - 2, -5])
def test_the_trial_passes_in_a_process_that_drew_a_seed_before(seed, interpreted, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setitem(draws._seeds, device, torch.tensor([seed], dtype=torch.int32))
    monkeypatch.setattr(triton_trial, "_norms", lambda *_: ())
    monkeypatch.setattr(triton_trial, "_gates", lambda *_: ())
    monkeypatch.setattr(triton_trial, "_heads", lambda *_: ())
    assert triton_trial.failures(interpreted, device) == []


def test_a_gpu_whose_triton_fails_has_no_kernels_and_says_why(monkeypatch):
    class CompilationError(Exception):
        pass

    def fail(*_):
        raise CompilationError("at 12:4: no such instruction\nmore")

    found = triton_trial.gpu_kernels.__wrapped__
    monkeypatch.setattr(triton_trial, "failures", fail)
    assert found(torch.device("cpu")) == (None, "CompilationError: at 12:4: no such instruction")
    monkeypatch.setattr(triton_trial, "failures", lambda *_: ["norms"])
    assert found(torch.device("cpu")) == (None, "Triton computes norms wrongly")
    monkeypatch.setattr(triton_trial, "failures", lambda *_: [])
    assert isinstance(found(torch.device("cpu")).kernels, TritonKernels)
    monkeypatch.setitem(sys.modules, "tell.kernels.triton_kernels", None)
    monkeypatch.delattr("tell.kernels.triton_kernels", raising=False)
    assert found(torch.device("cpu")).why == "Triton is not installed"


def test_kernels_of_a_gpu_are_found_by_device_and_format(monkeypatch):
    def weight(dtype=torch.bfloat16):
        return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)

    kernels, found = object(), {}
    monkeypatch.setattr(triton_trial, "gpu_kernels", lambda device: found[device])
    found[torch.device("cuda", 0)] = triton_trial.Found(kernels)
    assert kernels_for(weight()) is kernels and kernels_for(weight(torch.float64)) is None
    assert why_none(weight()) is None and why_none(torch.zeros(1)) is None
    assert why_none(weight(torch.float64)) == "no kernels for float64"
    found[torch.device("cuda", 0)] = triton_trial.Found(None, "no compiler")
    assert kernels_for(weight()) is None and why_none(weight()) == "no compiler"


def test_a_run_says_that_there_are_no_kernels(tiny_model, monkeypatch):
    model = load(tiny_model("llama"))
    assert path_notes(model) == []
    monkeypatch.setattr("tell.train.fast.fused.why_none", lambda weight: "Triton is not installed")
    (note,) = path_notes(model)
    assert note == "norms, rotary positions and MLPs run as transformers' own, slower (Triton is not installed)"
