"""LoRA adapters through peft, with one fused product for the layers that carry them.

peft's own forward casts the layer's input to the adapter's fp32 and back and adds three intermediate
results; on a CPU that costs more than the adapter's arithmetic. The fused forward below computes the same
function: y = x W^T + b + s (dropout(x) A^T) B^T, with A and B kept in fp32 and cast, small as they are, to
the input's dtype. It serves where ``fused.py`` does not join layers: on a GPU, without kernels, in unusual modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from tell.config import TrainConfig
from tell.errors import TellError
from tell.generate.room import SHARE, free_bytes
from tell.train.fused_ops import Projection, Stack

QKV = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "W_pack")
DEFAULT = "default"  # peft's name of an only adapter


def _fused_forward(layer: Any) -> Any:
    """The forward that replaces peft's on one LoRA layer while training."""
    base, a, b = layer.get_base_layer(), layer.lora_A[DEFAULT], layer.lora_B[DEFAULT]
    scale, dropout = float(layer.scaling[DEFAULT]), layer.lora_dropout[DEFAULT]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        if layer.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
            inner = linear(dropout(x), (a.weight * scale).to(x.dtype))
            return base(x) + linear(inner, b.weight.to(x.dtype))
        stack = Stack(base.weight, base.bias, (len(base.weight),), (scale,), 0.0)
        return Projection.apply(x, stack, a.weight, b.weight)[0]

    return forward


def lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import Linear

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def fuse(model: Any) -> None:
    """Give every LoRA layer over a plain ``nn.Linear`` the fused forward."""
    for _, layer in lora_layers(model):
        if type(layer.get_base_layer()) is nn.Linear and not layer.lora_bias.get(DEFAULT, False):
            layer.forward = _fused_forward(layer)


def target_modules(model: Any, targets: str) -> str | list[str]:
    """peft's ``target_modules`` for ``all-linear``, ``qkv`` or a list of module names.

    Raises:
        TellError: none of the names is a linear layer of this model.
    """
    if targets == "all-linear":
        return targets
    # The output layer is left out: the loss reads its frozen weight block by block.
    layers = {
        name.rsplit(".", 1)[-1]
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and m is not model.get_output_embeddings()
    }
    wanted = QKV if targets == "qkv" else tuple(part.strip() for part in targets.split(",") if part.strip())
    found = [name for name in wanted if name in layers]
    unknown = [] if targets == "qkv" else [name for name in wanted if name not in layers]
    if unknown or not found:
        raise TellError(
            f"{', '.join(unknown) or targets} names no linear layer",
            where="train.lora_targets",
            remedy=f"Use all-linear, qkv, or some of: {', '.join(sorted(layers))}.",
        )
    return found


def add_lora(model: Any, config: TrainConfig, *, seed: int, fused: bool = True) -> Any:
    """Wrap a frozen causal model with a fresh LoRA adapter, seeded.

    Returns:
        The PeftModel, in training mode, adapters in fp32.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    peft_model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=target_modules(model, config.lora_targets),
        ),
    )
    if fused:
        fuse(peft_model)
    return peft_model.train()


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in peft's format: ``adapter_model.safetensors`` and ``adapter_config.json``."""
    model.save_pretrained(str(folder), safe_serialization=True)
    readme = folder / "README.md"  # peft's template card: all "More information needed"
    readme.unlink(missing_ok=True)


def remove_lora(model: Any) -> Any:
    """The untouched base model back."""
    return model.unload()


@contextmanager
def adapter_merged(model: Any, folder: Path | None) -> Iterator[Any]:
    """The base model with an adapter folded into its weights; the weights are put back exactly afterwards.

    Meanwhile ``merged_adapter`` tells the folder, for an engine that holds the weights itself.

    Args:
        model: the base causal model.
        folder: adapter in peft's format; None leaves the model as it is.
    """
    if folder is None:
        yield model
        return
    factors, scale = adapter_factors(model, folder)
    weights = {name: model.get_submodule(name).weight.data for name in factors}
    on_device = _room_for_copies(list(weights.values()))
    saved: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                a, b = (x.to(weight.device, torch.float32) for x in factors[name])
                merged = (b @ a).mul_(scale)
                merged = (
                    merged.t() if isinstance(model.get_submodule(name), Conv1D) else merged
                )  # GPT-2 keeps (in, out)
                merged += weight
                saved[name] = weight.clone() if on_device else _copy_to_host(weight)
                weight.copy_(merged)  # in place: others may hold views
        model._tell_adapter = folder
        yield model
    finally:
        model._tell_adapter = None
        for name, data in saved.items():
            model.get_submodule(name).weight.data.copy_(data, non_blocking=True)


def _room_for_copies(weights: list[Tensor]) -> bool:
    """Whether copies of ``weights`` stay on their device: on a GPU only where they take a small share of what is free.

    The rest is for the cache of keys and values.
    """
    if not weights or weights[0].device.type != "cuda":
        return True
    return SHARE * sum(weight.nbytes for weight in weights) <= free_bytes(weights[0].device)


def _copy_to_host(weight: Tensor) -> Tensor:
    """A copy in pinned memory, which a GPU fills and reads without being waited for."""
    try:
        host = torch.empty_like(weight, device="cpu", pin_memory=True)
    except RuntimeError:  # the system pins no more
        host = torch.empty_like(weight, device="cpu")
    return host.copy_(weight, non_blocking=True)


def merged_adapter(model: Any) -> Path | None:
    """The folder of the adapter that ``adapter_merged`` holds in the weights of ``model``; None for none."""
    return getattr(model, "_tell_adapter", None)


def adapter_factors(model: Any, folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """(A, B) of each adapted layer by module name, and the scale of B A.

    Raises:
        TellError: the folder holds no LoRA adapter of this model.
    """
    import json

    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise TellError("has no adapter_model.safetensors", where=str(folder), remedy="Give a finished run.")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise TellError("is not a plain LoRA adapter", where=str(folder), remedy="Load it with peft instead.")
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    tensors = load_file(str(path))
    names = {name for name, _ in model.named_modules()}
    factors = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name not in names:
            raise TellError(
                f"adapts {name}, which the model lacks", where=str(folder), remedy="Use its own base model."
            )
        factors[name] = a, tensors[key.replace(".lora_A.", ".lora_B.")]
    return factors, scale
