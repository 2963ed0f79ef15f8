"""Describes a transformers model by the parts of its layers, for the CPU kernels and the static batch of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tell.kernels.decode_ops import LANES, QUERIES, PackedWeight, packs_weights
from tell.train.attention import Rule, RulePlan, use_plan
from tell.train.fast.base_weight import LINEAR, quantised_weight
from tell.train.fast.exchange import is_plain
from tell.train.torch_types import AnyModule
from tell.train.unmerged import adapted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from tell.train.step import Body

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"})
DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})  # other kinds depend on the row's length
SILU, GELU_TANH = 0, 1
_ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH}

_rules: WeakKeyDictionary[Body, list[Rule]] = WeakKeyDictionary()  # cache


@dataclass(slots=True)
class Layer:
    """One decoder layer. Norm weights are fp32 with any added 1 folded in; None where the layer has no such norm."""

    attention: nn.Module
    qkv: tuple[nn.Linear, ...]
    output: nn.Linear
    gate_up: tuple[nn.Linear, ...]
    down: nn.Linear
    before_attention: Tensor
    after_attention: Tensor | None
    before_mlp: Tensor
    after_mlp: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    rope: str  # name of its rotary table

    def products(self) -> tuple[tuple[nn.Linear, ...], ...]:
        """Linear layers in execution order; those with the same input are grouped."""
        return self.qkv, (self.output,), self.gate_up, (self.down,)


@dataclass(slots=True)
class Description:
    """A decoder by its parts.

    Attributes:
        exact_norms: the norms' weights are those of the model's number format, nothing added (Gemma adds 1 in fp32).
        adapted: an adapter is applied beside some of the linear layers.
        quantised: some of the linear layers are `QuantisedLinear`.
    """

    layers: list[Layer]
    embedding: Tensor
    embedding_scale: float
    norm: Tensor
    eps: float
    heads: int
    kv_heads: int
    width: int
    activation: int
    rotary: nn.Module
    dtype: torch.dtype
    exact_norms: bool
    adapted: bool
    quantised: bool

    def rotary_tables(self, positions: int) -> dict[str, tuple[Tensor, Tensor]]:
        """rope name: cosine and sine (positions, rotated width) in fp32, rounded as the model rounds them."""
        at = torch.arange(positions, device=self.embedding.device)[None]
        like = self.embedding.new_zeros(1)
        tables = {}
        for name in {layer.rope for layer in self.layers}:
            pair = self.rotary(like, at, name) if name else self.rotary(like, at)
            tables[name] = tuple(x[0].float().contiguous() for x in pair)
        return tables  # type: ignore[return-value]


def _static_rope(config: PretrainedConfig) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    return bool(kinds) and all(kind.get("rope_type", "default") in STATIC_ROPE for kind in kinds)


def describe(core: AnyModule) -> Description | None:
    """The parts of a transformer body; None for other families, layers with other forwards, several devices or formats.

    The engine verifies the result: it compares both implementations before it uses it.
    """
    config = core.config
    if config.model_type not in FAMILIES or not _static_rope(config):
        return None
    weight = core.embed_tokens.weight
    dtypes = {p.dtype for p in core.parameters() if p.is_floating_point()}  # quantised ones are integers
    devices = {p.device for p in core.parameters()}
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if config.model_type.startswith("gemma"):
        activation = config.hidden_activation
    if dtypes != {weight.dtype} or devices != {weight.device} or weight.dtype not in DTYPES:
        return None
    if activation not in _ACTIVATIONS:
        return None
    try:
        layers = [_layer(layer, index, config) for index, layer in enumerate(core.layers)]
    except AttributeError:
        return None
    linear = [m for layer in layers for part in layer.products() for m in part]
    width = getattr(layers[0].attention, "head_dim", 0)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if not all(type(layer) in LINEAR and is_plain(layer) for layer in linear) or not width:
        return None
    scale = getattr(core.embed_tokens, "embed_scale", None)
    return Description(
        layers,
        weight,
        1.0 if scale is None else float(scale.to(weight.dtype)),
        _norm(core.norm, config),
        config.rms_norm_eps,
        heads,
        kv_heads,
        width,
        _ACTIVATIONS[activation],
        core.rotary_emb,
        weight.dtype,
        not config.model_type.startswith("gemma"),
        any(adapted(layer) is not None for layer in linear),
        quantised_weight(linear) is not None,
    )


def kernels_take(description: Description) -> bool:
    """Whether the CPU kernels decode a model like this."""
    d = description
    plain = d.embedding.device.type == "cpu" and d.dtype in (torch.bfloat16, torch.float32)
    return plain and not d.adapted and not d.quantised and d.width % LANES == 0 and d.heads <= QUERIES * d.kv_heads


def attention_rules(description: Description, body: Body) -> list[Rule]:
    """The rule of each layer's attention, as the model states it in a pass over two tokens; kept for each body."""
    if body in _rules:
        return _rules[body]
    device = description.embedding.device
    probe = RulePlan(2, device=device)
    with use_plan(probe):
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        body.core(input_ids=ids, position_ids=probe.positions(), use_cache=False)
    _rules[body] = [probe.rules[layer.attention] for layer in description.layers]
    return _rules[body]


def _norm(module: AnyModule, config: PretrainedConfig) -> Tensor:
    weight = module.weight.detach().float()
    return (1 + weight if config.model_type.startswith("gemma") else weight).contiguous()


def _layer(layer: AnyModule, index: int, config: PretrainedConfig) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    packed, joined = hasattr(attention, "qkv_proj"), hasattr(mlp, "gate_up_proj")
    post = hasattr(layer, "pre_feedforward_layernorm")  # Gemma also norms the residual updates
    normed = hasattr(attention, "q_norm")
    return Layer(
        attention,
        (attention.qkv_proj,) if packed else (attention.q_proj, attention.k_proj, attention.v_proj),
        attention.o_proj,
        (mlp.gate_up_proj,) if joined else (mlp.gate_proj, mlp.up_proj),
        mlp.down_proj,
        _norm(layer.input_layernorm, config),
        _norm(layer.post_attention_layernorm, config) if post else None,
        _norm(layer.pre_feedforward_layernorm if post else layer.post_attention_layernorm, config),
        _norm(layer.post_feedforward_layernorm, config) if post else None,
        _norm(attention.q_norm, config) if normed else None,
        _norm(attention.k_norm, config) if normed else None,
        config.layer_types[index] if config.model_type == "gemma3_text" else "",
    )


class Product:
    """x (n, i) to x W^T + b (n, o) for one or more layers at once, weights copied into the CPU's layout.

    Args:
        layers: weight (o, i) and bias (o,) or None of linear layers that read the same input.
    """

    def __init__(self, *layers: tuple[Tensor, Tensor | None]) -> None:
        weights, biases = [weight.detach() for weight, _ in layers], [bias for _, bias in layers]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.bias: Tensor | None = None
        if any(b is not None for b in biases):
            parts = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
            self.bias = torch.cat(parts)
        own = PackedWeight(weight, self.bias) if packs_weights(weight) else None
        if own is not None:
            self._call: Callable[[Tensor], Tensor] = own
        elif packs(weight.dtype):
            packed, linear = torch.ops.mkldnn._reorder_linear_weight(weight, 128), torch.ops.mkldnn._linear_pointwise
            self._call = lambda x: linear.default(x, packed, self.bias, "none", [], "")
        else:
            self._call = lambda x: nn.functional.linear(x, weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x)


def packs(dtype: torch.dtype) -> bool:
    """Whether the library multiplies packed weights of ``dtype`` faster than plain ones on this CPU."""
    return (
        dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
