"""``config.json`` of a model, validated before any value is read: files are truncated, or written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tell.errors import TellError
from tell.files import read_json

REMEDY = "Fetch the model again."
TYPES: dict[str, type | tuple[type, ...]] = {
    "model_type": str,
    "architectures": list,
    "auto_map": dict,
    "quantization_config": dict,
    "text_config": dict,
    "is_encoder_decoder": bool,
    "tie_word_embeddings": bool,
    "rms_norm_eps": (int, float),
    "rope_theta": (int, float),
    "rope_scaling": dict,
    "rope_parameters": dict,
    "layer_types": list,
    "torch_dtype": str,
    "dtype": str,
}
SIZES = frozenset(
    (
        *("hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_layers"),
        *("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "num_kv_heads", "head_dim"),
        *("intermediate_size", "n_inner", "ffn_dim", "vocab_size"),
        *("max_position_embeddings", "n_positions", "n_ctx", "seq_length"),
    )
)
LARGEST = 10**9


def read_config(path: Path) -> dict[str, Any]:
    """The file's object.

    Raises:
        FileNotFoundError: there is none.
        TellError: it is not a JSON object, or a value has the wrong type.
    """
    config = read_json(path, remedy=REMEDY)
    check(config, path)
    return config


def check(config: Mapping[str, Any], path: Path, prefix: str = "") -> None:
    """Refuse values of the wrong type; null means an absent key.

    Raises:
        TellError: such a value.
    """
    for key, value in config.items():
        if value is None:
            continue
        kind = TYPES.get(key)
        wrong = kind is not None and not isinstance(value, kind)
        if key in SIZES:  # some list sizes layer by layer: transformers reads those, we do not count them
            wrong = not isinstance(value, list) and not (type(value) is int and 0 < value <= LARGEST)
        if key in ("architectures", "layer_types"):
            wrong = wrong or not all(isinstance(name, str) for name in value)
        if wrong:
            raise TellError(f"{prefix}{key} is {value!r}", where=str(path), remedy=REMEDY)
        if key == "text_config":
            check(value, path, f"{key}.")
