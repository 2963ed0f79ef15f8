"""Training over 4- and 8-bit base weights equals training over the dense model of the same, dequantised weights."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import tiny
from tell.config_sections import TrainConfig
from tell.decode.engine import Engine
from tell.decode.sampler import Decoding
from tell.exports.merge import write_merged
from tell.folder import AdapterFolder
from tell.kernels.quantised import QuantisedLinear
from tell.models.find import find_model
from tell.models.load import read_weights
from tell.train.fast.base_weight import Quantised, dense, quantised_weight
from tell.train.fast.fused import fused_counts
from tell.train.fast.fused_forwards import Projections
from tell.train.lora import adapter_applied, add_lora, is_merged, lora_layers, remove_lora, save_adapter
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.row_losses import row_losses
from tell.train.step import Body, StepRules, step_loss
from train.packed import assert_close, gradients, make_rows, make_table, wake

pytest.importorskip("bitsandbytes")
torch.set_num_threads(1)
CONFIG = TrainConfig(lora_dropout=0.0, lora_r=4)
KINDS = ["nf4", "int8"]
IDS = torch.arange(20, 60)[None]


def quantised(folder, kind, dtype=torch.float32):
    model, _, _ = read_weights(folder, dtype, kind, {"device_map": {"": "cpu"}, "attn_implementation": "eager"})
    return model.eval().requires_grad_(False)


def densed(model):
    """The same model over plain linear layers."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantisedLinear):
                layer = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                layer.weight = nn.Parameter(child.dense(twin.dtype), requires_grad=False)
                layer.bias = child.bias
                setattr(parent, name, layer)
    return twin


