"""Loading weights, number formats and devices."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from tell.errors import TellError
from tell.models import machine
from tell.models.find import find_model
from tell.models.load import choose_device, choose_dtype, load_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loads_frozen_in_evaluation_mode_and_silent(family, tiny_model, capfd):
    loaded = load_model(find_model(str(tiny_model(family))), dtype="fp32", device="cpu")
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.dtype, loaded.device.type) == (torch.float32, "cpu")
    assert loaded.model.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert capfd.readouterr() == ("", "")


def test_number_format_as_asked_and_by_hardware(tiny_model, monkeypatch):
    files = find_model(str(tiny_model("llama")))
    loaded = load_model(files, dtype="bf16", device="cpu", attn_implementation="eager")
    assert loaded.model.dtype == torch.bfloat16 and loaded.why == "bf16: as asked for"
    assert loaded.model.config._attn_implementation == "eager"
    monkeypatch.setattr(machine, "cpu_bf16", lambda: "avx512_bf16")
    assert choose_dtype("auto", CPU) == (torch.bfloat16, "bf16: the processor has avx512_bf16")
    monkeypatch.setattr(machine, "cpu_bf16", lambda: None)
    assert choose_dtype("auto", CPU) == (torch.float32, "fp32: the processor has no bf16 in hardware")
    with pytest.raises(TellError, match="bf17"):
        choose_dtype("bf17", CPU)


def test_devices(monkeypatch):
    assert choose_device("cpu") == CPU
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(TellError, match=r"model\.device"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TellError, match="cuda was asked for"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f", None),
        ("avx512f avx512_bf16", "avx512_bf16"),
        ("avx512_bf16 amx_bf16", "amx_bf16"),
    ],
)
def test_processor_flags(flags, expected, monkeypatch):
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"flags": flags})
    assert machine.cpu_bf16.__wrapped__() == expected


def test_weights_that_do_not_fit_the_configuration_are_refused(tiny_model, tmp_path):
    """transformers fills missing tensors with random numbers and only warns."""
    source = tiny_model("llama")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(TellError, match=r"weights lack 9 tensors, first model\.layers\.2"):
        load_model(find_model(str(tmp_path)), dtype="fp32", device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "brandnew"}))
    with pytest.raises(TellError, match="the installed transformers knows no model of type brandnew"):
        find_model(str(tmp_path))
