"""Replaces the slow parts of a transformers model by the operations of ``fused_ops``, module by module.

Norms, attention and gated MLPs are recognised by their attributes, not by the name of the family, and each kind is
verified on an fp32 copy of one module before it is replaced: what does not compute the same stays as it is. The
replacements look up their layers at each call, so LoRA can be added and removed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tell.errors import first_line
from tell.kernels.ops import GELU_TANH, SILU, CKernels, kernels_for, why_none
from tell.train.attention import PackedPlan, Rule, RulePlan, use_plan
from tell.train.device import kept_randomness
from tell.train.fast.cuda import Forwards, attention_note
from tell.train.fast.exchange import Exchange, Rope, is_exchanged, restore_forward
from tell.train.fast.fused_forwards import fused_attention_forward, mlp_forward, norm_forward
from tell.train.torch_types import AnyModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3  # of the largest value, in fp32


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _is_norm(module: AnyModule) -> bool:
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


def _kind(module: nn.Module) -> str | None:
    """The field of ``Forwards`` that may replace a module's forward."""
    if _is_norm(cast(AnyModule, module)):
        return "norm"
    return "attention" if _is_attention(module) else "mlp" if _is_mlp(module) else None


def _bare(module: nn.Module) -> Any:
    """An fp32 copy without replaced forwards, its adapters at random so that they have an effect."""
    twin = copy.deepcopy(module).float()
    for part in cast(Iterable[AnyModule], twin.modules()):
        part.__dict__.pop("forward", None)
        if hasattr(part, "lora_B"):
            for b in part.lora_B.values():
                nn.init.normal_(b.weight, std=0.02)
    return twin.eval()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def forwards_for(weight: Tensor) -> Forwards | None:
    """The replacements for the device and number format of ``weight``; None where there are none."""
    if kernels_for(weight) is None:
        return None
    return Forwards(norm_forward, fused_attention_forward, mlp_forward)


@torch.no_grad()
def _offset_of(norm: AnyModule, forwards: Forwards) -> float | None:
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
    module: AnyModule, rule: Rule, rope: Rope, forwards: Forwards
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
    """Result of ``fuse_modules``.

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
        with kept_randomness(weight.device):  # the trials draw random numbers, as may the model's dropout
            _fusions[model] = _Fuser(model, forwards).fuse()
    return _fusions[model].counts


class _Fuser:
    """One ``fuse_modules``: each kind of module is tried once."""

    def __init__(self, model: PreTrainedModel, forwards: Forwards) -> None:
        self.core, self.forwards, weight = model.base_model, forwards, model.get_output_embeddings().weight
        self.rules, self.ropes = _probe(self.core, weight)
        self.capped = not isinstance(kernels_for(weight), CKernels)  # whether attention may cap its scores
        self.known: dict[tuple[Any, ...], tuple[Any, ...] | None] = {}
        self.refused: dict[str, str] = {}

    def fuse(self) -> _Fusion:
        counts = {"norm": 0, "attention": 0, "mlp": 0}
        for module in list(self.core.modules()):
            kind = _kind(module)
            if kind is None:
                continue
            if "forward" not in vars(module) and (facts := self._facts(kind, cast(AnyModule, module))) is not None:
                module.forward = Exchange(getattr(self.forwards, kind), module, *facts)
            counts[kind] += is_exchanged(module)  # a copied model's modules already are
        return _Fusion(counts, self.refused)

    def _facts(self, kind: str, module: AnyModule) -> tuple[Any, ...] | None:
        """What the replacement of that kind needs; None for a module that stays as it is."""
        form, traits, forwards = type(module), _traits(module), self.forwards
        if kind == "norm":
            return self._once((form, module.weight.shape, traits), lambda: _single(_offset_of(module, forwards)))
        if kind == "mlp":
            return self._once((form, traits), lambda: _single(_activation_of(module, forwards)))
        if module not in self.ropes or module not in self.rules:
            return None
        rule, rope = self.rules[module], self.ropes[module]
        if rule.softcap is not None and not self.capped:
            return None
        return self._once((form, rule, traits), lambda: _attention_facts(module, rule, rope, forwards))

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


def _probe(core: nn.Module, weight: Tensor) -> tuple[dict[nn.Module | None, Rule], dict[nn.Module, Rope]]:
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
    missing = why_none(model.get_output_embeddings().weight)
    return [
        *filter(None, [attention_note(model)]),
        *([f"norms, rotary positions and MLPs run as transformers' own, slower ({missing})"] if missing else []),
        *(f"{name} keeps its own forward ({why})" for name, why in refused),
    ]


def unfuse_modules(model: PreTrainedModel) -> None:
    """Restore every module's own forward."""
    for module in model.base_model.modules():
        restore_forward(module)
    _fusions.pop(model, None)


def is_fused(model: PreTrainedModel) -> bool:
    """Whether ``fuse_modules`` was called on ``model``, or on the model it is a copy of, and not undone."""
    return model in _fusions or any(map(is_exchanged, model.base_model.modules()))


def fused_counts(model: PreTrainedModel) -> dict[str, int] | None:
    """What ``fuse_modules`` returned for ``model``; None where it was not called, or undone."""
    return _fusions[model].counts if model in _fusions else None
