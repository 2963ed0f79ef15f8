"""Exchanged modules copied, pickled, unfrozen, watched and written into: they compute what the model computes."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from tell.config_sections import TrainConfig
from tell.kernels.ops import kernels_for
from tell.train.attention import PackedPlan, use_plan
from tell.train.fast.exchange import Exchange
from tell.train.fast.fused import fuse_modules, fused_counts, is_fused, unfuse_modules
from tell.train.fast.fused_ops import RmsNorm
from tell.train.lora import add_lora, remove_lora
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.step import Body, StepRules, step_loss
from train.packed import gradients, load, make_rows, wake

pytestmark = pytest.mark.skipif(kernels_for(torch.zeros(1)) is None, reason="no kernels")
ROWS = make_rows((30, 21, 2))
RULES = StepRules("token")


def plain_loss(model) -> float:
    return plain_step_loss(PlainBody(model), ROWS, RULES, backward=False).loss


def fused_loss(model) -> float:
    return step_loss(Body(model), ROWS, RULES, backward=False).loss


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own_weights(way, tiny_model):
    model = load(tiny_model("qwen3"))
    before = fused_loss(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    changed = fused_loss(other)
    assert sum(isinstance(vars(m).get("forward"), Exchange) for m in other.modules()) > 4
    assert abs(changed - before) > 1e-3 and fused_loss(model) == before
    assert changed == pytest.approx(plain_loss(other), rel=1e-5)


def test_a_copy_is_as_fused_as_its_model(tiny_model):
    """The plain path gives a copy its exchanged forwards back, and their numbers are known."""
    model = load(tiny_model("qwen3"))
    Body(model)
    counts = fuse_modules(model)
    other = copy.deepcopy(model)
    plain = PlainBody(other)
    assert plain.fused and not is_fused(other)
    plain.give_back()
    assert is_fused(other) and fuse_modules(copy.deepcopy(other)) == counts == fused_counts(other)
    unfuse_modules(other)
    assert not is_fused(other) and is_fused(model)


def test_biases_written_into_later_are_used(tiny_model):
    model = load(tiny_model("qwen2"))
    before = fused_loss(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.normal_(generator=torch.Generator().manual_seed(0))
            layer.self_attn.v_proj.bias.fill_(2.0)
    after = fused_loss(model)
    assert abs(after - before) > 1e-3 and after == pytest.approx(plain_loss(model), rel=1e-5)


def test_only_some_layers_with_a_bias(tiny_model):
    model = load(tiny_model("qwen2"))
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias = None
        torch.nn.init.constant_(layer.self_attn.v_proj.bias, 0.5)
    loss = fused_loss(model)
    assert fuse_modules(model)["attention"] == len(model.model.layers)
    assert loss == pytest.approx(plain_loss(model), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_that_want_gradients_get_them(family, tiny_model):
    """The fused operations give frozen weights no gradient: others must go the plain way."""
    got = []
    for fast in (True, False):
        model = load(tiny_model(family))
        if fast:
            Body(model)  # exchanged while all is frozen
        model.model.layers.requires_grad_(True)
        if fast:
            step_loss(Body(model), ROWS, RULES)
        else:
            plain_step_loss(PlainBody(model), ROWS, RULES)
        got.append(gradients(model))
    assert got[0].keys() == got[1].keys() and any("norm" in name for name in got[0])
    for name, grad in got[1].items():
        torch.testing.assert_close(got[0][name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_hooks_on_single_layers_are_called(tiny_model):
    model = load(tiny_model("llama"))
    Body(model)
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, _, out: out * 2)
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    assert fused_loss(model) == pytest.approx(plain_loss(model), rel=1e-5)


def test_modules_called_in_another_way_are_left_alone(tiny_model):
    class Mlp(type(load(tiny_model("llama")).model.layers[0].mlp)):
        def forward(self, x):
            _, length, _ = x.shape  # three dimensions; the trial gives two
            return super().forward(x) * min(length, 2)

    model = load(tiny_model("llama"))
    for layer in model.model.layers:
        layer.mlp.__class__ = Mlp
    state = torch.get_rng_state()
    Body(model)
    assert torch.equal(torch.get_rng_state(), state)
    counts = fuse_modules(model)
    assert counts["mlp"] == 0 and counts["attention"] == len(model.model.layers)


def test_unfusing_leaves_the_forwards_of_others(tiny_model):
    model = load(tiny_model("llama"))
    foreign = model.model.layers[0].mlp.forward = lambda x: x * 0
    Body(model)
    unfuse_modules(model)
    assert [m.forward for m in model.modules() if "forward" in vars(m)] == [foreign]


def test_gradient_of_a_sum():
    x = torch.randn(5, 24, requires_grad=True)
    weight = torch.rand(24)
    RmsNorm.apply(x, weight, 1e-6, 0.0).sum().backward()
    expected = x.detach().clone().requires_grad_()
    (expected * (expected.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_norms_in_another_format_go_the_plain_way(tiny_model):
    """Norms of queries and keys kept in fp32 under a bf16 model: read as bf16 they would be noise."""
    model = load(tiny_model("qwen3"), dtype=torch.bfloat16)
    Body(model)
    for layer in model.model.layers:
        norm = layer.self_attn.q_norm
        norm.weight.data = norm.weight.data.float()
        norm.register_forward_hook(lambda module, _, out: out.bfloat16())
    plan = PackedPlan([9, 4])
    ids = torch.arange(13)[None]
    with torch.no_grad(), use_plan(plan):
        fused = model.model(input_ids=ids, position_ids=plan.positions(), use_cache=False).last_hidden_state
        unfuse_modules(model)
        plain = model.model(input_ids=ids, position_ids=plan.positions(), use_cache=False).last_hidden_state
    assert (fused - plain).float().norm() < 0.05 * plain.float().norm()


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("targets", ["qkv", "q_proj,down_proj", "all-linear"])
def test_adapters_on_some_layers_one_arm_after_another(targets, dropout, tiny_model):
    """A second adapter on the same base trains as the first did, and the base is as it was."""
    base = load(tiny_model("llama"))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = TrainConfig(lora_targets=targets, lora_dropout=dropout, lora_r=4)
    seen = []
    for _ in range(2):
        model = add_lora(base, config, seed=1)
        wake(model)
        body = Body(model)
        torch.manual_seed(3)
        out = step_loss(body, ROWS, StepRules("example", share_prefix=False))
        seen.append((out.loss, gradients(model)))
        remove_lora(model)
    assert seen[0][0] == seen[1][0] and seen[0][1].keys() == seen[1][1].keys()
    assert all(torch.equal(grad, seen[1][1][name]) and grad.abs().sum() > 0 for name, grad in seen[0][1].items())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
