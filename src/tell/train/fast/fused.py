"""Replaces the slow parts of a transformers model by the operations of ``fused_ops``, module by module.

Norms, attention and gated MLPs are recognised by their attributes, not by the name of the family, and each kind is
verified on an fp32 copy of one module before it is replaced: what does not compute the same stays as it is. The
replacements look up their layers at each call, so LoRA may come and go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tell.errors import first_line
from tell.kernels.ops import GELU_TANH, SILU, kernels_for
from tell.train.attention import PackedPlan, Plan, Rule, RulePlan, use_plan
from tell.train.device import kept_randomness
from tell.train.fast.cuda import Forward, Forwards, attention_note, liger_forwards
from tell.train.fast.exchange import (
    Exchange,
    Rope,
    epsilon,
    is_frozen,
    is_plain,
    planned_attention,
    restore_forward,
    split_qkv,
)
from tell.train.fast.fused_ops import Attention, AttentionCall, Gated, GatedProjection, Projection, RmsNorm, Stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3  # of the largest value, in fp32


class Projections:
    """Named linear layers of one module as one product.

    The frozen weights are moved into one tensor, of which the layers keep views: no second copy.
    """

    def __init__(self, owner: nn.Module, names: Sequence[str]) -> None:
        self.owner, self.names = owner, tuple(names)
        self.weight: Tensor | None = None

    def layers(self) -> list[nn.Module]:
        return [getattr(self.owner, name) for name in self.names]

    def _weights(self, bases: list[nn.Linear]) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        widths = tuple(base.weight.shape[0] for base in bases)
        if len(bases) == 1:
            return bases[0].weight, bases[0].bias, widths
        whole = self.weight
        at = 0 if whole is None else whole.data_ptr()
        for base in bases:
            if base.weight.data_ptr() != at:
                whole = None
                break
            at += base.weight.numel() * base.weight.element_size()
        if whole is None:  # at first, and after the layers were given other weights
            with torch.inference_mode(False), torch.no_grad():  # they outlive a pass of the decoder
                whole = torch.cat([base.weight.data for base in bases])
                for base, part in zip(bases, whole.split(widths), strict=True):
                    base.weight.data = part
            self.weight = whole
        biases = [base.bias for base in bases]
        if all(bias is None for bias in biases):
            return whole, None, widths
        # small, and copied each time: the layers' own may have been written into
        parts = zip(biases, widths, strict=True)
        return whole, torch.cat([whole.new_zeros(n) if bias is None else bias for bias, n in parts]), widths

    def stack(self) -> tuple[Stack, list[Tensor]] | None:
        """The layers' frozen part and their adapters; None where one of them is unusual."""
        parts = [_lora_parts(layer) for layer in self.layers()]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        adapters = [matrix for part in found for matrix in part.adapter]
        dropout = next((part.dropout for part in reversed(found) if part.adapter), 0.0)
        return Stack(*self._weights([part.base for part in found]), tuple(p.scale for p in found), dropout), adapters

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the layers, each (..., N_i); each by its own forward where one is unusual."""
        found = self.stack()
        if found is None:
            return tuple(layer(x) for layer in self.layers())
        return Projection.apply(x, found[0], *found[1])

    def gated(self, g: Tensor, u: Tensor, kind: int) -> Tensor:
        """Output of the single layer over act(g) u."""
        found = self.stack()
        if found is None:
            return self.layers()[0](Gated.apply(g, u, kind))
        return GatedProjection.apply(g, u, kind, found[0], *found[1])


class _LoraParts(NamedTuple):
    """A plain linear layer, and (A, B), scale and dropout of its adapter where it has one."""

    base: nn.Linear
    adapter: tuple[Tensor, ...] = ()
    scale: float | None = None
    dropout: float = 0.0


def _lora_parts(layer: Any) -> _LoraParts | None:
    """None for what is not a plain linear layer with at most one plain adapter."""
    if type(layer) is nn.Linear:
        return _LoraParts(layer) if is_plain(layer) else None
    active = getattr(layer, "active_adapters", None)
    if not active or not hasattr(layer, "lora_A"):
        return None
    base, name = layer.get_base_layer(), active[0]
    unusual = (
        type(base) is not nn.Linear
        or not is_plain(base)
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


def _norm_forward(module: Any, offset: float) -> Forward:
    original, eps = module.forward, epsilon(module)

    def forward(x: Tensor) -> Tensor:
        fits = module.weight.dtype == x.dtype and x.is_contiguous() and is_frozen(module.weight)
        if kernels_for(x) is None or not fits:
            return original(x)
        return RmsNorm.apply(x, module.weight, eps, offset)

    return forward


def _attention_forward(module: Any, rule: Rule, offset: float | None, rotary: bool) -> Forward:
    merged = hasattr(module, "qkv_proj")
    inward = Projections(module, ["qkv_proj"] if merged else ["q_proj", "k_proj", "v_proj"])
    outward = Projections(module, ["o_proj"])
    width = module.head_dim
    norms = () if offset is None else (module.q_norm, module.k_norm)

    def serves(plan: Plan, states: Tensor) -> bool:
        return (
            type(plan) is PackedPlan
            and kernels_for(states) is not None
            and all(norm.weight.dtype == states.dtype and is_frozen(norm.weight) for norm in norms)
        )

    def attend(states: Tensor, rope: Rope, plan: PackedPlan) -> Tensor:
        parts = inward(states[0])
        q, k, v = split_qkv(module, parts[0]) if merged else parts
        heads, kv = q.shape[1] // width, k.shape[1] // width
        if norms:
            q, k = (RmsNorm.apply(x, n.weight, epsilon(n), offset) for x, n in zip((q, k), norms, strict=True))
        cosine, sine = (x.reshape(-1, x.shape[-1]).contiguous() for x in rope)
        if not rotary:
            cosine, sine = torch.ones_like(cosine), torch.zeros_like(sine)
        longest = plan.prefix + max(plan.lengths)
        window = rule.window if rule.window is not None and rule.window < longest else None
        out = Attention.apply(q, k, v, AttentionCall(plan, cosine, sine, heads, kv, rule.scaling, window))
        return outward(out[None])[0]

    return planned_attention(module, attend, serves)


def _mlp_forward(module: Any, kind: int) -> Forward:
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


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _is_norm(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.dim() == 1
        and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))
    )


def _is_attention(module: nn.Module) -> bool:
    inward = _has(module, "q_proj", "k_proj", "v_proj") or _has(module, "qkv_proj", "num_key_value_heads")
    return inward and _has(module, "o_proj", "head_dim")


def _is_mlp(module: nn.Module) -> bool:
    return _has(module, "down_proj") and (_has(module, "gate_proj", "up_proj") or _has(module, "gate_up_proj"))


def _bare(module: nn.Module) -> Any:
    """An fp32 copy without replaced forwards, its adapters at random so that they have an effect."""
    twin = copy.deepcopy(module).float()
    for part in twin.modules():
        part.__dict__.pop("forward", None)
        if hasattr(part, "lora_B"):
            for b in part.lora_B.values():
                nn.init.normal_(b.weight, std=0.02)
    return twin.eval()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def forwards_for(weight: Tensor) -> Forwards | None:
    """The replacements for the device and number format of ``weight``; None where there are none."""
    if kernels_for(weight) is not None:
        return Forwards(_norm_forward, _attention_forward, _mlp_forward)
    return liger_forwards() if weight.device.type == "cuda" else None


@torch.no_grad()
def _offset_of(norm: nn.Module, forwards: Forwards) -> float | None:
    """0 or 1, whichever makes the kernel compute the same as the norm; None where neither does."""
    twin = _bare(norm)
    x = torch.randn(4, twin.weight.shape[0]).to(twin.weight.device)
    twin.weight.data = torch.randn(twin.weight.shape).to(x)
    for offset in (0.0, 1.0):
        if _same(forwards.norm(twin, offset)(x), twin(x)):
            return offset
    return None


@torch.no_grad()
def _activation_of(mlp: nn.Module, forwards: Forwards) -> int | None:
    act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    if act is None:
        return None
    twin = _bare(mlp)
    first = twin.gate_up_proj if hasattr(twin, "gate_up_proj") else twin.gate_proj
    x = torch.randn(4, first.in_features).to(first.weight.device)
    for kind in (SILU, GELU_TANH):
        if _same(forwards.mlp(twin, kind)(x), twin(x)):
            return kind
    return None


@torch.no_grad()
def _attention_facts(
    module: nn.Module, rule: Rule, rope: Rope, forwards: Forwards
) -> tuple[Rule, float | None, bool] | None:
    """The arguments of ``Forwards.attention`` that make it compute the same as the module; None where none do."""
    offset = None
    if _has(module, "q_norm", "k_norm"):
        if not (_is_norm(module.q_norm) and module.q_norm.weight.shape[0] == module.head_dim):
            return None
        offset = _offset_of(module.q_norm, forwards)
        if offset is None:
            return None
    twin = _bare(module)
    first = twin.qkv_proj if hasattr(twin, "qkv_proj") else twin.q_proj
    plan = PackedPlan([5, 4], prefix=3, device=first.weight.device)
    x = torch.randn(1, 12, first.in_features).to(first.weight.device)
    cosine, sine = (part[:, plan.positions()[0]].float() for part in rope)
    rope = cosine, sine
    with use_plan(plan):
        expected, _ = twin(hidden_states=x, position_embeddings=rope, attention_mask=None)
        for rotary in (True, False):
            actual, _ = forwards.attention(twin, rule, offset, rotary)(x, rope)
            if _same(actual, expected):
                return rule, offset, rotary
    return None


def _traits(module: nn.Module) -> tuple[Any, ...]:
    """Attributes that may differ between two modules of a class, other than the layer's number."""
    plain = (bool, int, float, str, type(None))
    return tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, plain) and k != "layer_idx")


