"""LoRA adapters through peft, with one fused product for the layers that carry them.

peft's own forward casts the layer's input to the adapter's fp32 and back and adds three intermediate results; on a CPU
that costs more than the adapter's arithmetic. The fused forward computes the same function,
y = x W^T + b + s (dropout(x) A^T) B^T, with A and B kept in fp32 and cast, small as they are, to the input's dtype. It
serves where ``fast/fused.py`` does not join layers: without kernels, in unusual modules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from tell.config_sections import TrainConfig
from tell.errors import TellError
from tell.files import sync_files
from tell.folder import AdapterFolder
from tell.kernels.quantised import QuantisedLinear
from tell.pass_memory import merges
from tell.train.adapter_file import read_adapter
from tell.train.device import free_bytes, kept_randomness
from tell.train.fast.base_weight import LINEAR, quantised_weight
from tell.train.fast.fused_ops import Projection, Stack
from tell.train.targets import EXPERTS, refuse_experts
from tell.train.unmerged import adapter_unmerged

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear as LoraLinear
    from transformers import PreTrainedModel

QKV = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "W_pack")
OWN_BASE = "Use its own base model."
DEFAULT = "default"  # peft's name of a sole adapter
# Always written. Other keys are omitted at peft's default: older versions refuse keys they do not know.
WRITTEN = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout"}
    | {"target_modules", "bias", "fan_in_fan_out"}
)


def _fused_forward(layer: LoraLinear) -> Callable[..., Tensor]:
    """The forward that replaces peft's on one LoRA layer while training."""
    parts: tuple[Any, ...] = layer.get_base_layer(), layer.lora_A[DEFAULT], layer.lora_B[DEFAULT]
    base, a, b = parts  # linear layers
    scale, dropout = float(layer.scaling[DEFAULT]), layer.lora_dropout[DEFAULT]

    def forward(x: Tensor, *_: object, **__: object) -> Tensor:
        if layer.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
            inner = linear(dropout(x), (a.weight * scale).to(x.dtype))
            return base(x) + linear(inner, b.weight.to(x.dtype))
        weight = quantised_weight([base]) or base.weight
        stack = Stack(weight, base.bias, (base.out_features,), (scale,), 0.0)
        return Projection.apply(x, stack, a.weight, b.weight)[0]

    return forward


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    from peft.tuners.lora import Linear

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def a_scales(model: nn.Module) -> dict[str, float]:
    """The scale of each layer's adapter, by the parameter name of its A."""
    return {f"{name}.lora_A.{DEFAULT}.weight": float(m.scaling[DEFAULT]) for name, m in lora_layers(model)}


def fuse(model: nn.Module) -> None:
    """Give every LoRA layer over a linear layer, plain or quantised, the fused forward."""
    for _, layer in lora_layers(model):
        if type(layer.get_base_layer()) in LINEAR and not layer.lora_bias.get(DEFAULT, False):
            setattr(layer, "forward", _fused_forward(layer))  # noqa: B010


def target_modules(model: PreTrainedModel, targets: str) -> str | list[str]:
    """peft's ``target_modules`` for ``all-linear``, ``qkv`` or a list of module names.

    Raises:
        TellError: none of the names is a linear layer of this model.
    """
    if targets == "all-linear" and not _joined_experts(model):
        return targets
    # Without the output layer: the loss reads its frozen weight block by block.
    layers = {
        name.rsplit(".", 1)[-1]
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and m is not model.get_output_embeddings()
    }
    if targets == "all-linear":
        return sorted(layers - EXPERTS)
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


def _joined_experts(model: nn.Module) -> bool:
    """Whether the experts of a mixture are one 3D tensor, which no LoRA layer adapts."""
    return any(".experts." in name and weight.ndim == 3 for name, weight in model.named_parameters())


def is_spread(model: PreTrainedModel) -> bool:
    """Whether some weights are elsewhere than the model computes; it answers, but cannot be trained."""
    return any(p.device != model.device for p in model.parameters())


