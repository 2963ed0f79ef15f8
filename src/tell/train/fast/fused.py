"""Exchange the slow parts of a transformers model for the operations of ``fused_ops``, module by module.

Norms, attention and gated MLPs are recognised by what they hold, not by the name of the family, and each kind
is tried on an fp32 copy of one module before it is exchanged: what does not compute the same stays as it is. The
modules look their layers up at each call, so LoRA may come and go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tell.errors import first_line
from tell.kernels.ops import GELU_TANH, SILU, kernels_for
from tell.train.attention import PackedPlan, Rule, use_plan
from tell.train.fast.cuda import Forwards, attention_note, liger_forwards
from tell.train.fast.exchange import (
    Exchange,
    epsilon,
    is_frozen,
    is_plain,
    planned_attention,
    restore_forward,
    split_qkv,
)
from tell.train.fast.fused_ops import Attention, Gated, GatedProjection, Projection, RmsNorm, Stack

TOLERANCE = 1e-3  # of the largest value, in fp32


class Projections:
    """Named linear layers of one module as one product.

    The frozen weights are laid in one tensor, of which the layers keep views: no second copy.
    """

    def __init__(self, owner: nn.Module, names: Sequence[str]) -> None:
        self.owner, self.names = owner, tuple(names)
        self.weight: Tensor | None = None

    def layers(self) -> list[Any]:
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
        if whole is None:  # at first, and after somebody has put other weights into the layers
            with torch.inference_mode(False), torch.no_grad():  # they outlive a pass of the decoder
                whole = torch.cat([base.weight.data for base in bases])
                for base, part in zip(bases, whole.split(widths), strict=True):
                    base.weight.data = part
            self.weight = whole
        biases = [base.bias for base in bases]
        if all(bias is None for bias in biases):
            return whole, None, widths
        # small, and copied each time: somebody may have written into the layers' own
        parts = zip(biases, widths, strict=True)
        return whole, torch.cat([whole.new_zeros(n) if bias is None else bias for bias, n in parts]), widths

    def stack(self) -> tuple[Stack, list[Tensor]] | None:
        """The layers' frozen part and their adapters; None where one of them is out of the ordinary."""
        bases, adapters, scales, dropout = [], [], [], 0.0
        for layer in self.layers():
            base, pair, scale, rate = _lora_parts(layer)
            if base is None:
                return None
            bases.append(base)
            scales.append(scale)
            if pair is not None:
                adapters += pair
                dropout = rate
        return Stack(*self._weights(bases), tuple(scales), dropout), adapters

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the layers, each (..., N_i); each by its own forward where one is out of the ordinary."""
        found = self.stack()
        if found is None:
            return tuple(layer(x) for layer in self.layers())
        return Projection.apply(x, found[0], *found[1])

    def gated(self, g: Tensor, u: Tensor, kind: int) -> Tensor:
        """Output of the only layer over act(g) u."""
        found = self.stack()
        if found is None:
            return self.layers()[0](Gated.apply(g, u, kind))
        return GatedProjection.apply(g, u, kind, found[0], *found[1])


def _lora_parts(layer: Any) -> tuple[nn.Linear | None, list[Tensor] | None, float | None, float]:
    """Base layer, (A, B), scale and dropout of a plain linear layer with at most one plain adapter; Nones otherwise."""
    if type(layer) is nn.Linear:
        return layer if is_plain(layer) else None, None, None, 0.0
    active = getattr(layer, "active_adapters", None)
    if not active or not hasattr(layer, "lora_A"):
        return None, None, None, 0.0
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
        return None, None, None, 0.0
    dropout = layer.lora_dropout[name]
    rate = float(dropout.p) if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    return base, [layer.lora_A[name].weight, layer.lora_B[name].weight], float(layer.scaling[name]), rate


def _norm_forward(module: Any, offset: float) -> Callable[[Tensor], Tensor]:
    original, eps = module.forward, epsilon(module)

    def forward(x: Tensor) -> Tensor:
        fits = module.weight.dtype == x.dtype and x.is_contiguous() and is_frozen(module.weight)
        if kernels_for(x) is None or not fits:
            return original(x)
        return RmsNorm.apply(x, module.weight, eps, offset)

    return forward


def _attention_forward(module: Any, offset: float | None, turned: bool) -> Callable[..., tuple[Tensor, None]]:
    """``offset`` is that of the norms on queries and keys, None where there are none; ``turned``: with positions."""
    merged = hasattr(module, "qkv_proj")
    inward = Projections(module, ["qkv_proj"] if merged else ["q_proj", "k_proj", "v_proj"])
    outward = Projections(module, ["o_proj"])
    width = module.head_dim
    norms = () if offset is None else (module.q_norm, module.k_norm)

    def serves(plan: Any, states: Tensor) -> bool:
        return (
            type(plan) is PackedPlan
            and kernels_for(states) is not None
            and all(norm.weight.dtype == states.dtype and is_frozen(norm.weight) for norm in norms)
        )

    def attend(states: Tensor, rope: tuple[Tensor, Tensor], plan: PackedPlan, rule: Rule) -> Tensor:
        parts = inward(states[0])
        q, k, v = split_qkv(module, parts[0]) if merged else parts
        heads, kv = q.shape[1] // width, k.shape[1] // width
        if norms:
            q, k = (RmsNorm.apply(x, n.weight, epsilon(n), offset) for x, n in zip((q, k), norms, strict=True))
        cosine, sine = (x.reshape(-1, x.shape[-1]).contiguous() for x in rope)
        if not turned:
            cosine, sine = torch.ones_like(cosine), torch.zeros_like(sine)
        longest = plan.prefix + max(plan.lengths)
        window = rule.window if rule.window is not None and rule.window < longest else None
        out = Attention.apply(q, k, v, cosine, sine, plan, heads, kv, rule.scaling, window)
        return outward(out[None])[0]

    return planned_attention(module, attend, serves)


def _mlp_forward(module: Any, kind: int) -> Callable[[Tensor], Tensor]:
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
    return inward and _has(module, "o_proj", "head_dim", "_tell_rule") and module._tell_rule.softcap is None


def _is_mlp(module: nn.Module) -> bool:
    return _has(module, "down_proj") and (_has(module, "gate_proj", "up_proj") or _has(module, "gate_up_proj"))


def _bare(module: nn.Module) -> Any:
    """An fp32 copy without exchanged forwards, its adapters at random so that they count."""
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
    """What to exchange modules for on the device and in the format of ``weight``; None: they stay as they are."""
    if kernels_for(weight) is not None:
        return Forwards(_norm_forward, _attention_forward, _mlp_forward)
    return liger_forwards() if weight.device.type == "cuda" else None


@torch.no_grad()
def _offset_of(norm: nn.Module, forwards: Forwards) -> float | None:
    """0 or 1, whichever makes the kernel compute what the norm computes; None where neither does."""
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
    module: nn.Module, rope: tuple[Tensor, Tensor], forwards: Forwards
) -> tuple[float | None, bool] | None:
    """The last arguments of ``Forwards.attention``; None where none make it compute what the module computes."""
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
    rope = tuple(part[:, plan.positions()[0]].float() for part in rope)
    with use_plan(plan):
        expected, _ = twin(hidden_states=x, position_embeddings=rope, attention_mask=None)
        for turned in (True, False):
            actual, _ = forwards.attention(twin, offset, turned)(x, rope)
            if _same(actual, expected):
                return offset, turned
    return None


def _traits(module: nn.Module) -> tuple[Any, ...]:
    """What may tell two modules of a class apart, the layer's number aside."""
    plain = (bool, int, float, str, type(None))
    return tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, plain) and k != "layer_idx")


