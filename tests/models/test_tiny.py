"""The tiny models that other tests stand on."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny

CHAT = [{"role": "user", "content": "Wo ist 42?"}, {"role": "assistant", "content": "Hier."}]


def _digest(folder: Path) -> str:
    return hashlib.sha256(
        (folder / "model.safetensors").read_bytes() + (folder / "tokenizer.json").read_bytes()
    ).hexdigest()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_loads_renders_and_generates(family, tiny_model):
    folder = tiny_model(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == {"gemma3": "gemma3_text"}.get(family, family)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and "Hier." in text[len(prompt) :]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids.shape[1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_system_turn_is_refused_where_the_family_refuses_it(family, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    if family in tiny.NO_SYSTEM:
        with pytest.raises(jinja2.TemplateError):
            tokenizer.apply_chat_template(chat, tokenize=False)
    else:
        assert tokenizer.apply_chat_template(chat, tokenize=False).count("Be brief.") == 1


def test_attention_is_not_uniform(tiny_model):
    """A far-away token must change later logits visibly, else no mask test could fail."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    ids = torch.arange(40, 60)[None]
    other = ids.clone()
    other[0, 2] = 100
    assert (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max() > 1e-2


def test_without_template_and_same_bytes_in_another_process(tiny_model, tmp_path):
    assert AutoTokenizer.from_pretrained(tiny_model("qwen2", template=False)).chat_template is None
    subprocess.run([sys.executable, tiny.__file__, "gemma3", str(tmp_path / "m")], check=True, capture_output=True)
    assert _digest(tmp_path / "m") == _digest(tiny_model("gemma3"))
