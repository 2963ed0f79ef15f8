"""What is exchanged in which family, and that the plain, the torch and the kernel path train alike."""

from __future__ import annotations

import pytest
import torch

import tiny
from tell.config_sections import TrainConfig
from tell.kernels import ops
from tell.kernels.ops import kernels_for
from tell.train.attention import install
from tell.train.fast.cuda import Forwards
from tell.train.fast.fused import fuse_modules, path_notes, unfuse_modules
from tell.train.lora import add_lora, remove_lora
from tell.train.plain import PlainBody, padded_batches, plain_step_loss
from tell.train.step import Body, StepRules, step_loss
from train.packed import assert_close, gradients, load, make_rows, wake

needs_kernels = pytest.mark.skipif(kernels_for(torch.zeros(1)) is None, reason="no kernels")
CONFIG = TrainConfig(lora_dropout=0.0, lora_r=4)
LENGTHS = (70, 41, 41, 40, 12, 2)


@needs_kernels
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_are_exchanged(family, tiny_model):
    model = load(tiny_model(family))
    Body(model)
    layers = model.config.get_text_config().num_hidden_layers
    counts = fuse_modules(model)
    assert counts["mlp"] == layers
    assert counts["attention"] == (0 if family == "gemma2" else layers)  # Gemma 2 caps its scores
    assert counts["norm"] >= 2 * layers + 1
    unfuse_modules(model)
    assert not any("forward" in vars(m) for m in model.modules())


@needs_kernels
def test_what_computes_something_else_is_left_alone(tiny_model):
    model = load(tiny_model("llama"))
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    model.model.norm.forward = torch.nn.Identity().forward  # somebody's own exchange
    Body(model)
    counts = fuse_modules(model)
    assert counts["mlp"] == 0 and counts["attention"] == len(model.model.layers)
    assert counts["norm"] == 2 * len(model.model.layers)


def test_a_kernel_that_fails_leaves_the_module_alone_and_says_why(tiny_model):
    """Triton's errors (CompilationError, OutOfResources) derive from Exception alone."""

    class CompilationError(Exception):
        pass

    def fail(*_):
        raise CompilationError("at 12:4: no such instruction\nmore")

    model = load(tiny_model("llama"))
    install(model)
    assert fuse_modules(model, Forwards(fail, fail, fail)) == {"norm": 0, "attention": 0, "mlp": 0}
    assert path_notes(model) == [
        f"{name} keeps its own forward (CompilationError: at 12:4: no such instruction)"
        for name in ("LlamaAttention", "LlamaMLP", "LlamaRMSNorm")
    ]


@needs_kernels
def test_weights_put_into_layers_later_are_used(tiny_model):
    """Products over several layers keep their weights in one tensor; it must follow what the layers hold."""
    model = load(tiny_model("llama"))
    body = Body(model)
    rows = make_rows(LENGTHS)
    before = step_loss(body, rows, StepRules("token"), backward=False).loss
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data = torch.randn(layer.self_attn.q_proj.weight.shape, generator=generator)
        layer.mlp.up_proj.weight.data.mul_(-2)
    fused = step_loss(body, rows, StepRules("token"), backward=False).loss
    plain = plain_step_loss(PlainBody(model), rows, StepRules("token"), backward=False).loss
    assert fused == pytest.approx(plain, rel=1e-5) and abs(fused - before) > 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_path_equals_the_fast_one(family, tiny_model):
    rows = make_rows(LENGTHS, task=(0, 3))
    base = load(tiny_model(family))
    results = []
    for fast in (True, False, True):  # and back again: nothing of one path stays behind in the other
        model = add_lora(base, CONFIG, seed=1, fused=fast)
        wake(model)
        rules = StepRules(task_weight=2.0, micro_tokens=100)
        out = step_loss(Body(model), rows, rules) if fast else plain_step_loss(PlainBody(model), rows, rules)
        results.append((out.loss, gradients(model), sorted(zip(out.rows, out.source, strict=True)), out.tokens))
        remove_lora(model)
    for loss, grads, singles, tokens in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert_close(grads, results[0][1])
        assert [s for _, s in singles] == [s for _, s in results[0][2]] and tokens == results[0][3]
        assert [v for v, _ in singles] == pytest.approx([v for v, _ in results[0][2]], rel=1e-4)


@needs_kernels
def test_norms_of_queries_and_keys_keep_their_own_epsilon(tiny_model):
    model = load(tiny_model("qwen3"))
    for layer in model.model.layers:
        layer.self_attn.q_norm.variance_epsilon = 3.0
    rows, rules = make_rows(LENGTHS), StepRules("token")
    fused = step_loss(Body(model), rows, rules, backward=False).loss
    assert fuse_modules(model)["attention"] == len(model.model.layers)
    assert fused == pytest.approx(plain_step_loss(PlainBody(model), rows, rules, backward=False).loss, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_without_kernels_the_same_is_learned(dropout, tiny_model, monkeypatch):
    """Loss and gradients where no compiler is; with dropout, whose masks are others, only that training runs."""
    monkeypatch.setattr(ops, "_kernels", lambda dtype: None)
    rows, results = make_rows(LENGTHS, task=(0, 3)), []
    for fast in (True, False):
        config = CONFIG.model_copy(update={"lora_dropout": dropout})
        model = add_lora(load(tiny_model("qwen3")), config, seed=1, fused=fast)
        wake(model)
        torch.manual_seed(3)
        if fast:
            out = step_loss(Body(model), rows, StepRules("example", share_prefix=not dropout))
            assert fuse_modules(model.get_base_model()) == {}
        else:
            out = plain_step_loss(PlainBody(model), rows, StepRules("example"))
        results.append((out.loss, gradients(model)))
    (loss, grads), (expected, reference) = results
    assert loss == pytest.approx(expected, rel=0.05 if dropout else 1e-5)
    if not dropout:
        assert_close(grads, reference)


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_bf16_differs_by_rounding_only(family, tiny_model):
    """In bf16 the kernels' error against fp32 is at most 1.5 times the plain path's."""
    rows = make_rows(LENGTHS, task=(0, 3))
    grads = {}
    for name, dtype in (("exact", torch.float32), ("fast", torch.bfloat16), ("plain", torch.bfloat16)):
        model = add_lora(load(tiny_model(family), dtype=dtype), CONFIG, seed=1, fused=name == "fast")
        wake(model)
        if name == "fast":
            step_loss(Body(model), rows, StepRules("example"))
        else:
            plain_step_loss(PlainBody(model), rows, StepRules("example"))
        grads[name] = torch.cat([g.double().flatten() for g in gradients(model).values()])

    def error(name: str) -> float:
        return float((grads[name] - grads["exact"]).norm() / grads["exact"].norm())

    assert error("fast") < 0.1 and error("fast") < 1.5 * error("plain")


def test_padded_batches_keep_every_row():
    rows = make_rows((50, 3, 20, 20, 9, 7))
    for micro in (1, 45, 10_000):
        groups = padded_batches(rows, micro)
        assert sorted(id(r) for g in groups for r in g) == sorted(id(r) for r in rows)
        assert all(len(g) == 1 or len(g[0].ids) * len(g) <= micro for g in groups)