class _Ropes:
    """cos and sin of positions 0 to 15 as each attention module is given them."""

    def __init__(self) -> None:
        self.seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __call__(self, module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        pair = kwargs.get("position_embeddings")
        if isinstance(pair, tuple) and len(pair) == 2:
            self.seen[module] = pair


@torch.inference_mode(False)
def fuse_modules(model: Any, forwards: Forwards | None = None) -> dict[str, int]:
    """Exchange what can be exchanged in ``model``, a transformers causal model that attends through plans.

    Args:
        forwards: what to exchange for; None: what ``forwards_for`` finds.

    Returns:
        How many norms, attentions and MLPs compute through the kernels; empty where there are no kernels.
    """
    weight = model.get_output_embeddings().weight
    forwards = forwards or forwards_for(weight)
    if forwards is None:
        return {}
    if (counts := getattr(model, "_tell_fused", None)) is not None:
        return counts
    core = model.base_model
    ropes = _Ropes()
    hooks = [m.register_forward_pre_hook(ropes, with_kwargs=True) for m in core.modules() if _has(m, "o_proj")]
    state = torch.get_rng_state()  # the trials draw random numbers, and so may the model's own dropout
    plan = PackedPlan([16], device=weight.device)
    ids = torch.arange(16, device=weight.device)[None] % weight.shape[0]
    try:
        with torch.no_grad(), use_plan(plan):
            core(input_ids=ids, position_ids=plan.positions(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    known: dict[tuple[Any, ...], Any] = {}
    refused: dict[str, str] = {}

    def once(key: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        if key not in known:
            try:
                known[key] = find()
            except Exception as error:  # it wants to be called in another way, or a kernel's compiler fails
                known[key] = None
                refused[key[0].__name__] = f"{type(error).__name__}: {first_line(error)}"
        return known[key]

    counts = {"norm": 0, "attention": 0, "mlp": 0}
    for module in list(core.modules()):
        if "forward" in module.__dict__:
            continue
        if _is_norm(module):
            offset = once(
                (type(module), module.weight.shape, _traits(module)), lambda m=module: _offset_of(m, forwards)
            )
            if offset is not None:
                module.forward = Exchange(forwards.norm, module, offset)
                counts["norm"] += 1
        elif _is_attention(module) and module in ropes.seen:
            rule = module._tell_rule
            key = (type(module), rule.scaling, rule.window, _traits(module))
            facts = once(key, lambda m=module: _attention_facts(m, ropes.seen[m], forwards))
            if facts is not None:
                module.forward = Exchange(forwards.attention, module, *facts)
                counts["attention"] += 1
        elif _is_mlp(module):
            kind = once((type(module), _traits(module)), lambda m=module: _activation_of(m, forwards))
            if kind is not None:
                module.forward = Exchange(forwards.mlp, module, kind)
                counts["mlp"] += 1
    torch.set_rng_state(state)
    model._tell_fused, model._tell_refused = counts, refused
    return counts


def path_notes(model: Any) -> list[str]:
    """Sentences on what ``model`` trains through: its attention on a GPU, modules that no kernel computes and why."""
    refused = getattr(model, "_tell_refused", {}).items()
    return [*filter(None, [attention_note(model)]), *(f"{name} keeps its own forward ({why})" for name, why in refused)]


def unfuse_modules(model: Any) -> None:
    """Give every module its own forward back."""
    for module in model.base_model.modules():
        restore_forward(module)
    model._tell_fused = None


def is_fused(model: Any) -> bool:
    """Whether ``fuse_modules`` was the last word on ``model``."""
    return getattr(model, "_tell_fused", None) is not None


@contextmanager
def unfused(model: Any) -> Iterator[None]:
    """The model as transformers wrote it, for a while."""
    before = is_fused(model)
    unfuse_modules(model)
    try:
        yield
    finally:
        if before:
            fuse_modules(model)
