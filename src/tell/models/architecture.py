"""Sizes of a model from its ``config.json`` and the headers of its safetensors. Reads no weights, imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tell.errors import TellError
from tell.files import read_json

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # the names transformers loads
_BLOCK = re.compile(r"(^|\.)(layers|h|blocks|block)\.\d+\.")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")

# config.json leaves out what equals the class's default; google/gemma-3-4b-it leaves out all of these
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
    }
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TIED_BY_DEFAULT = ("gemma", "gpt2", "bloom", "cohere")


_ATTENTION = frozenset({"full_attention", "sliding_attention"})
# What config.json does not state, as transformers 5 builds these families. Only our attention function separates packed
# rows: models that mix tokens elsewhere, or need what that function does not compute, cannot be trained.
_UNFIT = {
    "attention sinks": "flint gpt_oss granite_swa granitemoe_swa mimo_v2_flash",
    "attention of its own": (
        "big_bird bloom codegen cpmant falcon gpt_neox_japanese gptj megatron-bert mpt mvp openai-gpt rembert roformer "
        "rwkv trocr xglm xlm xlnet"
    ),
    "layers that are not attention": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid inkling_text inkling2_text jamba kimi_linear "
        "lfm2_moe lfm3 llama4_text mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text "
        "qwen3_next qwen4_exp_text recurrent_gemma xlstm zamba zamba2"
    ),
    "indexed attention": "axk2 deepseek_v32 deepseek_v4 glm_moe_dsa hy_v4",
}
_UNFIT_FAMILIES = {family: what for what, families in _UNFIT.items() for family in families.split()}


def unfit(config: Mapping[str, Any]) -> str | None:
    """Why a model cannot be trained over packed rows, as far as its parsed ``config.json`` shows; else None."""
    text = config.get("text_config") or config
    layers = text.get("layer_types")
    other = {str(kind) for kind in layers} - _ATTENTION if isinstance(layers, list) else set()
    if other:
        return f"{min(other)} layers"
    family = str(text.get("model_type") or config.get("model_type") or "")
    attending = text.get("full_attn_idxs")  # LFM2: the other layers are convolutions
    if family == "lfm2" and isinstance(attending, list) and len(attending) < (text.get("num_hidden_layers") or 0):
        return "conv layers"
    return _UNFIT_FAMILIES.get(family) or _UNFIT_FAMILIES.get(f"{family}_text")


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes for counting FLOPs and memory.

    Attributes:
        parameters: all parameters; tied embeddings count once.
        linear_parameters: weights of the matrices inside the blocks, including all experts of a mixture.
        embedding_parameters: the token embedding, and the output layer where it is not tied.
        experts: number in each layer of a mixture; 0 for a dense model.
        max_positions: longest row, in tokens, or None where the config does not state it.
        exact: whether the counts come from the weights' headers; else they are estimated from the config.
    """

    model_type: str
    architectures: tuple[str, ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_positions: int | None
    parameters: int
    linear_parameters: int
    embedding_parameters: int
    exact: bool
    experts: int = 0


def read_architecture(folder: Path, config: Mapping[str, Any]) -> Architecture:
    """Sizes of the model in ``folder``, whose parsed ``config.json`` is ``config``.

    Raises:
        TellError: the config lacks a size, or a weight file is not readable as safetensors.
    """
    text = config.get("text_config") or config
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    values = {**_DEFAULTS.get(model_type, {}), **{k: v for k, v in text.items() if v is not None}}

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            if isinstance(values.get(name), int):
                return values[name]
        if default is None:
            raise TellError(
                f"has no {names[0]}",
                where=str(folder / "config.json"),
                remedy="Save the model again with a current transformers (save_pretrained writes it).",
            )
        return default

    hidden = size("hidden_size", "n_embd", "d_model")
    heads = size("num_attention_heads", "n_head", "num_heads")
    vocab = size("vocab_size")
    shape = {
        "layers": size("num_hidden_layers", "n_layer", "num_layers"),
        "hidden": hidden,
        "intermediate": size("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        "heads": heads,
        "kv_heads": size("num_key_value_heads", "num_kv_heads", default=heads),
        "head_dim": size("head_dim", default=hidden // heads),
    }
    tied = values.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is None:
        tied = model_type.startswith(_TIED_BY_DEFAULT)
    files = weight_files(folder)
    if files:
        counts, tied, vocab = _count_headers(files, bool(tied), vocab)
    else:
        counts = _estimate(shape, tied=bool(tied), vocab=vocab, model_type=model_type)
    return Architecture(
        model_type=model_type,
        architectures=tuple(config.get("architectures") or ()),
        vocab=vocab,
        tied=bool(tied),
        max_positions=size("max_position_embeddings", "n_positions", "n_ctx", "seq_length", default=0) or None,
        exact=bool(files),
        experts=size(*_EXPERTS, default=0),
        **shape,
        **counts,
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that transformers would load from ``folder``; [] where one is missing.

    Raises:
        TellError: the index of the shards is broken.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        return []
    weights = read_json(index, remedy="Fetch the model again.").get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(n, str) and "/" not in n for n in weights.values()):
        raise TellError("is not an index of safetensors", where=str(index), remedy="Fetch the model again.")
    names = sorted(set(weights.values()))
    files = [folder / name for name in names]
    return files if all(file.exists() for file in files) else []


def _count_headers(files: list[Path], tied: bool, vocab: int) -> tuple[dict[str, int], bool, int]:
    from safetensors import SafetensorError, safe_open

    total = linear = embedding = head = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            pointer = file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs")
            raise TellError(
                "is a Git LFS pointer, not the weights" if pointer else f"is not readable as safetensors ({error})",
                where=str(file),
                remedy="Run git lfs pull in its folder." if pointer else "Fetch the file again; it may be truncated.",
            ) from error
        for name, shape in shapes.items():
            count = math.prod(shape)
            total += count
            if _BLOCK.search(name):
                linear += count if len(shape) >= 2 else 0
            elif _EMBEDDING.search(name):
                embedding += count
                vocab = shape[0]
            elif _HEAD.search(name):
                head += count
    if head and tied:  # saved twice, used once
        total, head = total - head, 0
    counts = {"parameters": total, "linear_parameters": linear, "embedding_parameters": embedding + head}
    return counts, tied or not head, vocab


def _estimate(shape: Mapping[str, int], *, tied: bool, vocab: int, model_type: str) -> dict[str, int]:
    """Llama's layout: q, k, v, o, a gated MLP and two norms per block. GPT-2 and the like have an ungated MLP."""
    layers, hidden = shape["layers"], shape["hidden"]
    attention = 2 * hidden * shape["head_dim"] * (shape["heads"] + shape["kv_heads"])
    gated = not model_type.startswith(("gpt", "bloom", "opt", "falcon", "phi-", "starcoder"))
    linear = layers * (attention + (3 if gated else 2) * hidden * shape["intermediate"])
    embedding = vocab * hidden * (1 if tied else 2)
    total = linear + embedding + (2 * layers + 1) * hidden
    return {"parameters": total, "linear_parameters": linear, "embedding_parameters": embedding}
