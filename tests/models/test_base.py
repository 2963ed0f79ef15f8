"""Quantised base weights: where they are refused, what is loaded, how much they take."""

from __future__ import annotations

import pytest
import torch

from tell.config import make_config
from tell.errors import TellError
from tell.kernels.quantised import QuantisedLinear
from tell.models import base as base_module
from tell.models import load
from tell.models.base import check_base, check_planned_model, weight_bytes
from tell.models.find import find_model
from tell.models.load import load_model, placed, read_weights

CPU = {"device_map": {"": "cpu"}}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_refused_off_cuda_with_the_reason(kind, device):
    with pytest.raises(TellError, match=rf"model\.base={kind}: .* on {device} .*Use model\.base"):
        check_base(kind, device)
    check_base("full", device)
    check_base(kind, "cuda", installed=False)


def test_refused_by_the_loader_before_anything_is_read(tiny_model, monkeypatch):
    monkeypatch.setattr(load, "read_weights", lambda *a: pytest.fail("weights are read"))
    with pytest.raises(TellError, match=r"model\.base=nf4"):
        load_model(find_model(str(tiny_model("llama"))), device="cpu", base="nf4")


@pytest.mark.parametrize("installed", [True, False])
def test_fp16_on_a_cpu_is_refused_before_anything_is_planned(installed):
    with pytest.raises(TellError, match=r"model\.dtype: fp16 .* on cpu is not supported"):
        check_planned_model(make_config({"model": {"dtype": "fp16", "device": "cpu"}}).model, installed=installed)
    check_planned_model(make_config({"model": {"dtype": "fp16", "device": "cuda"}}).model, installed=installed)


def test_a_missing_bitsandbytes_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(base_module, "find_spec", lambda name: None)
    with pytest.raises(TellError, match=r"bitsandbytes.*tell-llm\[gpu\]"):
        check_base("nf4", "cuda")


def test_bf16_is_full_weights_in_bf16():
    config = make_config({"model": {"base": "bf16"}}).model
    assert (config.base, config.dtype, config.arithmetic) == ("full", "bf16", ["bf16", "auto"])
    assert make_config({"model": {"base": "nf4"}}).model.arithmetic == ["auto", "auto", "nf4"]
    with pytest.raises(TellError, match="base is bf16 and dtype fp32"):
        make_config({"model": {"base": "bf16", "dtype": "fp32"}})


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3"])
def test_linear_layers_are_quantised_and_nothing_else(kind, family, tiny_model):
    pytest.importorskip("bitsandbytes")
    files = find_model(str(tiny_model(family)))
    whole, _, none = read_weights(files.path, torch.bfloat16, "full", CPU)
    model, info, share = read_weights(files.path, torch.bfloat16, kind, CPU)
    assert none == 0 and not info["missing_keys"] and 0.5 < share < 1
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    assert model.to("cpu") is model  # transformers no longer objects
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    expected = {name for name, m in whole.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name}
    assert set(layers) == expected
    for name, layer in layers.items():
        original = whole.get_submodule(name)
        assert kind == "int8" or layer.state.dtype == torch.bfloat16  # what CUDA dequantises to in place
        dense = layer.dense(torch.bfloat16)
        assert dense.shape == original.weight.shape and dense.dtype == torch.bfloat16
        error = (dense - original.weight).float().norm() / original.weight.float().norm()
        assert error < (0.12 if kind == "nf4" else 0.02), name
        assert (layer.bias is None) == (original.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, original.bias)
    for name, p in whole.named_parameters():
        if name.rpartition(".")[0] not in expected:
            assert torch.equal(model.get_parameter(name), p)


def test_weights_go_straight_to_the_current_gpu(monkeypatch):
    """By number: transformers reads in threads, and a thread's current GPU is the first."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert placed(torch.device("cuda")) == {"device_map": {"": torch.device("cuda", 3)}}
    assert placed(torch.device("cpu")) == placed(torch.device("mps")) == {}


def test_no_module_is_hooked_where_one_device_holds_all(tiny_model):
    model, _, _ = read_weights(find_model(str(tiny_model("llama"))).path, torch.float32, "full", CPU)
    assert not any(hasattr(m, "_hf_hook") or "forward" in vars(m) for m in model.modules())


def test_bytes_of_weights(tiny_model):
    arch = find_model(str(tiny_model("llama"))).architecture
    full = weight_bytes(arch, "full", 2)
    assert full == 2 * arch.parameters
    saved = full - weight_bytes(arch, "int8", 2)
    assert saved == arch.linear_parameters
    assert full - weight_bytes(arch, "nf4", 2) == pytest.approx(arch.linear_parameters * (2 - 4.127 / 8), rel=1e-3)
