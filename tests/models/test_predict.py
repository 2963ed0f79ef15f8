"""FLOPs, time and memory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from tell.models import machine
from tell.models.architecture import Architecture
from tell.models.find import find_model
from tell.models.flops import flops_paper, inference_flops, lora_parameters, training_flops
from tell.models.load import load_model
from tell.models.machine import Place
from tell.models.predict import CPU_GFLOPS, predict_seconds, record_speed

SMOLLM2 = Architecture(
    "llama", ("LlamaForCausalLM",), 30, 576, 1536, 9, 3, 64, 49152, True, 8192, 134515008, 106168320, 28311552, True
)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_counts_equal_torchs_own_counter(family, tiny_model):
    """Against torch's FLOP counter on a real forward and backward pass of a LoRA model."""
    files = find_model(str(tiny_model(family)))
    base = load_model(files, dtype="fp32", device="cpu", attn_implementation="eager").model
    ids = torch.arange(40, 40 + 24)[None]
    arch = files.architecture
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        base(ids)
    # eager attention computes the whole square, we count the half that is causal
    attention = 4.0 * arch.layers * arch.heads * arch.head_dim * 24**2 / 2
    expected = inference_flops(arch, 24, lengths=[24]) + attention
    assert forward.get_total_flops() == pytest.approx(expected, rel=0.01)

    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora_parameters(arch, 4) == lora
    with FlopCounterMode(display=False) as training:
        model(ids).logits.sum().backward()
    expected = training_flops(arch, 24, lengths=[24], lora_parameters=lora) + 3 * attention
    # the first block's input needs no gradient, which saves the tiny model a noticeable part
    assert 0.8 * expected < training.get_total_flops() <= 1.001 * expected


def test_paper_formula_matches_the_papers_totals():
    llama2_7b = Architecture("llama", (), 32, 4096, 11008, 32, 32, 128, 32000, False, 4096, 6738415616, 0, 0, True)
    assert 3e14 < flops_paper(llama2_7b, 1e4) < 5e14
    assert 3.5e17 < flops_paper(llama2_7b, 1e7) < 4.5e17


@given(tokens=st.integers(1, 10**7), share=st.floats(0, 1))
def test_untrained_tokens_cost_less_and_lora_less_than_full(tokens, share):
    partly = training_flops(SMOLLM2, tokens, trained_tokens=share * tokens)
    assert partly <= training_flops(SMOLLM2, tokens) < flops_paper(SMOLLM2, tokens)
    assert partly >= 4.0 * SMOLLM2.linear_parameters * tokens


@pytest.mark.parametrize("targets", ["qkv", "q_proj,v_proj"])
def test_adapter_sizes_by_target(targets, tiny_model):
    files = find_model(str(tiny_model("qwen2")))
    names = ["q_proj", "k_proj", "v_proj"] if targets == "qkv" else targets.split(",")
    base = load_model(files, dtype="fp32", device="cpu").model
    model = get_peft_model(base, LoraConfig(r=8, target_modules=names))
    assert lora_parameters(files.architecture, 8, targets) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_time_prefers_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine, "cpu_bf16", lambda: "avx512_bf16")

    def ask(fingerprint: str, dtype: str = "bf16"):
        return predict_seconds(SMOLLM2, 1e5, fingerprint=fingerprint, place=machine.likely_place("cpu", dtype))

    guess = ask("aaa")
    assert guess.basis == "guess from 2 cores in bf16" and not guess.measured
    assert guess.seconds == pytest.approx(training_flops(SMOLLM2, 1e5) / (2e9 * CPU_GFLOPS["avx512_bf16"]))
    record_speed("aaa", Place("cpu", "bf16"), 500.0)
    record_speed("bbb", Place("cpu", "bf16"), 1000.0)
    assert (ask("aaa").seconds, ask("aaa").basis) == (200.0, "measured on this machine")
    assert ask("bbb").seconds == 100.0
    assert ask("ccc") == guess  # nothing is known of one model from another's speed
    assert "guess" in ask("aaa", "fp32").basis  # measured in another number format
    record_speed("aaa", Place("cpu", "bf16"), 250.0)
    assert ask("aaa").seconds == 400.0
    monkeypatch.setattr(machine, "cores", lambda: 64)  # the same home on another machine
    assert "guess from 64 cores" in ask("aaa").basis


def test_speeds_of_a_gpu_are_kept_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "gpu", lambda: ("NVIDIA H100 80GB HBM3", 9.0))
    record_speed("aaa", Place("cuda", "bf16"), 500.0)
    monkeypatch.setattr(machine, "cores", lambda: 64)  # the same card in a larger share of its machine
    assert predict_seconds(SMOLLM2, 1e5, fingerprint="aaa", place=machine.likely_place("cuda")).seconds == 200.0
    monkeypatch.setattr(machine, "gpu", lambda: ("Tesla T4", 7.5))
    assert (
        predict_seconds(SMOLLM2, 1e5, fingerprint="aaa", place=machine.likely_place("cuda")).basis
        == "guess for a GPU in fp16"
    )


@pytest.mark.parametrize(
    ("answer", "expected", "dtype"),
    [
        ("NVIDIA H100 80GB HBM3, 9.0\n", ("NVIDIA H100 80GB HBM3", 9.0), "bf16"),
        ("Tesla T4, 7.5\n", ("Tesla T4", 7.5), "fp16"),
        ("Tesla P40, 6.1\n", ("Tesla P40", 6.1), "fp32"),
        ("No devices were found\n", ("GPU of EPYC", None), "bf16"),
        (None, ("GPU of EPYC", None), "bf16"),
    ],
)
def test_the_card_says_its_number_format(answer, expected, dtype, monkeypatch):
    def run(command, **_):
        assert command[1:3] == ["-i", "1"]
        if answer is None:
            raise FileNotFoundError("nvidia-smi")
        return SimpleNamespace(stdout=answer)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setattr(machine, "cpu_name", lambda: "EPYC")
    monkeypatch.setattr(machine, "gpu", machine.gpu.__wrapped__)
    assert machine.gpu() == expected and machine.likely_dtype("cuda") == dtype


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 3}', '{"x": {"tokens_per_second": 0}}'])
def test_damaged_record_is_no_obstacle(content, tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path))
    (tmp_path / "speed.json").write_text(content)
    assert "guess" in predict_seconds(SMOLLM2, 10, fingerprint="x", place=machine.likely_place("cpu")).basis
    record_speed("x", Place("cpu", "fp32"), 5.0)
    assert predict_seconds(SMOLLM2, 10, fingerprint="x", place=Place("cpu", "fp32")).seconds == 2.0
    assert len(json.loads((tmp_path / "speed.json").read_text())) == 1
    with pytest.raises(ValueError, match="not positive"):
        record_speed("x", Place("cpu", "fp32"), 0.0)
