"""The adapter: peft's function, peft's format, and the base model untouched."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel

import tiny
from tell.config_sections import TrainConfig
from tell.decode.engine import Engine
from tell.decode.sampler import Decoding
from tell.errors import TellError
from tell.train import lora
from tell.train.lora import adapter_applied, add_lora, lora_layers, remove_lora, save_adapter, target_modules
from tell.train.row_losses import row_losses
from train.packed import assert_close, gradients, load, make_rows, make_table, wake

IDS = torch.arange(20, 60)[None]


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_identical(model, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_equals_peft(family, dropout, tiny_model):
    """Outputs and gradients; with dropout the masks coincide, for both draw once a layer in the same order."""
    config = TrainConfig(lora_dropout=dropout, lora_r=4, lora_targets="all-linear")
    results = []
    for fused in (True, False):
        model = add_lora(load(tiny_model(family)), config, seed=1, fused=fused)
        wake(model)
        assert sum("forward" in vars(layer) for _, layer in lora_layers(model)) == (
            len(list(lora_layers(model))) if fused else 0
        )
        torch.manual_seed(3)
        logits = model(input_ids=IDS).logits
        (logits.sin().sum() / 100).backward()
        results.append((logits.detach(), gradients(model)))
    (ours, grads), (theirs, reference) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert_close(grads, reference)


def test_dropout_is_real_in_training_only(tiny_model):
    model = add_lora(load(tiny_model("llama")), TrainConfig(lora_dropout=0.5), seed=1)
    wake(model)
    first, second = (model(input_ids=IDS).logits for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    model.eval()
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_fresh_adapter_is_seeded_and_changes_nothing(tiny_model):
    base = load(tiny_model("llama"))
    before = base(input_ids=IDS).logits
    state = snapshot(base)
    starts = []
    for seed in (1, 1, 2):
        model = add_lora(base, TrainConfig(), seed=seed)
        parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name and p.dtype == torch.float32 for name, p in parameters.items())
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, before)
        starts.append(parameters)
        base = remove_lora(model)
        assert_identical(base, state)
    same, other = (
        all(torch.equal(starts[0][name], starts[k][name]) for name in starts[0] if "lora_A" in name) for k in (1, 2)
    )
    assert same and not other


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_adapter_loads_in_plain_peft_and_merges(family, tiny_model, tmp_path):
    """Three ways to one function: trained model, plain peft on plain transformers, weights folded in and out."""
    base = load(tiny_model(family))
    state, plain = snapshot(base), base(input_ids=IDS).logits
    model = add_lora(base, TrainConfig(lora_r=4), seed=1)
    wake(model)
    tuned = model.eval()(input_ids=IDS).logits
    save_adapter(model, tmp_path)
    base = remove_lora(model)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}

    theirs = PeftModel.from_pretrained(load(tiny_model(family)), tmp_path)(input_ids=IDS).logits
    scale = tuned.abs().max()
    assert (tuned - plain).abs().max() > 1e-2 * scale
    assert (theirs - tuned).abs().max() < 1e-5 * scale
    with adapter_applied(base, tmp_path) as merged:
        assert (merged(input_ids=IDS).logits - theirs).abs().max() < 1e-5 * scale
    assert_identical(base, state)
    with pytest.raises(ValueError, match="inside"), adapter_applied(base, tmp_path):
        raise ValueError("inside")
    assert_identical(base, state)
    with adapter_applied(base, None) as untouched:
        assert untouched is base


def test_merging_leaves_bfloat16_exact(tiny_model, tmp_path):
    base = load(tiny_model("qwen2"), dtype=torch.bfloat16)
    state = snapshot(base)
    model = add_lora(base, TrainConfig(), seed=1)
    wake(model)
    save_adapter(model, tmp_path)
    base = remove_lora(model)
    with adapter_applied(base, tmp_path):
        assert not torch.equal(base.model.layers[0].mlp.up_proj.weight, state["model.layers.0.mlp.up_proj.weight"])
        assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert_identical(base, state)


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_applied_merged_or_beside_where_there_is_no_room(room, dtype, family, tiny_model, tmp_path, monkeypatch):
    """Both give the same logits within rounding; the second touches no weight, and no forward stays replaced."""
    base = load(tiny_model(family), dtype=dtype)
    state, plain = snapshot(base), base(input_ids=IDS).logits.float()
    model = add_lora(base, TrainConfig(lora_r=4), seed=1)
    wake(model)
    save_adapter(model, tmp_path)
    base = remove_lora(model)
    monkeypatch.setattr(lora, "_room_for_copies", lambda weights: room)
    reference = load(tiny_model(family))
    factors, scale = lora.adapter_factors(reference, tmp_path)
    for name, (a, b) in factors.items():
        reference.get_parameter(f"{name}.weight").data += scale * b @ a
    expected = reference(input_ids=IDS).logits
    with adapter_applied(base, tmp_path):
        after = base.state_dict()
        assert all(torch.equal(after[name], state[name]) for name in state) is not room
        assert len([m for m in base.modules() if "forward" in vars(m)]) == (0 if room else len(factors))
        tuned = base(input_ids=IDS).logits.float()
    assert (tuned - plain).norm() > 0.05 * plain.norm()
    assert (tuned - expected).norm() < (1e-5 if dtype == torch.float32 else 0.02) * expected.norm()
    assert_identical(base, state)
    assert not any("forward" in vars(m) for m in base.modules())
    assert torch.equal(base(input_ids=IDS).logits.float(), plain)


def test_beside_keeps_what_was_in_place_of_a_forward(tiny_model, tmp_path, monkeypatch):
    """Losses over packed rows through replaced forwards, and another replacement under the adapter's."""
    folder = tiny_model("llama")
    model = add_lora(load(folder), TrainConfig(lora_r=4), seed=1)
    wake(model)
    save_adapter(model, tmp_path)
    table = make_table(make_rows((20, 11, 30)), "task")
    base = remove_lora(model)
    losses = []
    layer = base.model.layers[0].mlp.up_proj
    own = lambda x: torch.nn.functional.linear(x, layer.weight)  # noqa: E731
    layer.forward = own
    for room in (True, False):
        monkeypatch.setattr(lora, "_room_for_copies", lambda weights, room=room: room)
        with pytest.raises(ValueError, match="inside"), adapter_applied(base, tmp_path):
            losses.append(row_losses(base, table, micro_tokens=64))
            raise ValueError("inside")
        assert layer.forward is own
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert not np.allclose(losses[0], row_losses(base, table, micro_tokens=64), rtol=1e-3)


