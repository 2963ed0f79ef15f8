"""Reads the files of a LoRA adapter and validates them: they may be truncated, or written by another tool."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tell.errors import TellError, first_line, is_panic
from tell.files import read_json
from tell.folder import AdapterFolder

REMEDY = "Fetch or train the adapter again."


def read_adapter(folder: Path) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """Scale, and (A, B) of each adapted module by name, of an adapter in peft's format.

    Raises:
        TellError: there is none, it is damaged, or it has more than plain LoRA.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = AdapterFolder(folder).weights
    if not path.exists():
        raise TellError("has no adapter_model.safetensors", where=str(folder), remedy="Use a finished run.")
    scale = _scale(AdapterFolder(folder).config)
    try:
        tensors = load_file(str(path))
    except BaseException as error:
        known = isinstance(error, SafetensorError | OSError | ValueError | KeyError | RuntimeError)
        if not known and not is_panic(error):
            raise
        raise TellError(f"cannot be read ({first_line(error)})", where=str(path), remedy=REMEDY) from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part, tail = key.removeprefix("base_model.model.").rpartition(".lora_")
        if not part or tail not in ("A.weight", "B.weight") or tensor.ndim != 2:
            remedy = "Load it with peft instead."
            raise TellError(f"contains {key}, which plain LoRA lacks", where=str(path), remedy=remedy)
        if not torch.isfinite(tensor).all():
            raise TellError(f"{key} has values that are not finite", where=str(path), remedy=REMEDY)
        pairs.setdefault(name, {})[tail[0]] = tensor
    if not pairs:
        raise TellError("has no LoRA weights", where=str(path), remedy=REMEDY)
    for name, pair in pairs.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise TellError(f"the A and B matrices of {name} do not match", where=str(path), remedy=REMEDY)
    return scale, {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def _scale(path: Path) -> float:
    try:
        config: dict[str, Any] = read_json(path, remedy=REMEDY)
    except FileNotFoundError as error:
        raise TellError("is missing", where=str(path), remedy=REMEDY) from error
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise TellError("is not a plain LoRA adapter", where=str(path.parent), remedy="Load it with peft instead.")
    found: dict[str, float] = {}
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise TellError(f"{key} is {value!r}", where=str(path), remedy=REMEDY)
        found[key] = value
    rank = found["r"]
    return found["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
