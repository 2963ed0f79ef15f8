"""Predicted time and memory of a training run, from speeds measured on this machine. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tell.config_sections import TrainConfig
from tell.files import write_json
from tell.home import make_folder, tell_home
from tell.models import machine
from tell.models.architecture import Architecture
from tell.models.base import FULL, weight_bytes
from tell.models.flops import adapted_layers, lora_parameters, training_flops
from tell.models.machine import Place
from tell.pass_memory import GRAPHED, SHARE, WORKSPACE, Fit, PassMemory, loss_block, merges, usable

# Sustained LoRA training, GFLOP/s per core, before any run was measured here. Small matrices and LoRA's thin ones
# reach a fifth of the speed of a large product (96 fp32, 437 bf16 on one core of an AMD EPYC with avx512_bf16).
CPU_GFLOPS = {"fp32": 30.0, "avx512_bf16": 80.0, "amx_bf16": 150.0, "bf16": 40.0}
GPU_GFLOPS = {
    "cuda": {"fp32": 8_000.0, "fp16": 20_000.0, "bf16": 40_000.0},  # fp16: of a T4 or V100
    "xpu": {"fp32": 2_000.0, "bf16": 8_000.0},
    "mps": {"fp32": 800.0, "bf16": 800.0},
}
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes of a number
FITTED = ("cpu", "cuda")  # where rows are packed, and passes chosen by memory
_PROCESS_BYTES = 450e6  # Python, torch and transformers themselves, measured
_CONTEXT_BYTES = 500e6  # of CUDA with torch's kernels; an estimate
_HEAD_NORMS = ("qwen3", "gemma3")  # families with norms on queries and keys
_CAPPED = ("gemma2",)  # families with a soft cap on attention scores and logits
_FOUR_NORMS = ("gemma2", "gemma3")  # families with norms after attention and MLP too


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
    """Peak memory of a run, bytes: training, or evaluation where that needs more.

    Attributes:
        weights: of the base model, with room to make a quantised matrix whole.
        adapter: its weights, their copy in the model's format, gradients and moments.
        activations: of the largest pass, with its block of logits.
        graphs: of CUDA graphs, in which a pass is held once more.
        evaluation: of decoding: keys and values, logits, and copies of the weights that an adapter is merged into, or
            of an adapter that is applied beside them.
        process: of Python and its libraries; on a GPU its context and the libraries' workspaces.
        fit: the pass; it fits wherever the device's memory is unknown.
    """

    weights: float
    adapter: float
    activations: float
    graphs: float
    evaluation: float
    process: float
    fit: Fit

    @property
    def total(self) -> float:
        return self.weights + self.process + max(self.adapter + self.activations + self.graphs, self.evaluation)


@dataclass(frozen=True, slots=True)
class Load:
    """What a run gives a model to compute.

    Attributes:
        longest, largest: tokens of the longest row and of the largest step.
        trained_share: share of the tokens that carries loss.
        rows, length: rows decoded at once, and the tokens of one with its answer.
        soft: rows are trained on distributions.
        copied: most tokens of a shared prefix whose keys and values a pass on a GPU copies.
    """

    longest: int
    largest: int
    trained_share: float = 1.0
    rows: int = 0
    length: int = 0
    soft: bool = False
    copied: int = 0


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
    train: TrainConfig,
    load: Load,
    *,
    place: Place | None = None,
    free: float | None = None,
    base: str = FULL,
) -> Memory:
    """Peak memory of LoRA training and of evaluation after it; passes and recomputation as training would choose them.

    Args:
        free: bytes of the device before anything is loaded; None where they are unknown.
        base: ``model.base``.
    """
    device, dtype = place = place or machine.likely_place()
    width, gpu = WIDTHS[dtype], device == "cuda"
    trained, flat = lora_parameters(arch, train.lora_r, train.lora_targets), gpu and train.fast == "auto"
    adapter = (16.0 + (width if flat else 0)) * trained  # fp32 weight, gradient, two moments; a copy
    # the matrix of the largest product is made whole where the weights are quantised
    whole = 0.0 if base == FULL else 2.0 * arch.intermediate * arch.hidden * width
    weights, process = weight_bytes(arch, base, width) + whole, _CONTEXT_BYTES if gpu else _PROCESS_BYTES
    one, graphs = pass_memory(arch, train, load, place=place), _replayed(arch, train, place)
    room = 1e18 if free is None else usable(free - weights - process, device, adapter)
    micro = train.micro_tokens if gpu and free is not None else train.forward_tokens
    level = train.recompute if device in FITTED else train.recompute or 0
    fit = one.choose(room, longest=load.longest, largest=load.largest, micro=micro, level=level, graphs=graphs)
    decoding = 2.0 * arch.kv_heads * arch.head_dim * arch.layers * width * load.rows * load.length
    copies = float(width) * arch.linear_parameters if base == FULL else 0.0
    if gpu:  # rows wait where theirs would take more
        left = math.inf if free is None else max(0.0, free - weights - process)
        decoding, copies = min(decoding, left / SHARE), copies if merges(copies, left) else 0.0
    # beside the weights: its factors, and once more as the decoder joins them, with half as many zeros between blocks
    beside = 2.5 * width * trained if gpu and not copies else 0.0
    evaluation = decoding + copies + beside + load.rows * arch.vocab * (width + 8.0)
    again = fit.bytes if graphs and not fit.level else 0.0
    return Memory(weights, adapter, fit.bytes, again, evaluation, process + (WORKSPACE if gpu else 0), fit)


def _replayed(arch: Architecture, train: TrainConfig, place: Place) -> bool:
    """Whether passes without recomputation become CUDA graphs, as far as that is known without torch."""
    if place.device != "cuda" or train.fast != "auto" or train.neftune_alpha or arch.parameters > GRAPHED:
        return False
    capable = (machine.gpu()[1] or machine.BF16_CAPABILITY) >= machine.BF16_CAPABILITY  # of flash attention
    return capable and place.dtype != "fp32" and arch.model_type not in _CAPPED


def pass_memory(arch: Architecture, train: TrainConfig, load: Load, *, place: Place) -> PassMemory:
    """What a pass keeps, by the operations of the fast path; on other devices, and without it, by transformers' own."""
    width, entry = WIDTHS[place.dtype], float(arch.hidden * WIDTHS[place.dtype])
    if place.device in FITTED and train.fast == "auto":
        gpu, rest = place.device == "cuda", 3 * entry + 4
        kept = fused_bytes(arch, width, rank=train.lora_r, targets=train.lora_targets, gpu=gpu)
        capped = arch.model_type in _CAPPED
        fused = gpu or not capped  # the kernels for CPUs know no cap
        block = loss_block(place.device, arch.vocab, width=width, fused=fused, soft=load.soft, capped=capped)
        one = PassMemory(arch.layers, kept, entry, rest, block)
        return one.copying(load.copied if gpu else 0, 2.0 * arch.kv_heads * arch.head_dim * width)
    logits = (2.0 * width + 12) * arch.vocab * load.trained_share  # their fp32 copy, log-probabilities and gradient
    return PassMemory(arch.layers, _plain_bytes(arch, place.dtype, train.lora_r), entry, entry + logits, 0.0)


