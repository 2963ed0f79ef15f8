"""Adapter files that are cut short, empty, or hold values that are not finite are refused, not merged as nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tell.config_sections import TrainConfig
from tell.errors import TellError
from tell.train.adapter_file import read_adapter
from tell.train.lora import adapter_factors, add_lora, save_adapter


@pytest.fixture
def adapter(tmp_path: Path, tiny_model) -> Path:
    from transformers import AutoModelForCausalLM

    model = add_lora(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), TrainConfig(lora_r=2), seed=1)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def with_tensors(change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(change(tensors), folder / "adapter_model.safetensors")

    return damage


def first(tensors: dict, part: str) -> str:
    return next(key for key in tensors if part in key)


def with_config(**facts):
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return damage


def cut(name: str, left: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:left])


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DAMAGED = {
    "no tensors": (with_tensors(lambda t: {}), "has no LoRA weights"),
    "no A": (with_tensors(lambda t: {k: v for k, v in t.items() if "lora_A" not in k}), "do not match"),
    "no B": (with_tensors(lambda t: {k: v for k, v in t.items() if "lora_B" not in k}), "do not match"),
    "NaN": (with_tensors(lambda t: t | {(k := first(t, "lora_A")): t[k] * torch.nan}), "not finite"),
    "infinite": (with_tensors(lambda t: t | {(k := first(t, "lora_B")): t[k] + torch.inf}), "not finite"),
    "more than LoRA": (with_tensors(lambda t: t | {"base_model.model.bias": torch.zeros(2)}), "plain LoRA lacks"),
    "other ranks": (
        with_tensors(lambda t: t | {(k := first(t, "lora_A")): t[k][:1].clone()}),
        "do not match",
    ),
    "header alone": (cut(WEIGHTS, 200), "cannot be read"),
    "empty": (cut(WEIGHTS, 0), "cannot be read"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json: is missing"),
    "config cut short": (cut(CONFIG, 40), "not valid JSON"),
    "config of a list": (lambda folder: (folder / CONFIG).write_text("[]"), "is not a JSON object"),
    "rank 0": (with_config(r=0), "r is 0"),
    "rank of text": (with_config(r="8"), "r is '8'"),
    "infinite scale": (with_config(lora_alpha=float("inf")), "lora_alpha is inf"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_adapter_is_refused(kind, adapter):
    damage, said = DAMAGED[kind]
    damage(adapter)
    with pytest.raises(TellError, match=said):
        read_adapter(adapter)


def test_a_whole_one_is_read_and_sizes_are_held_against_the_model(adapter, tiny_model):
    from transformers import AutoModelForCausalLM

    scale, pairs = read_adapter(adapter)
    assert scale == 32.0 / 2 and all(a.shape[0] == b.shape[1] == 2 for a, b in pairs.values())
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    assert adapter_factors(model, adapter)[0].keys() == pairs.keys()
    with_tensors(lambda t: t | {(k := first(t, "lora_B")): t[k][:8].clone()})(adapter)
    with pytest.raises(TellError, match="size differs"):
        adapter_factors(model, adapter)
    other = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with pytest.raises(TellError, match="the model lacks"):
        adapter_factors(other.model.layers[0], adapter)