class _Ropes:
    """Hook that records cosine and sine of positions 0 to 15 as each attention module receives them."""

    def __init__(self) -> None:
        self.seen: dict[nn.Module, Rope] = {}

    def __call__(self, module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        pair = kwargs.get("position_embeddings")
        if isinstance(pair, tuple) and len(pair) == 2:
            self.seen[module] = pair


@dataclass(frozen=True, slots=True)
class _Fusion:
    """What was done to a model.

    Attributes:
        counts: norms, attentions and MLPs that compute through the kernels.
        refused: why modules of a class keep their own forward.
    """

    counts: dict[str, int]
    refused: dict[str, str]


_fusions: WeakKeyDictionary[nn.Module, _Fusion] = WeakKeyDictionary()  # cache by model


@torch.inference_mode(False)
def fuse_modules(model: PreTrainedModel, forwards: Forwards | None = None) -> dict[str, int]:
    """Replace what can be replaced in a causal model that attends through plans.

    Args:
        forwards: the replacements; None: those of ``forwards_for``.

    Returns:
        Number of norms, attentions and MLPs that compute through the kernels; empty where there are no kernels.
    """
    weight = model.get_output_embeddings().weight
    forwards = forwards or forwards_for(weight)
    if forwards is None:
        return {}
    if model not in _fusions:
        with kept_randomness(weight.device):  # the trials draw random numbers, and so may the model's own dropout
            _fusions[model] = _Fuser(model, forwards).fuse()
    return _fusions[model].counts


class _Fuser:
    """One ``fuse_modules``: each kind of module is tried once."""

    def __init__(self, model: PreTrainedModel, forwards: Forwards) -> None:
        self.core, self.forwards = model.base_model, forwards
        self.rules, self.ropes = _probe(self.core, model.get_output_embeddings().weight)
        self.known: dict[tuple[Any, ...], tuple[Any, ...] | None] = {}
        self.refused: dict[str, str] = {}

    def fuse(self) -> _Fusion:
        counts = {"norm": 0, "attention": 0, "mlp": 0}
        for module in list(self.core.modules()):
            found = None if "forward" in vars(module) else self._replacement(module)
            if found is not None:
                kind, facts = found
                module.forward = Exchange(getattr(self.forwards, kind), module, *facts)
                counts[kind] += 1
        return _Fusion(counts, self.refused)

    def _replacement(self, module: Any) -> tuple[str, tuple[Any, ...]] | None:
        """Field of ``Forwards`` and the facts it needs; None for what stays as it is."""
        kind, traits, forwards = type(module), _traits(module), self.forwards
        if _is_norm(module):
            name, key = "norm", (kind, module.weight.shape, traits)
            facts = self._once(key, lambda: _single(_offset_of(module, forwards)))
        elif _is_attention(module) and module in self.ropes and module in self.rules:
            rule = self.rules[module]
            if rule.softcap is not None:
                return None
            name, key = "attention", (kind, rule, traits)
            facts = self._once(key, lambda: _attention_facts(module, rule, self.ropes[module], forwards))
        elif _is_mlp(module):
            name, key = "mlp", (kind, traits)
            facts = self._once(key, lambda: _single(_activation_of(module, forwards)))
        else:
            return None
        return None if facts is None else (name, facts)

    def _once(self, key: tuple[Any, ...], find: Callable[[], tuple[Any, ...] | None]) -> tuple[Any, ...] | None:
        if key not in self.known:
            try:
                self.known[key] = find()
            except Exception as error:  # it needs other arguments, or a kernel's compiler fails
                self.known[key] = None
                self.refused[key[0].__name__] = f"{type(error).__name__}: {first_line(error)}"
        return self.known[key]


def _single(fact: float | None) -> tuple[float] | None:
    return None if fact is None else (fact,)


def _probe(core: Any, weight: Tensor) -> tuple[dict[nn.Module | None, Rule], dict[nn.Module, Rope]]:
    """The rule and the RoPE of each attention module, from a pass over 16 tokens."""
    ropes, plan = _Ropes(), RulePlan(16, device=weight.device)
    hooks = [m.register_forward_pre_hook(ropes, with_kwargs=True) for m in core.modules() if _has(m, "o_proj")]
    ids = torch.arange(16, device=weight.device)[None] % weight.shape[0]
    try:
        with torch.no_grad(), use_plan(plan):
            core(input_ids=ids, position_ids=plan.positions(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return plan.rules, ropes.seen


def path_notes(model: PreTrainedModel) -> list[str]:
    """Sentences on how ``model`` trains: its attention on a GPU, and modules that no kernel computes, with reasons."""
    refused = _fusions[model].refused.items() if model in _fusions else ()
    return [*filter(None, [attention_note(model)]), *(f"{name} keeps its own forward ({why})" for name, why in refused)]


def unfuse_modules(model: PreTrainedModel) -> None:
    """Restore every module's own forward."""
    for module in model.base_model.modules():
        restore_forward(module)
    _fusions.pop(model, None)


def is_fused(model: PreTrainedModel) -> bool:
    """Whether ``fuse_modules`` was called on ``model`` and not undone."""
    return model in _fusions


def fused_counts(model: PreTrainedModel) -> dict[str, int] | None:
    """What ``fuse_modules`` returned for ``model``; None where it was not called, or undone."""
    return _fusions[model].counts if model in _fusions else None