def step(model, *, fast=True, **more):
    model = add_lora(model, TrainConfig(lora_r=4, **{"lora_dropout": 0.0, **more}), seed=1, fused=fast)
    wake(model)
    torch.manual_seed(3)
    rows, rules = make_rows((40, 33, 12, 7), prefix=5, task=(0,)), StepRules("example", share_prefix=fast)
    out = step_loss(Body(model), rows, rules) if fast else plain_step_loss(PlainBody(model), rows, rules)
    return out.loss, gradients(model), model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_equals_the_dense_model(kind, family, tiny_model):
    base = quantised(tiny_model(family), kind)
    reference = densed(base)
    loss, grads, model = step(base)
    expected, expected_grads, twin = step(reference)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_close(grads, expected_grads, 1e-5)
    assert fused_counts(model.get_base_model()) == fused_counts(twin.get_base_model())  # the fused path serves it
    layers = [layer for _, layer in lora_layers(model)]
    assert len(layers) == len([m for m in model.modules() if isinstance(m, QuantisedLinear)]) > 0
    assert all("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_peft_over_it_equals_the_fused_path(kind, dtype, tiny_model):
    base = quantised(tiny_model("qwen2"), kind, dtype)
    loss, grads, _ = step(copy.deepcopy(base))
    plain, plain_grads, _ = step(base, fast=False)
    loose = dtype == torch.bfloat16
    assert loss == pytest.approx(plain, rel=1e-2 if loose else 1e-6)
    assert_close(grads, plain_grads, 0.06 if loose else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_over_it(kind, tiny_model):
    base = quantised(tiny_model("llama"), kind)
    reference = densed(base)
    (loss, grads, _), (expected, expected_grads, _) = (step(m, lora_dropout=0.3) for m in (base, reference))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_close(grads, expected_grads, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_weight_outlives_a_forward_pass(kind, tiny_model):
    """Neither fused nor alone does a layer keep its dense weight for the backward pass."""
    base = quantised(tiny_model("llama"), kind)
    attention = base.model.layers[0].self_attn
    sizes = {n * k for n, k in [(64, 64), (128, 64)]}
    saved = []
    x = torch.randn(1, 9, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        joined = Projections(attention, ["q_proj", "k_proj", "v_proj"])(x)
        alone = attention.q_proj(x)
    assert not sizes & set(saved)
    torch.testing.assert_close(joined[0], alone)
    stack, _ = Projections(attention, ["q_proj", "k_proj", "v_proj"]).stack()
    assert isinstance(stack.weight, Quantised) and stack.widths == (64, 32, 32)
    whole = dense(stack.weight, torch.float32)
    parts = [layer.dense(torch.float32) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert torch.equal(whole, torch.cat(parts))
    plain = nn.Linear(4, 3)
    assert dense(plain.weight, torch.float32) is plain.weight and quantised_weight([plain]) is None


def test_a_plain_layer_next_to_quantised_ones(tiny_model):
    """Layers that bitsandbytes leaves alone are copied into the joined weight."""
    base = quantised(tiny_model("qwen2"), "nf4")
    attention = base.model.layers[0].self_attn
    names = ["q_proj", "k_proj", "v_proj"]
    attention.k_proj = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(2, 5, 64)
    for y, name in zip(Projections(attention, names)(x), names, strict=True):
        torch.testing.assert_close(y, getattr(attention, name)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_is_applied_beside_and_exported_against_the_whole_base(kind, tiny_model, tmp_path):
    """Evaluation computes with the base it trained with; what is saved names the original, and merges into it."""
    folder = tiny_model("llama")
    base = quantised(folder, kind)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    _, _, model = step(base)
    table = make_table(make_rows((20, 11)), "task")
    tuned = row_losses(model.eval(), table, micro_tokens=64)
    save_adapter(model, tmp_path / "adapter")
    base = remove_lora(model)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(find_model(str(folder)).path)
    assert not is_merged(base, [name for name, m in base.named_modules() if isinstance(m, QuantisedLinear)])
    prompts, rule = [[5, 6, 7]], Decoding(max_new_tokens=9, stop_ids=(), greedy=True)
    untuned = row_losses(base, table, micro_tokens=64)
    with torch.inference_mode(), adapter_applied(base, tmp_path / "adapter"):
        assert row_losses(base, table, micro_tokens=64) == pytest.approx(tuned, rel=1e-5)
        answers = Engine(base).generate(prompts, rule)
    assert untuned != pytest.approx(tuned, rel=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    twin = densed(base)
    with adapter_applied(twin, tmp_path / "adapter"):
        assert Engine(twin).generate(prompts, rule)[0].ids == answers[0].ids
    (tmp_path / "merged").mkdir()
    assert write_merged(folder, AdapterFolder(tmp_path / "adapter"), tmp_path / "merged") == 14


def test_a_moved_or_copied_layer_computes_the_same(tiny_model):
    base = quantised(tiny_model("llama"), "nf4", torch.bfloat16)
    for kind in KINDS:
        layer = quantised(tiny_model("llama"), kind, torch.bfloat16).model.layers[0].mlp.down_proj
        twin = copy.deepcopy(layer)
        x = torch.randn(3, 128, dtype=torch.bfloat16)
        assert torch.equal(twin(x), layer(x)) and twin.state is not layer.state
        assert layer.to("cpu") is layer and layer.weight.dtype in (torch.uint8, torch.int8)
        assert kind in repr(layer)
    assert base.dtype == torch.bfloat16


def test_layers_stored_the_other_way_round(tmp_path):
    """GPT-2's files have (in, out); the adapter says so, or a square layer would be merged transposed in silence."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=400)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model, _, _ = read_weights(tmp_path / "base", torch.float32, "int8", {"device_map": {"": "cpu"}})
    tuned = add_lora(model.requires_grad_(False), CONFIG, seed=1)
    wake(tuned)
    expected = tuned.eval()(input_ids=IDS).logits
    save_adapter(tuned, tmp_path / "adapter")
    base = remove_lora(tuned)
    with torch.no_grad(), adapter_applied(base, tmp_path / "adapter"):
        torch.testing.assert_close(base(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "base", AdapterFolder(tmp_path / "adapter"), tmp_path / "merged")
    config.save_pretrained(tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    got = whole(input_ids=IDS).logits
    assert (got - expected).norm() < 0.2 * (got - plain(input_ids=IDS).logits).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_gpu_equals_the_dense_model(kind, tiny_model):
    where = {"device_map": {"": torch.device("cuda", 0)}}
    base, _, _ = read_weights(tiny_model("llama"), torch.bfloat16, kind, where)
    base = base.eval().requires_grad_(False)
    reference = densed(base)
    (loss, grads, _), (expected, expected_grads, _) = step(base), step(reference)
    assert loss == pytest.approx(expected, rel=1e-2)
    assert_close(grads, expected_grads, 0.05)


@pytest.mark.parametrize("layers", [("q_proj", "k_proj", "v_proj"), ("down_proj",)])
def test_few_rows_are_multiplied_without_a_whole_matrix(layers, monkeypatch, tiny_model):
    """As a decoder does, for each token."""
    body = quantised(tiny_model("llama"), "nf4").base_model.layers[0]
    owner = body.mlp if layers == ("down_proj",) else body.self_attn
    projections = Projections(owner, layers)
    dtype, width = torch.float32, getattr(owner, layers[0]).in_features
    x, many = torch.randn(3, width, dtype=dtype), torch.randn(65, width, dtype=dtype)
    with torch.no_grad():
        expected = [layer(x) for layer in projections.layers()]
        dense = []
        whole = QuantisedLinear.dequantise
        monkeypatch.setattr(QuantisedLinear, "dequantise", lambda self, out: dense.append(self) or whole(self, out))
        for ours, theirs in zip(projections(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert not dense
        projections(many)
    assert len(dense) == len(layers)
    projections(x)
    assert len(dense) == 2 * len(layers)
