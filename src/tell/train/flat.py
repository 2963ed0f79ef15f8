"""All adapter parameters of a training in one tensor: one cast, one norm, one AdamW, one zeroing a step.

A model has hundreds of small adapter matrices, and on a GPU a launch for each of them costs more than its arithmetic.
The matrices A of the layers of one module (q, k, v; gate, up) follow each other, so that one product over the shared
input reads them as one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

FLAT_DEVICES = ("cuda",)  # on a CPU single parameters keep their results of before, and launches cost nothing
ALIGNED = 64  # elements; every matrix that is not joined to the previous one begins at a multiple


class Slot(NamedTuple):
    """Where the forward and the backward pass find one adapter matrix.

    Attributes:
        shadow: the matrix times ``scale`` in the model's number format, as of the last ``refresh``.
        grad: its fp32 gradient.
        scale: of the layer's adapter for A; 1 for B.
    """

    shadow: Tensor
    grad: Tensor
    scale: float


_SLOT = "_flat_slot"  # attribute of a parameter: looked up hundreds of times in a pass


def slot_of(parameter: Tensor) -> Slot | None:
    """The slot of an adapter matrix; None where it is not part of a ``FlatAdapters``."""
    found: Slot | None = getattr(parameter, _SLOT, None)
    return found


class FlatAdapters:
    """One fp32 tensor of which the adapter parameters become views; the same for gradients and for a cast copy.

    The three keep their addresses as long as this exists. Unlike separate parameters, a matrix that gets no gradient in
    a step still decays in AdamW.

    Args:
        parameters: trained parameters by name, on one device; their data and gradients become views.
        scales: of A, by name of the parameter; other parameters are not scaled.
        dtype: of the cast copy.

    Attributes:
        weight: (n,) fp32, with ``grad`` as its gradient; the only parameter for an optimizer.
        grad: (n,) fp32.
        shadow: (n,) in ``dtype``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], scales: Mapping[str, float], dtype: torch.dtype) -> None:
        names = sorted(parameters, key=lambda name: name not in scales)  # every A, then every B, each in module order
        first = next(iter(parameters.values()))
        spans, end, previous = {}, 0, None
        for name in names:
            p = parameters[name]
            # `layers.0.self_attn.q_proj.lora_A.default.weight`: what its layer is part of, and the width of the input
            joint = (name.split(".lora_")[0].rpartition(".")[0], p.shape[1:]) if name in scales else None
            begin = end if joint is not None and joint == previous else -(-end // ALIGNED) * ALIGNED
            spans[name], end, previous = (begin, begin + p.numel()), begin + p.numel(), joint
        self.spans = {name: spans[name] for name in parameters}
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.weight = nn.Parameter(torch.zeros(end, device=first.device))
        self.weight.grad = self.grad = torch.zeros_like(self.weight, requires_grad=False)
        self.shadow = torch.empty(end, dtype=dtype, device=first.device)
        for name, weight in self.parts(self.weight.detach()).items():
            weight.copy_(parameters[name].detach())
            parameters[name].data = weight
        shadows, grads = self.parts(self.shadow), self.parts(self.grad)
        for name, p in parameters.items():
            p.grad = grads[name]
            setattr(p, _SLOT, Slot(shadows[name], grads[name], scales.get(name, 1.0)))
        self._casts = self._runs([(spans[name][0], scales.get(name, 1.0)) for name in names], end)
        self.exact = sums_in_fp32(first.device, dtype)
        self.refresh()

    def _runs(self, begins: Sequence[tuple[int, float]], end: int) -> list[tuple[Tensor, Tensor, float]]:
        """Pieces of ``weight`` and ``shadow`` between which the scale does not change: in all, two in a usual run."""
        changes = [i for i, (_, scale) in enumerate(begins) if i == 0 or scale != begins[i - 1][1]]
        edges = [*(begins[i][0] for i in changes), end]
        pieces = [slice(*pair) for pair in pairwise(edges)]
        whole = self.weight.detach()
        return [(whole[piece], self.shadow[piece], begins[i][1]) for piece, i in zip(pieces, changes, strict=True)]

    def parts(self, whole: Tensor) -> dict[str, Tensor]:
        """Views of a tensor like ``weight``, by parameter name and in its shape."""
        return {name: whole[begin:end].view(self.shapes[name]) for name, (begin, end) in self.spans.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights for the next passes; due after every change of them."""
        for weight, shadow, scale in self._casts:
            torch.mul(weight, scale, out=shadow)


def adjacent(parts: Sequence[Tensor], elements: Sequence[int]) -> bool:
    """Whether each part begins in one storage ``elements`` after the one before it."""
    at, place = parts[0].storage_offset(), parts[0].untyped_storage()._cdata
    for part, count in zip(parts, elements, strict=True):
        if part.storage_offset() != at or part.untyped_storage()._cdata != place:
            return False
        at += count
    return True


def joined_rows(parts: Sequence[Tensor]) -> Tensor | None:
    """Matrices (n_i, K) that follow each other in memory as one (sum n_i, K) view; None where they do not."""
    first = parts[0]
    if len(parts) == 1:
        return first
    width = first.shape[1]
    same = all(part.shape[1] == width and part.is_contiguous() for part in parts)
    if not same or not adjacent(parts, [part.numel() for part in parts]):
        return None
    return first.as_strided((sum(len(part) for part in parts), width), (width, 1))


class _AddProduct(Protocol):
    """total += scale a b."""

    def __call__(self, total: Tensor, a: Tensor, b: Tensor, scale: float) -> object: ...


def _added_in_place(total: Tensor, a: Tensor, b: Tensor, scale: float) -> object:
    return torch.addmm(total, a, b, out_dtype=torch.float32, alpha=scale, out=total)


def _added_after(total: Tensor, a: Tensor, b: Tensor, scale: float) -> object:
    return total.add_(torch.mm(a, b, out_dtype=torch.float32), alpha=scale)


@cache
def _exact(device: torch.device, dtype: torch.dtype) -> _AddProduct | None:
    """The first way of adding products of matrices in ``dtype`` that is exact in fp32; each is tried once.

    ``addmm`` takes an fp32 total with other matrices from torch 2.10 on; ``mm`` has an fp32 result from 2.8 on.
    """
    ones = torch.ones(16, 4104, dtype=dtype, device=device)
    for add in (_added_in_place, _added_after):
        total = torch.ones(16, 16, device=device)
        try:
            add(total, ones, ones.t(), 0.5)
        except torch.OutOfMemoryError:  # tells nothing about the function, and the answer is kept
            raise
        except (RuntimeError, TypeError):
            continue
        if bool((total == 4104 / 2 + 1).all()):  # which bf16 and fp16 would round
            return add
    return None


def sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``add_product`` of matrices in ``dtype`` is exact in fp32."""
    return dtype == torch.float32 or (device.type == "cuda" and _exact(device, dtype) is not None)


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """total += scale a b, for an fp32 total; rounded to the matrices' format before where ``sums_in_fp32`` is False."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    elif a.device.type == "cuda" and (add := _exact(a.device, a.dtype)):
        add(total, a, b, scale)
    else:
        total.add_(a @ b, alpha=scale)