def add_lora(model: PreTrainedModel, config: TrainConfig, *, seed: int, fused: bool = True) -> PeftModel:
    """Wrap a frozen causal model with a fresh, seeded LoRA adapter in fp32; in training mode.

    Raises:
        TellError: the targets name no linear layer, or experts that are one tensor; or the model, larger than its GPU,
            computes with weights from elsewhere (`tell.models.spread`).
    """
    from peft import LoraConfig, get_peft_model

    if is_spread(model):
        raise TellError(
            f"its weights leave {model.device} no room to train",
            where=model.name_or_path,
            remedy="Use model.base=nf4, or train.parallel=fsdp on several GPUs.",
        )
    names = target_modules(model, config.lora_targets)
    if _joined_experts(model):
        refuse_experts(names)
    with kept_randomness(next(model.parameters()).device):
        torch.manual_seed(seed)
        peft_model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=config.lora_r,
                lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft scales by a float as well
                lora_dropout=config.lora_dropout,
                target_modules=names,
            ),
        )
    if fused:
        fuse(peft_model)
    return peft_model.train()


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in peft's format: ``adapter_model.safetensors`` and ``adapter_config.json``."""
    from peft import LoraConfig

    model.save_pretrained(str(folder), safe_serialization=True)
    path, defaults = AdapterFolder(folder).config, LoraConfig().to_dict()
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("peft_version", None)
    if any(getattr(layer.get_base_layer(), "turned", False) for _, layer in lora_layers(model)):
        config["fan_in_fan_out"] = True  # of the original base, which the adapter is used with elsewhere
    kept = {k: v for k, v in config.items() if k in WRITTEN or (v or None) != (defaults.get(k) or None)}
    path.write_text(json.dumps({**kept, "target_modules": sorted(kept["target_modules"])}, indent=2), encoding="utf-8")
    readme = folder / "README.md"  # peft's template card: all "More information needed"
    readme.unlink(missing_ok=True)
    sync_files(folder)


def remove_lora(model: PeftModel) -> PreTrainedModel:
    """Returns the unchanged base model."""
    return model.unload()


@contextmanager
def adapter_applied(model: PreTrainedModel, folder: Path | None) -> Iterator[PreTrainedModel]:
    """The base model with an adapter: merged into its weights, or applied beside them; see `is_merged`.

    To decode inside, use ``DecodingEngine.adapter``, since vLLM has its own copy of the weights.

    Args:
        model: the base causal model, which is exactly as before afterwards.
        folder: adapter in peft's format; None leaves the model as it is.
    """
    if folder is None:
        yield model
        return
    factors, scale = adapter_factors(model, folder)
    way = _merged if is_merged(model, factors) else adapter_unmerged
    with way(model, factors, scale):
        yield model


def is_merged(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether `adapter_applied` merges into the named layers: plain weights, whose originals are few enough to keep.

    Not into weights that are elsewhere than the model computes; see `tell.models.spread`.
    """
    layers = [model.get_submodule(name) for name in names]
    weights = [layer.get_parameter("weight").data for layer in layers]
    plain = not any(isinstance(layer, QuantisedLinear) for layer in layers)
    return plain and all(weight.device == model.device for weight in weights) and _room_for_copies(weights)


@contextmanager
def _merged(model: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Iterator[None]:
    """Inside, the adapter is part of the weights, each rounded once; the originals are kept on their device."""
    saved: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, pair in factors.items():
                weight = model.get_parameter(f"{name}.weight").data
                a, b = (x.to(weight.device, torch.float32) for x in pair)
                merged = (b @ a).mul_(scale)
                if isinstance(model.get_submodule(name), Conv1D):  # GPT-2 keeps (in, out)
                    merged = merged.t()
                merged += weight
                saved[name] = weight.clone()
                weight.copy_(merged)  # in place: others may hold views
        yield
    finally:
        for name, data in saved.items():  # by name: the fused path may have moved a weight meanwhile
            model.get_parameter(f"{name}.weight").data.copy_(data)


def _room_for_copies(weights: list[Tensor]) -> bool:
    """Whether their device keeps copies of ``weights``: a GPU few, and where most of its free memory is left."""
    if not weights or weights[0].device.type != "cuda":
        return True
    return merges(sum(weight.nbytes for weight in weights), free_bytes(weights[0].device))


def adapter_factors(model: nn.Module, folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """(A, B) of each adapted layer by module name, and the scale of B A.

    Raises:
        TellError: the folder holds no LoRA adapter of this model.
    """
    scale, pairs = read_adapter(folder)
    modules = dict(model.named_modules())
    for name, (a, b) in pairs.items():
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if weight is None:
            raise TellError(f"adapts {name}, which the model lacks", where=str(folder), remedy=OWN_BASE)
        shape = (module.out_features, module.in_features) if isinstance(module, QuantisedLinear) else weight.shape
        if sorted(shape) != sorted((b.shape[0], a.shape[1])):
            raise TellError(f"adapts {name}, whose size differs", where=str(folder), remedy=OWN_BASE)
    return pairs, scale
