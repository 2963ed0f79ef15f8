"""Tiny random models of each family, made on the spot: ``python tests/tiny.py qwen3 /tmp/tiny-qwen3``.

Their chat templates keep the families' real habits, because those are the traps: a default system turn (llama as
SmolLM2, qwen2), an empty thought before the last answer, and thoughts that are cut out of answers (qwen3),
a system role that is refused (gemma2, mistral) or folded into the user turn (gemma3), a begin token both in the
template and added by the tokenizer (gemma, mistral), an end of turn other than the end token (gemma, phi3).
"""

from __future__ import annotations

import sys
from pathlib import Path

CORPUS = """\
Once upon a time there was a small model that learned from few examples. It read each one with care.
The quick brown fox jumps over the lazy dog, and the dog does not mind at all: it sleeps in the sun.
{"category": "billing", "urgent": true, "amount": 12.50, "tags": ["refund", "invoice"], "summary": null}
{"category": "shipping", "urgent": false, "amount": null, "tags": [], "summary": "Where is my parcel?"}
Below is an instruction that describes a task. Write a response that completes the request.
Question: What is the capital of Iceland? Answer: Reykjavik. How many people live there? About 140,000.
You are a helpful assistant. Answer in JSON. Translate the sentence into German: Das ist ein kleiner Test.
positive negative neutral yes no 0 1 2 3 4 5 6 7 8 9 2023 2024 2025
def add(a, b):
    return a + b
"""

_CHATML = (
    "{%% for message in messages %%}{%% if loop.first and messages[0]['role'] != 'system' %%}%s{%% endif %%}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}"
)
_SMOLLM2 = _CHATML % (
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
)
_QWEN2 = _CHATML % "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
_QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set said = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
_GEMMA_TURNS = (
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') + message['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% set turns = messages %}{% set prefix = '' %}" + _GEMMA_TURNS
)
_GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}" + _GEMMA_TURNS
)
_PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)

# family -> (special tokens, begin token or None, end token, pad token, ids that end an answer, chat template)
_STYLES: dict[str, tuple[list[str], str | None, str, str, list[str], str]] = {
    "llama": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|im_end|>", [], _SMOLLM2),
    "qwen2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|endoftext|>", [], _QWEN2),
    "qwen3": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        None,
        "<|im_end|>",
        "<|endoftext|>",
        [],
        _QWEN3,
    ),
    "gemma2": (
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<pad>",
        ["<end_of_turn>"],
        _GEMMA2,
    ),
    "gemma3": (
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<pad>",
        ["<end_of_turn>"],
        _GEMMA3,
    ),
    "phi3": (
        ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        None,
        "<|endoftext|>",
        "<|endoftext|>",
        ["<|end|>"],
        _PHI3,
    ),
    "mistral": (["<unk>", "<s>", "</s>"], "<s>", "</s>", "</s>", [], _MISTRAL),
}
FAMILIES: tuple[str, ...] = tuple(_STYLES)
NO_SYSTEM: frozenset[str] = frozenset({"gemma2", "mistral"})
"""Families whose template refuses a system turn."""


def make_tiny(family: str, folder: Path, *, seed: int = 0, vocab: int = 512, template: bool = True) -> Path:
    """Save a random model of ``family`` with its tokenizer in ``folder`` and return ``folder``.

    Hidden 64, 2 layers (gemma: 3, so that both kinds of attention occur), 4 heads over 2 key-value heads,
    intermediate 128, sliding window of 32 tokens where the family has one. Float32 safetensors. The same arguments
    give the same bytes of weights and tokenizer.

    Args:
        family: one of `FAMILIES`.
        vocab: tokens of the byte-level BPE tokenizer, at least 300.
        template: False leaves the chat template out.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    tokenizer = _tokenizer(family, vocab, template)
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(_STYLES[family][4])]
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(family, len(tokenizer), tokens), dtype=torch.float32)
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(family: str, vocab: int, template: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special, begin, end, pad, _, chat = _STYLES[family]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    if begin:  # as the real ones: encode() adds the begin token that the template also writes
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, backend.token_to_id(begin))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    if template:
        tokenizer.chat_template = chat
    return tokenizer


def _config(family: str, vocab: int, tokens: dict):
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        Qwen2Config,
        Qwen3Config,
    )

    shape = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        # near 1/sqrt(64): at the usual 0.02 attention is uniform and a wrong mask would change nothing
        "initializer_range": 0.12,
        **tokens,
    }
    if family == "llama":
        return LlamaConfig(**shape, tie_word_embeddings=True)
    if family == "qwen2":
        return Qwen2Config(**shape, tie_word_embeddings=True)
    if family == "qwen3":
        return Qwen3Config(**shape, head_dim=32, tie_word_embeddings=True)
    if family == "phi3":
        return Phi3Config(**shape, original_max_position_embeddings=1024, tie_word_embeddings=False)
    if family == "mistral":
        return MistralConfig(**shape, sliding_window=32, tie_word_embeddings=False)
    shape |= {"num_hidden_layers": 3, "sliding_window": 32, "head_dim": 16, "query_pre_attn_scalar": 16}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    kind = Gemma2Config if family == "gemma2" else Gemma3TextConfig
    return kind(**shape, layer_types=layers, tie_word_embeddings=True)


if __name__ == "__main__":
    print(make_tiny(sys.argv[1], Path(sys.argv[2])))
