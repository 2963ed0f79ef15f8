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
    files = find_model(str(tiny_model(family)))
    capfd.readouterr()  # making it shows a bar
    loaded = load_model(files, dtype="fp32", device="cpu")
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.dtype, loaded.device.type) == (torch.float32, "cpu")
    assert loaded.model.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert capfd.readouterr() == ("", "")


def test_number_format_as_asked_and_by_hardware(tiny_model, monkeypatch):
    files = find_model(str(tiny_model("llama")))
    loaded = load_model(files, dtype="bf16", device="cpu", attn_implementation="eager")
    assert loaded.model.dtype == torch.bfloat16 and loaded.why == "bf16: as requested"
    assert loaded.model.config._attn_implementation == "eager"
    monkeypatch.setattr(machine, "cpu_bf16", lambda: "avx512_bf16")
    assert choose_dtype("auto", CPU) == (torch.bfloat16, "bf16: the CPU has avx512_bf16")
    monkeypatch.setattr(machine, "cpu_bf16", lambda: None)
    assert choose_dtype("auto", CPU) == (torch.float32, "fp32: the CPU has no bf16 in hardware")
    with pytest.raises(TellError, match="bf17"):
        choose_dtype("bf17", CPU)


@pytest.mark.parametrize(
    ("capability", "bf16", "expected"),
    [((8, 6), True, torch.bfloat16), ((7, 5), False, torch.float16), ((6, 1), False, torch.float32)],
)
def test_number_format_of_nvidia_gpus(capability, bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype, why = choose_dtype("auto", torch.device("cuda"))
    assert dtype == expected and "a card" in why
    assert choose_dtype("fp16", torch.device("cuda")) == (torch.float16, "fp16: as requested")
    monkeypatch.setattr(machine, "gpu", lambda: ("a card", capability[0] + capability[1] / 10))
    assert machine.likely_dtype("cuda") == why.partition(":")[0]


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_fp16_is_for_nvidia_gpus(device):
    with pytest.raises(TellError, match=rf"model\.dtype: fp16 was requested, but training in it on {device}"):
        choose_dtype("fp16", torch.device(device))


@pytest.mark.parametrize(("family", "expected"), [("llama", torch.float16), ("gemma3", torch.float32)])
def test_gemma_overflows_in_fp16(family, expected, tiny_model, monkeypatch):
    monkeypatch.setattr("tell.models.load.choose_dtype", lambda dtype, device: (torch.float16, "fp16: as on a T4"))
    loaded = load_model(find_model(str(tiny_model(family))), device="cpu")
    assert loaded.dtype == loaded.model.dtype == expected and ("overflow" in loaded.why) == (family == "gemma3")


def test_devices(monkeypatch):
    assert choose_device("cpu") == CPU
    with pytest.raises(TellError, match=r"model\.device"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TellError, match="cuda was requested"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("there", "chosen"),
    [({"cuda", "xpu", "mps"}, "cuda"), ({"xpu", "mps"}, "xpu"), ({"mps"}, "mps"), (set(), "cpu")],
)
def test_auto_takes_the_first_device_that_torch_sees(there, chosen, monkeypatch):
    for name, backend in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.backends.mps)):
        monkeypatch.setattr(backend, "is_available", lambda name=name: name in there)
    assert choose_device().type == chosen
    for name in ("xpu", "mps"):
        if name in there:
            assert choose_device(name).type == name
        else:
            with pytest.raises(TellError, match=f"{name} was requested"):
                choose_device(name)


@pytest.mark.parametrize(
    ("system", "expected"),
    [("15.1", torch.bfloat16), ("14.0", torch.bfloat16), ("13.6", torch.float32), ("", torch.float32)],
)
def test_number_format_of_apple_silicon(system, expected, monkeypatch):
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: (system, ("", "", ""), "arm64"))
    dtype, why = choose_dtype("auto", torch.device("mps"))
    assert dtype == expected and "Metal" in why
    assert machine.likely_dtype("mps") == why.partition(":")[0]


def test_number_format_of_intel_gpus(monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "Arc A770")
    assert choose_dtype("auto", torch.device("xpu")) == (torch.bfloat16, "bf16: the GPU (Arc A770) has it in hardware")
    assert machine.likely_dtype("xpu") == "bf16"


@pytest.mark.parametrize(
    ("files", "torch_version", "system", "expected"),
    [
        (["/dev/nvidia0", "/dev/dri"], "2.13.0+xpu", ("Linux", "x86_64"), "cuda"),
        (["/dev/dri"], "2.13.0+xpu", ("Linux", "x86_64"), "xpu"),
        (["/dev/dri"], "2.13.0+cpu", ("Linux", "x86_64"), "cpu"),
        ([], "2.13.0", ("Darwin", "arm64"), "mps"),
        ([], "2.2.2", ("Darwin", "x86_64"), "cpu"),
    ],
)
def test_likely_devices(files, torch_version, system, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine.Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "_torch_version", lambda: torch_version)
    monkeypatch.setattr(machine.platform, "system", lambda: system[0])
    monkeypatch.setattr(machine.platform, "machine", lambda: system[1])
    assert machine.likely_device() == expected


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
    assert machine._bf16_feature.__wrapped__() == expected


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
