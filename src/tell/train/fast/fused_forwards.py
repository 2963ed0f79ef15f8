"""The forwards that replace those of norms, attention and gated MLPs, over the kernels of the weights' device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from tell.kernels.ops import CKernels, kernels_for
from tell.kernels.quantised import QuantisedLinear
from tell.kernels.triton_ops import HeadLayout
from tell.train.attention import PackedPlan, Plan, Rule
from tell.train.fast.base_weight import LINEAR, Quantised, quantised_weight
from tell.train.fast.cuda import Forward
from tell.train.fast.exchange import Rope, epsilon, is_frozen, is_plain, planned_attention, split_qkv
from tell.train.fast.fused_ops import Attention, AttentionCall, Gated, GatedProjection, Heads, Projection, RmsNorm
from tell.train.fast.stacked import Stack
from tell.train.flat import adjacent
from tell.train.torch_types import AnyModule
from tell.train.unmerged import adapted

FEW_ROWS = 64  # that decoding computes at a time


class Projections:
    """Named linear layers of one module as one product.

    The frozen weights are moved into one tensor, of which the layers keep views: no second copy. Quantised ones stay
    where they are.
    """

    def __init__(self, owner: nn.Module, names: Sequence[str]) -> None:
        self.owner, self.names = owner, tuple(names)
        self.weight: Tensor | None = None

    def layers(self) -> list[nn.Module]:
        return [getattr(self.owner, name) for name in self.names]

    def _weights(self, bases: list[nn.Linear]) -> tuple[Tensor | Quantised, Tensor | None, tuple[int, ...]]:
        widths = tuple(base.out_features for base in bases)
        quantised = quantised_weight(bases)
        if len(bases) == 1:
            return quantised or bases[0].weight, bases[0].bias, widths
        whole = quantised or self._joined(bases, widths)
        biases = [base.bias for base in bases]
        if all(bias is None for bias in biases):
            return whole, None, widths
        # small, and copied each time: the layers' own may have been written into
        like = next(bias for bias in biases if bias is not None)
        parts = zip(biases, widths, strict=True)
        return whole, torch.cat([like.new_zeros(n) if bias is None else bias for bias, n in parts]), widths

    def _joined(self, bases: list[nn.Linear], widths: tuple[int, ...]) -> Tensor:
        whole, weights = self.weight, [base.weight for base in bases]
        if whole is not None and not adjacent([whole, *weights], [0, *(weight.numel() for weight in weights)]):
            whole = None
        if whole is None:  # at first, and after the layers were given other weights
            with torch.inference_mode(False), torch.no_grad():  # they outlive a pass of the decoder
                whole = torch.cat([base.weight.data for base in bases])
                for base, part in zip(bases, whole.split(widths), strict=True):
                    base.weight.data = part
            self.weight = whole
        return whole

    def _reads_packed(self, x: Tensor) -> bool:
        """Whether quantised layers multiply few rows by their own forward, which never makes a whole matrix."""
        few = not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]
        return few and any(type(layer) is QuantisedLinear for layer in self.layers())

    def stack(self) -> tuple[Stack, list[Tensor]] | None:
        """The layers' frozen part and their adapters; None where one of them is unusual."""
        parts = [_lora_parts(cast(AnyModule, layer)) for layer in self.layers()]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        adapters = [matrix for part in found for matrix in part.adapter]
        dropout = next((part.dropout for part in reversed(found) if part.adapter), 0.0)
        return Stack(*self._weights([part.base for part in found]), tuple(p.scale for p in found), dropout), adapters

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the layers, each (..., N_i); each by its own forward where one is unusual."""
        found = None if self._reads_packed(x) else self.stack()
        if found is None:
            return tuple(layer(x) for layer in self.layers())
        return Projection.apply(x, found[0], *found[1])

    def gated(self, g: Tensor, u: Tensor, kind: int) -> Tensor:
        """Output of the single layer over act(g) u."""
        found = None if self._reads_packed(g) else self.stack()
        if found is None:
            return self.layers()[0](Gated.apply(g, u, kind))
        return GatedProjection.apply(g, u, kind, found[0], *found[1])


class _LoraParts(NamedTuple):
    """A plain linear layer, and (A, B), scale and dropout of its adapter where it has one."""

    base: nn.Linear
    adapter: tuple[Tensor, ...] = ()
    scale: float | None = None
    dropout: float = 0.0


def _lora_parts(layer: AnyModule) -> _LoraParts | None:
    """None for what is not a plain linear layer with at most one plain adapter, in it or beside it."""
    if type(layer) in LINEAR:
        linear = cast(nn.Linear, layer)
        if not is_plain(linear):
            return None
        beside = adapted(linear)
        return _LoraParts(linear) if beside is None else _LoraParts(linear, (beside.a, beside.b), 1.0)
    active = getattr(layer, "active_adapters", None)
    if not active or not hasattr(layer, "lora_A"):
        return None
    base, name = layer.get_base_layer(), active[0]
    unusual = (
        type(base) not in LINEAR
        or not is_plain(base)
        or adapted(base) is not None
        or len(active) > 1
        or name not in layer.lora_A
        or layer.merged
        or layer.disable_adapters
        or getattr(layer, "use_dora", {}).get(name, False)
        or getattr(layer, "lora_bias", {}).get(name, False)
        or layer.scaling[name] == 0
    )
    if unusual:
        return None
    dropout = layer.lora_dropout[name]
    rate = float(dropout.p) if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    adapter = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _LoraParts(base, adapter, float(layer.scaling[name]), rate)


def norm_forward(module: AnyModule, offset: float) -> Forward:
    original, eps = module.forward, epsilon(module)

    def forward(x: Tensor) -> Tensor:
        fits = module.weight.dtype == x.dtype and x.is_contiguous() and is_frozen(module.weight)
        if kernels_for(x) is None or not fits:
            return original(x)
        return RmsNorm.apply(x, module.weight, eps, offset)

    return forward


def fused_attention_forward(module: AnyModule, rule: Rule, offset: float | None, rotary: bool) -> Forward:
    merged = hasattr(module, "qkv_proj")
    inward = Projections(module, ["qkv_proj"] if merged else ["q_proj", "k_proj", "v_proj"])
    outward = Projections(module, ["o_proj"])
    norms = () if offset is None else (module.q_norm, module.k_norm)

    def serves(plan: Plan, states: Tensor) -> bool:
        kernels = kernels_for(states)
        planned = type(plan) is PackedPlan if isinstance(kernels, CKernels) else hasattr(plan, "attend")
        plain = (norm.weight.dtype == states.dtype and is_frozen(norm.weight) for norm in norms)
        return kernels is not None and planned and all(plain)

    def attend(states: Tensor, rope: Rope, plan: PackedPlan) -> Tensor:
        parts = inward(states.squeeze(0))  # not states[0], whose gradient is a copy among zeros
        cosine, sine = (x.reshape(-1, x.shape[-1]).contiguous() for x in rope)
        turn = (cosine, sine) if rotary else None
        by_rows = isinstance(kernels_for(states), CKernels)
        out = (_attend_rows if by_rows else _attend_by_plan)(module, parts, plan, (rule, offset, turn))
        return outward(out)[0]

    return planned_attention(module, attend, serves)


# Rule, offset of the norms on queries and keys, cosine and sine (T, rot).
Facts = tuple[Rule, float | None, Rope | None]


def _attend_rows(module: AnyModule, parts: tuple[Tensor, ...], plan: PackedPlan, facts: Facts) -> Tensor:
    """(1, T, H D) from the projections' outputs, by the kernels for a CPU."""
    rule, offset, turn = facts
    q, k, v = split_qkv(module, parts[0]) if len(parts) == 1 else parts
    width = module.head_dim
    heads, kv = q.shape[1] // width, k.shape[1] // width
    if offset is not None:
        norms = module.q_norm, module.k_norm
        q, k = (RmsNorm.apply(x, n.weight, epsilon(n), offset) for x, n in zip((q, k), norms, strict=True))
    cosine, sine = turn or (q.new_ones(len(q), width), q.new_zeros(len(q), width))
    longest = plan.prefix + max(plan.lengths)
    window = rule.window if rule.window is not None and rule.window < longest else None
    return Attention.apply(q, k, v, AttentionCall(plan, cosine, sine, heads, kv, rule.scaling, window))[None]