def test_answers_are_the_same_merged_and_beside(tiny_model, tmp_path, monkeypatch):
    """By the engine: its kernels read weights themselves, and leave a model with an adapter beside them to torch."""
    model = add_lora(load(tiny_model("llama")), TrainConfig(lora_r=4), seed=1)
    wake(model)
    save_adapter(model, tmp_path)
    engine = Engine(remove_lora(model))
    prompts, rule = [[5, 6, 7, 8], [5, 6, 9]], Decoding(max_new_tokens=12, stop_ids=(), greedy=True)
    answers = [[a.ids for a in engine.generate(prompts, rule)]]
    for room in (True, False):
        monkeypatch.setattr(lora, "_room_for_copies", lambda weights, room=room: room)
        with engine.adapter(tmp_path):
            answers.append([a.ids for a in engine.generate(prompts, rule)])
    assert answers[1] == answers[2] != answers[0]


def test_copies_take_a_small_share_of_a_gpu(monkeypatch):
    monkeypatch.setattr(lora, "free_bytes", lambda device: 1000)
    weight = SimpleNamespace(device=torch.device("cuda", 0), nbytes=125)
    assert lora._room_for_copies([weight] * 2) and not lora._room_for_copies([weight] * 3)
    assert lora._room_for_copies([SimpleNamespace(device=torch.device("cpu"), nbytes=2000)])


@pytest.mark.parametrize("free", [7e9, 62e9, 125e9])
def test_a_large_model_is_adapted_beside_its_weights_on_every_card(free, monkeypatch):
    """224 matrices of an 8B model, 14 GB; of one of 135M parameters 0.2 GB."""
    monkeypatch.setattr(lora, "free_bytes", lambda device: free)
    device = torch.device("cuda", 0)
    large, small = (SimpleNamespace(device=device, nbytes=nbytes) for nbytes in (62_300_000, 1_000_000))
    assert not lora._room_for_copies([large] * 224)
    assert lora._room_for_copies([small] * 210)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("room", [True, False])
def test_applying_on_a_gpu(room, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "_room_for_copies", lambda weights: room)
    base = load(tiny_model("llama"), dtype=torch.bfloat16)
    model = add_lora(base, TrainConfig(), seed=1)
    wake(model)
    save_adapter(model, tmp_path)
    base = remove_lora(model).cuda()
    state, plain = snapshot(base), base(input_ids=IDS.cuda()).logits
    with adapter_applied(base, tmp_path):
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(base.get_parameter(name), state[name]) is not room
        assert (base(input_ids=IDS.cuda()).logits - plain).norm() > 0.05 * plain.norm()
    assert_identical(base, state)


