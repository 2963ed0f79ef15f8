"""Sizes of a model from its ``config.json`` and the headers of its safetensors. Reads no weights, imports no torch."""

from __future__ import annotations

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
_TIED_BY_DEFAULT = ("gemma", "gpt2", "bloom", "cohere")


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes that counting FLOPs and memory needs.

    Attributes:
        parameters: all parameters; tied embeddings count once.
        linear_parameters: weights of the matrices inside the blocks. Of a mixture of experts all are counted.
        embedding_parameters: the token embedding, and the output layer where it is not tied.
        max_positions: longest row the positions allow, in tokens, or None where the config does not say.
        exact: True where the counts come from the weights' headers, False where from the config alone.
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


def read_architecture(folder: Path, config: Mapping[str, Any]) -> Architecture:
    """Sizes of the model in ``folder``, whose parsed ``config.json`` is ``config``.

    Raises:
        TellError: the config lacks a size, or a weight file is no readable safetensors.
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
        counts = _estimate(bool(tied), vocab, model_type, **shape)
    return Architecture(
        model_type=model_type,
        architectures=tuple(config.get("architectures") or ()),
        vocab=vocab,
        tied=bool(tied),
        max_positions=size("max_position_embeddings", "n_positions", "n_ctx", "seq_length", default=0) or None,
        exact=bool(files),
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
        raise TellError("is no index of safetensors", where=str(index), remedy="Fetch the model again.")
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
                "is a Git LFS pointer, not the weights" if pointer else f"is no readable safetensors file ({error})",
                where=str(file),
                remedy="Run git lfs pull in its folder." if pointer else "Fetch the file again; it may be cut short.",
            ) from error
        for name, shape in shapes.items():
            count = 1
            for side in shape:
                count *= side
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


def _estimate(
    tied: bool,
    vocab: int,
    model_type: str,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> dict[str, int]:
    """Llama's layout: q, k, v, o, a gated MLP and two norms a block. GPT-2's kind has an MLP of two matrices."""
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    gated = not model_type.startswith(("gpt", "bloom", "opt", "falcon", "phi-", "starcoder"))
    linear = layers * (attention + (3 if gated else 2) * hidden * intermediate)
    embedding = vocab * hidden * (1 if tied else 2)
    norms = (2 * layers + 1) * hidden
    return {
        "parameters": linear + embedding + norms,
        "linear_parameters": linear,
        "embedding_parameters": embedding,
    }
