"""Predicted time and memory of a training run, from speeds measured on this machine. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tell.files import write_json
from tell.home import make_folder, tell_home
from tell.models import machine
from tell.models.architecture import Architecture
from tell.models.base import FULL, weight_bytes
from tell.models.flops import training_flops
from tell.models.machine import Place

# Sustained LoRA training, GFLOP/s per core, before any run was measured here. Small matrices and LoRA's thin ones
# reach a fifth of the speed of a large product (96 fp32, 437 bf16 on one core of an AMD EPYC with avx512_bf16).
CPU_GFLOPS = {"fp32": 30.0, "avx512_bf16": 80.0, "amx_bf16": 150.0, "bf16": 40.0}
GPU_GFLOPS = {
    "cuda": {"fp32": 8_000.0, "bf16": 40_000.0},
    "xpu": {"fp32": 2_000.0, "bf16": 8_000.0},
    "mps": {"fp32": 800.0, "bf16": 800.0},
}
_PROCESS_BYTES = 450e6  # Python, torch and transformers themselves, measured


@dataclass(frozen=True, slots=True)
class Prediction:
    """Training time.

    Attributes:
        seconds: wall-clock time of the optimiser steps; loading and evaluation not included.
        basis: source of the prediction, in words: ``"measured on this machine"``, ``"guess from 2 cores"``.
        measured: True where a run of this very model was measured on this machine.
    """

    seconds: float
    basis: str
    measured: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory of training, bytes."""

    weights: float
    adapter: float
    activations: float
    logits: float
    process: float

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.activations + self.logits + self.process


def record_speed(
    fingerprint: str, place: Place, tokens_per_second: float, *, answer_tokens_per_second: float | None = None
) -> None:
    """Remember the training speed of a run for `predict_seconds`; it replaces an earlier one.

    Args:
        fingerprint: of the `ModelFiles`.
        place: where it trained.
        tokens_per_second: tokens computed per second of training.
        answer_tokens_per_second: tokens decoded per second; None keeps the recorded value.

    Raises:
        ValueError: a speed that is not positive.
        TellError: `tell_home` cannot be written.
    """
    if not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second is {tokens_per_second}, not positive")
    from filelock import FileLock

    make_folder(tell_home())
    with FileLock(tell_home() / ".speed.lock"):  # two runs may end at the same time
        records = _records()
        key = _key(fingerprint, place)
        known = records.get(key, {}).get("answer_tokens_per_second")
        records[key] = {
            "tokens_per_second": tokens_per_second,
            "answer_tokens_per_second": answer_tokens_per_second or known,
        }
        write_json(_file(), records)


def predict_seconds(
    arch: Architecture,
    tokens: float,
    *,
    trained_tokens: float | None = None,
    lengths: Sequence[int] | None = None,
    lora_parameters: int = 0,
    fingerprint: str | None = None,
    place: Place | None = None,
) -> Prediction:
    """Time to train on ``tokens`` tokens (all epochs together).

    From this model's speed measured on this machine; else from its FLOPs and a typical speed per core.

    Args:
        fingerprint: of the `ModelFiles`.
        place: where it trains; None for the likely place.

    The other arguments are those of `training_flops`.
    """
    device, dtype = place = place or machine.likely_place()
    own = _records().get(_key(fingerprint, place))
    if own:
        return Prediction(tokens / own["tokens_per_second"], "measured on this machine", True)
    flops = training_flops(
        arch, tokens, trained_tokens=trained_tokens, lengths=lengths, lora_parameters=lora_parameters
    )
    if device in GPU_GFLOPS:
        return Prediction(flops / (GPU_GFLOPS[device][dtype] * 1e9), f"guess for a GPU in {dtype}", False)
    cores = machine.cores()
    kind = (machine.cpu_bf16() or "bf16") if dtype == "bf16" else dtype
    speed = CPU_GFLOPS.get(kind, CPU_GFLOPS["bf16"]) * cores * 1e9
    return Prediction(flops / speed, f"guess from {cores} core{'s' if cores > 1 else ''} in {dtype}", False)


def answer_speed(fingerprint: str, place: Place) -> float | None:
    """Tokens per second that this model decodes on this machine; None where that was not measured."""
    speed = _records().get(_key(fingerprint, place), {}).get("answer_tokens_per_second")
    return float(speed) if speed else None


def predict_memory(
    arch: Architecture,
    *,
    micro_tokens: int,
    trained_share: float = 1.0,
    lora_parameters: int = 0,
    lora_rank: int = 8,
    place: Place | None = None,
    base: str = FULL,
) -> Memory:
    """Peak memory of LoRA training on all linear layers without gradient checkpointing.

    Bytes kept by autograd per token and block were counted on SmolLM2-135M (37,141 bytes in bf16, 40,221 in fp32, both
    met within 1 %): adapters keep their inputs in fp32, the two norms one copy each, the MLP three of its width.

    Args:
        micro_tokens: tokens in one forward pass.
        trained_share: share of them that carries loss, and so needs logits.
        base: ``model.base``.
    """
    dtype = (place or machine.likely_place()).dtype
    width = 2 if dtype == "bf16" else 4
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    if dtype == "bf16":
        kept = 4 * (8 * arch.hidden + arch.intermediate) + 2 * (3 * arch.intermediate + 2 * q + 2 * kv)
    else:
        kept = 4 * (5 * arch.hidden + 4 * arch.intermediate + q + 2 * kv)
    kept += 7 * 4 * lora_rank
    return Memory(
        weights=weight_bytes(arch, base, width),
        adapter=16.0 * lora_parameters,  # fp32 weight, gradient, two moments of AdamW
        activations=float(kept) * arch.layers * micro_tokens,
        # logits, their fp32 copy, log-probabilities and gradient
        logits=(2.0 * width + 12) * arch.vocab * micro_tokens * trained_share,
        process=_PROCESS_BYTES,
    )


def _file() -> Path:
    return tell_home() / "speed.json"


def _key(fingerprint: str | None, place: Place) -> str:
    # the home may be shared between machines, and a container's cores may change
    hardware = machine.gpu()[0] if place.device == "cuda" else f"{machine.cpu_name()} x {machine.cores()}"
    return f"{hardware} | {place.device} {place.dtype} | {fingerprint}"


def _records() -> dict[str, dict[str, Any]]:
    """The readable records; none of a damaged file."""
    try:
        data = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {k: r for k, r in data.items() if isinstance(r, dict) and _is_speed(r.get("tokens_per_second"))}


def _is_speed(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")
