"""Whether Triton's kernels compile on a GPU and compute what torch does: tried once, before any is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tell.errors import first_line
from tell.kernels.draws import device_seed
from tell.kernels.ops import GELU_TANH, SILU, threshold_of
from tell.kernels.triton_ops import HeadLayout, TritonKernels

TOLERANCE = 1e-3  # of the largest value, in fp32


class Found(NamedTuple):
    """The kernels of a device, or why there are none."""

    kernels: TritonKernels | None
    why: str | None = None


@lru_cache(maxsize=8)
def gpu_kernels(device: torch.device) -> Found:
    try:
        from tell.kernels import triton_kernels
    except ImportError:
        return Found(None, "Triton is not installed")
    kernels = TritonKernels(triton_kernels)
    try:
        with torch.inference_mode(False):
            wrong = failures(kernels, device)
    except Exception as error:  # Triton's own errors derive from no common class: no compiler, an unknown card
        return Found(None, f"{type(error).__name__}: {first_line(error)}")
    return Found(None, f"Triton computes {wrong[0]} wrongly") if wrong else Found(kernels)


def failures(kernels: TritonKernels, device: torch.device) -> list[str]:
    """Names of the kernels that differ from torch on small fp32 tensors."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        trials = (*_norms(kernels, device), *_gates(kernels, device), *_heads(kernels, device), *_rest(kernels, device))
    return [name for name, ours, theirs in trials if not _same(ours, theirs)]


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


Trial = Iterator[tuple[str, Tensor, Tensor]]


def _norms(kernels: TritonKernels, device: torch.device) -> Trial:
    x = torch.randn(5, 96, device=device, requires_grad=True)
    weight, slope = torch.randn(48, device=device), torch.randn(5, 96, device=device)
    y, dx, rstd = torch.empty_like(slope), torch.empty_like(slope), x.new_empty(5, 2)
    expected = (F.rms_norm(x.view(5, 2, 48), (48,), eps=1e-5) * (1 + weight)).view(5, 96)
    kernels.rmsnorm(x.detach(), y, weight, rstd, heads=2, eps=1e-5, offset=1.0)
    kernels.rmsnorm_back(slope, x.detach(), weight, rstd, dx, heads=2, offset=1.0)
    yield "norms", y, expected.detach()
    yield "gradients of norms", dx, torch.autograd.grad(expected, x, slope)[0]


def _gates(kernels: TritonKernels, device: torch.device) -> Trial:
    for kind, act in ((SILU, F.silu), (GELU_TANH, lambda g: F.gelu(g, approximate="tanh"))):
        g, u = (torch.randn(5, 40, device=device, requires_grad=True) for _ in range(2))
        slope, h, dg, du = (torch.randn(5, 40, device=device) for _ in range(4))
        expected = act(g) * u
        kernels.gated(g.detach(), u.detach(), h, kind)
        yield "gated products", h.clone(), expected.detach()
        h.copy_(slope)
        kernels.gated_back(h, g.detach(), u.detach(), dg, du, kind)
        yield "gated products on the way back", h, expected.detach()
        for ours, theirs in zip((dg, du), torch.autograd.grad(expected, (g, u), slope), strict=True):
            yield "gradients of gated products", ours, theirs


def _heads(kernels: TritonKernels, device: torch.device) -> Trial:
    whole = torch.randn(5, 128, device=device, requires_grad=True)  # 4 queries, 2 keys, 2 values of 16
    angle = torch.rand(5, 8, device=device).repeat(1, 2)
    cosine, sine, norms = angle.cos(), angle.sin(), torch.randn(2, 16, device=device)
    for normed in (False, True):
        q, k, v = whole.view(5, 8, 16).split([4, 2, 2], dim=1)
        if normed:
            q, k = (F.rms_norm(x, (16,), w, eps=1e-5) for x, w in zip((q, k), norms, strict=True))
        turned = torch.cat([q, k], dim=1)
        a, b = turned.chunk(2, dim=-1)
        turned = turned * cosine[:, None] + torch.cat([-b, a], dim=-1) * sine[:, None]
        expected = torch.cat([turned, v], dim=1).view(5, 128)
        layout = HeadLayout(4, 2, 16, cosine, sine, *((norms[0], norms[1], 1e-5, 1e-5) if normed else ()))
        out, rstd = whole.new_empty(5, 96 if normed else 128), whole.new_empty(5, 6) if normed else None
        kernels.heads(whole.detach(), out, rstd, layout)
        yield "rotary positions", out, expected.detach()[:, : out.shape[1]]
        slope, grad = torch.randn(5, 128, device=device), whole.new_empty(5, 128)
        gq, gk, gv = slope.split([64, 32, 32], dim=1)
        kernels.heads_back((gq, gk, gv), grad, whole.detach() if normed else None, rstd, layout)
        yield "gradients of rotary positions", grad, torch.autograd.grad(expected, whole, slope)[0]


def _rest(kernels: TritonKernels, device: torch.device) -> Trial:
    targets, weights = torch.arange(5, device=device) * 9, torch.rand(5, device=device)
    for cap in (None, 2.0):
        logits = torch.randn(5, 50, device=device, requires_grad=True)
        seen = logits if cap is None else cap * torch.tanh(logits / cap)
        expected, nll, work = F.cross_entropy(seen, targets, reduction="none"), weights.clone(), logits.detach().clone()
        kernels.cross_entropy(work, targets, weights, nll, cap)
        yield "cross-entropy", nll, expected.detach()
        yield "gradients of cross-entropy", work, torch.autograd.grad((expected * weights).sum(), logits)[0]
    seed = device_seed(device) + 7  # the process may have drawn one already
    kept = _mix(_mix(torch.arange(300, device=device)) + seed) >= threshold_of(0.25)
    x, y = torch.randn(300, device=device), torch.randn(300, device=device)
    expected = torch.where(kept, x / 0.75, 0.0)
    for add in (False, True):
        out = y.clone()
        kernels.dropout(x, out, 0.25, 7, add=add)
        yield "dropout", out, expected + y if add else expected


def _mix(x: Tensor) -> Tensor:
    """As the kernels' own, on 32 bits in int64."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x & 0xFFFFFFFF) >> shift) * factor & 0xFFFFFFFF
    return x