def fused_bytes(arch: Architecture, width: int, *, rank: int, targets: str, gpu: bool = False) -> float:
    """Bytes per token that one decoder layer keeps for its backward pass on the fast path (`train/fast/fused_ops.py`).

    Attention in blocks (a soft cap, a GPU without flash attention) keeps its probabilities too, which are not counted.

    Args:
        width: bytes of a number of the model's format.
        rank, targets: of the adapter.
        gpu: the outputs of norms are made again on the way back.
    """
    hidden, queries, keys = arch.hidden, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    adapted = set(adapted_layers(arch, targets))
    numbers = {
        "inputs of the two norms": 2 * hidden,
        "input of q, k, v": hidden if not gpu and adapted & {"q_proj", "k_proj", "v_proj", "qkv_proj"} else 0,
        "q, k, v": queries + 2 * keys,
        "output of attention, which is the input of o": queries,
        "input of gate and up": hidden if not gpu and adapted & {"gate_proj", "up_proj", "gate_up_proj"} else 0,
        "gate and up, from which the input of down is made again": 2 * arch.intermediate,
        "inner states of the adapters": rank * len(adapted),
    }
    scales = 2 + arch.heads  # fp32: of the norms, and each head's logsumexp
    if arch.model_type.startswith(_HEAD_NORMS):
        numbers["normed q and k"] = queries + keys
        scales += arch.heads + arch.kv_heads
    if arch.model_type.startswith(_FOUR_NORMS):
        numbers["inputs of two more norms"] = 2 * hidden
        scales += 2
    return float(width * sum(numbers.values()) + 4 * scales)


def _plain_bytes(arch: Architecture, dtype: str, rank: int) -> float:
    """The same for transformers' and peft's own modules.

    Counted on SmolLM2-135M (37,141 bytes in bf16, 40,221 in fp32, both met within 1 %): adapters keep their inputs in
    fp32, the two norms one copy each, the MLP three of its width.
    """
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    if dtype != "fp32":
        kept = 4 * (8 * arch.hidden + arch.intermediate) + 2 * (3 * arch.intermediate + 2 * q + 2 * kv)
    else:
        kept = 4 * (5 * arch.hidden + 4 * arch.intermediate + q + 2 * kv)
    return float(kept + 7 * 4 * rank)


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