@pytest.mark.parametrize("room", [True, False])
def test_weights_stored_the_other_way_round(room, tmp_path, monkeypatch):
    """GPT-2's linear layers keep (in, out); the square one would take a transposed product in silence."""
    import transformers

    monkeypatch.setattr(lora, "_room_for_copies", lambda weights: room)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=400)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = add_lora(base, TrainConfig(), seed=1)
    wake(model)
    save_adapter(model, tmp_path)
    tuned = model.eval()(input_ids=IDS).logits
    with adapter_applied(remove_lora(model), tmp_path) as merged:
        torch.testing.assert_close(merged(input_ids=IDS).logits, tuned, rtol=1e-4, atol=1e-5)


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "qkv", "o_proj, down_proj"])
def test_targets(family, targets, tiny_model):
    """No target touches the output layer, tied or not; phi3 has q, k and v in one."""
    fused = family == "phi3"
    expected = {
        "all-linear": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} if fused else LINEAR,
        "qkv": {"qkv_proj"} if fused else {"q_proj", "k_proj", "v_proj"},
        "o_proj, down_proj": {"o_proj", "down_proj"},
    }[targets]
    model = add_lora(load(tiny_model(family)), TrainConfig(lora_targets=targets), seed=1)
    names = [name for name, _ in lora_layers(model)]
    assert {name.rsplit(".", 1)[-1] for name in names} == expected
    assert len(names) == len(expected) * model.config.num_hidden_layers


@pytest.mark.parametrize("targets", ["q_proj,nonsense", "lm_head", "embed_tokens", " , "])
def test_unknown_targets_are_named(targets, tiny_model):
    model = load(tiny_model("mistral"))  # its output layer is not tied
    with pytest.raises(TellError) as caught:
        target_modules(model, targets)
    message = str(caught.value)
    assert message.startswith("train.lora_targets:") and "names no linear layer" in message
    assert "o_proj" in message and ("q_proj" not in message.split("names")[0])
    assert ", lm_head" not in message.split("Use")[1]


def test_bad_adapters_are_refused(tiny_model, tmp_path):
    model = add_lora(load(tiny_model("llama")), TrainConfig(), seed=1)
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    base = load(tiny_model("phi3"))
    state = snapshot(base)
    with pytest.raises(TellError, match="which the model lacks"), adapter_applied(base, tmp_path / "a"):
        pass
    assert_identical(base, state)
    with pytest.raises(TellError, match=r"has no adapter_model\.safetensors"), adapter_applied(base, tmp_path):
        pass
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(TellError, match="not a plain LoRA"), adapter_applied(base, tmp_path / "a"):
        pass


def test_a_fresh_adapter_leaves_the_callers_random_state(tiny_model):
    base = load(tiny_model("llama"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    add_lora(base, TrainConfig(), seed=1)
    assert torch.equal(torch.rand(3), expected)


def experts_model():
    """A mixture whose experts are one tensor, with a dense layer of the same names first."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.12}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads, **mixture), dtype=torch.float32)
    return model.eval().requires_grad_(False)


def test_experts_are_left_out_and_the_adapter_saves_and_merges(tmp_path):
    base = experts_model()
    state, plain = snapshot(base), base(input_ids=IDS).logits
    model = add_lora(base, TrainConfig(lora_r=4, lora_targets="all-linear"), seed=1)
    wake(model)
    tuned = model.eval()(input_ids=IDS).logits
    assert (tuned - plain).abs().max() > 1e-3
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    base = remove_lora(model)
    with adapter_applied(base, tmp_path) as merged:
        torch.testing.assert_close(merged(input_ids=IDS).logits, tuned, rtol=1e-4, atol=1e-4)
    assert_identical(base, state)
    theirs = PeftModel.from_pretrained(experts_model(), tmp_path)(input_ids=IDS).logits
    torch.testing.assert_close(theirs, tuned, rtol=1e-4, atol=1e-4)


def test_experts_named_by_hand_are_refused():
    with pytest.raises(TellError, match=r"lora_targets: down_proj would name the experts.*Use all-linear"):
        add_lora(experts_model(), TrainConfig(lora_targets="q_proj,down_proj"), seed=1)


def test_adapter_config_has_no_key_that_says_peft_s_default(tiny_model, tmp_path):
    """Versions of peft before a key was invented refuse the file for it."""
    from peft import LoraConfig

    model = add_lora(load(tiny_model("llama")), TrainConfig(lora_r=4, lora_targets="qkv"), seed=1)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    # all of them fields of LoraConfig in peft 0.3 already
    old = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout"}
    assert set(written) == old | {"target_modules", "bias", "fan_in_fan_out"}
    again = LoraConfig.from_pretrained(str(tmp_path)).to_dict()
    now = model.peft_config["default"].to_dict()
    assert {k: v for k, v in again.items() if k != "inference_mode"} == {
        k: v for k, v in now.items() if k != "inference_mode"
    }