def _attend_by_plan(module: AnyModule, parts: tuple[Tensor, ...], plan: Plan, facts: Facts) -> Tensor:
    """(1, T, H D) from the projections' outputs, by the plan's own attention."""
    rule, offset, turn = facts
    width, columns = module.head_dim, sum(part.shape[1] for part in parts)
    keys = module.num_key_value_heads if len(parts) == 1 else parts[1].shape[1] // width
    layout = HeadLayout(columns // width - 2 * keys, keys, width, *(turn or ()))
    if offset is not None:
        q, k = module.q_norm, module.k_norm
        layout = layout._replace(query_norm=q.weight, query_eps=epsilon(q), key_norm=k.weight, key_eps=epsilon(k))
        layout = layout._replace(offset=offset)
    q, k, v = (x.transpose(0, 1)[None] for x in Heads.apply(layout, *parts))
    return plan.attend(module, q, k, v, rule).flatten(2)


def mlp_forward(module: AnyModule, kind: int) -> Forward:
    original = module.forward
    merged = hasattr(module, "gate_up_proj")
    inward = Projections(module, ["gate_up_proj"] if merged else ["gate_proj", "up_proj"])
    outward = Projections(module, ["down_proj"])

    def forward(x: Tensor) -> Tensor:
        if kernels_for(x) is None:
            return original(x)
        parts = inward(x)
        g, u = parts[0].chunk(2, dim=-1) if merged else parts
        return outward.gated(g, u, kind)

    return forward
