"""Differentiable operations over the kernels: norm, projections with LoRA, gated product, heads, packed attention.

All but attention run on both back ends of ``Kernels``: a GPU has ``Heads`` and then the plan's own attention. Each
computes the same as the model's own modules, but rounds to the model's number format once where torch operations round
after every pass. Frozen weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tell.kernels.ops import CKernels
from tell.kernels.packed_attention import Functions, RowAttention, row_attention
from tell.kernels.triton_ops import HeadLayout, TritonKernels
from tell.train.attention import PackedPlan
from tell.train.fast.stacked import Lora, Stack, kernels_of
from tell.train.flat import adjacent
from tell.train.torch_types import Context


def _gpu_kernels_of(x: Tensor) -> TritonKernels:
    found = kernels_of(x)
    assert isinstance(found, TritonKernels)
    return found


def _c_kernels_of(x: Tensor) -> CKernels:
    found = kernels_of(x)
    assert isinstance(found, CKernels)
    return found


class NormCall(NamedTuple):
    """What makes a norm's output again, on a GPU, where projections keep this instead of their input.

    Attributes:
        x: (T, heads * width) input.
        weight: (width,).
        rstd: (T, heads) fp32, as ``Kernels.rmsnorm`` leaves it.
        heads, eps, offset: as of ``Kernels.rmsnorm``.
        versions: of input and output, as torch counts changes in place.
    """

    x: Tensor
    weight: Tensor
    rstd: Tensor
    heads: int
    eps: float
    offset: float
    versions: tuple[int, int]

    def output(self) -> Tensor:
        """The same numbers as before, by the same kernel."""
        x, weight, rstd, heads, eps, offset, _ = self
        y = x.new_empty(x.shape)
        kernels_of(x).rmsnorm(x, y, weight, torch.empty_like(rstd), heads=heads, eps=eps, offset=offset)
        return y


_NORM = "_norm_call"  # attribute of a norm's output


def _norm_of(x: Tensor) -> NormCall | None:
    """The norm whose whole output ``x`` is, or shows with its rows arranged otherwise; neither changed since."""
    for tensor in (x, x._base):
        call: NormCall | None = getattr(tensor, _NORM, None)
        if tensor is None or call is None:
            continue
        same = x.is_contiguous() and x.storage_offset() == tensor.storage_offset()
        rows = (x.numel(), x.shape[-1]) == (call.x.numel(), call.x.shape[-1])
        if same and rows and call.versions == (call.x._version, x._version):
            return call
    return None


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * (offset + weight) over each head of x (..., heads * width); Zhang and Sennrich 2019."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        flat = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        heads = flat.shape[1] // weight.shape[0]
        y = flat.new_empty(flat.shape)
        rstd = flat.new_empty(len(flat), heads, dtype=torch.float32)
        kernels_of(x).rmsnorm(flat, y, weight, rstd, heads=heads, eps=eps, offset=offset)
        ctx.save_for_backward(flat, weight, rstd)
        ctx.offset, ctx.heads, ctx.shape = offset, heads, x.shape
        if isinstance(kernels_of(x), TritonKernels) and not (flat.is_inference() or y.is_inference()):
            setattr(y, _NORM, NormCall(flat, weight, rstd, heads, eps, offset, (flat._version, y._version)))
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy = grad.reshape(-1, x.shape[1])
        if dy.stride(1) != 1:  # the gradient of a sum is a scalar, expanded
            dy = dy.contiguous()
        dx = x.new_empty(x.shape)
        kernels_of(x).rmsnorm_back(dy, x, weight, rstd, dx, heads=ctx.heads, offset=ctx.offset)
        return dx.view(ctx.shape), None, None, None


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Column blocks (T, n_i) as one (T, sum n_i): without a copy where they are already adjacent."""
    first = parts[0]
    if len(parts) == 1:
        return first.contiguous()
    width = sum(part.shape[1] for part in parts)
    if not adjacent(parts, [part.shape[1] for part in parts]) or any(part.stride() != (width, 1) for part in parts):
        return torch.cat(list(parts), dim=1)
    return first.as_strided((first.shape[0], width), (width, 1))


class Projection(torch.autograd.Function):
    """Linear layers over x (..., K) as one product, with their adapters.

    ``adapters`` are A_i (r, K) and B_i (N_i, r) of each adapted layer in turn; outputs (..., N_i) share one buffer.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, stack: Stack, *adapters: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.lora = Lora(stack, adapters, flat)
        y, u = ctx.lora.forward(flat)
        norm = _norm_of(x)
        ctx.norm = None if norm is None else norm[3:]
        if u is not None:  # a norm keeps its input anyway
            ctx.save_for_backward(u, *((flat,) if norm is None else norm[:3]))
        ctx.shape = x.shape
        return tuple(part.view(*x.shape[:-1], -1) for part in y.split(stack.widths, dim=1))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lora: Lora = ctx.lora
        gy = joined([grad.reshape(-1, grad.shape[-1]) for grad in grads])
        gx, gu = (
            lora.input_gradient(gy) if ctx.needs_input_grad[0] or not lora.parts else (None, lora.inner_gradient(gy))
        )
        out: Sequence[Tensor | None] = []
        if gu is not None:
            u, *kept = ctx.saved_tensors
            flat = kept[0] if ctx.norm is None else NormCall(*kept, *ctx.norm).output()
            out = lora.adapter_gradients(flat, gy, u, gu)
        return (None if gx is None else gx.view(ctx.shape), None, *out)


class Gated(torch.autograd.Function):
    """act(g) u for g, u (..., width), equally strided."""

    @staticmethod
    def forward(ctx: Context, g: Tensor, u: Tensor, kind: int) -> Tensor:
        shape = g.shape
        g, u = _flat_pair(g, u)
        h = g.new_empty(g.shape)
        kernels_of(g).gated(g, u, h, kind)
        ctx.save_for_backward(g, u)
        ctx.kind, ctx.shape = kind, shape
        return h.view(shape)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        g, u = ctx.saved_tensors
        dh = grad.reshape(g.shape).clone(memory_format=torch.contiguous_format)
        dg, du = _gated_back(dh, g, u, ctx.kind)
        return dg.view(ctx.shape), du.view(ctx.shape), None


def _flat_pair(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (T, width), equally strided."""
    g, u = (x if x.dim() == 2 else x.view(-1, x.shape[-1]) for x in (g, u))
    return (g, u) if g.stride() == u.stride() else (g.contiguous(), u.contiguous())


def _gated_back(dh: Tensor, g: Tensor, u: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """dg and du, adjacent in one buffer; dh becomes act(g) u."""
    width = g.shape[1]
    both = g.new_empty(len(g), 2 * width)
    dg, du = both[:, :width], both[:, width:]
    kernels_of(g).gated_back(dh, g, u, dg, du, kind)
    return dg, du


class GatedProjection(torch.autograd.Function):
    """A linear layer, with its adapter A (r, K), B (N, r) if any, over act(g) u for g, u (..., K), equally strided.

    act(g) u is not kept but recomputed in the backward pass; ``kind`` is ``SILU`` or ``GELU_TANH``.
    """

    @staticmethod
    def forward(ctx: Context, g: Tensor, u: Tensor, kind: int, stack: Stack, *adapters: Tensor) -> Tensor:
        shape = g.shape
        g, u = _flat_pair(g, u)
        h = g.new_empty(g.shape)
        kernels_of(g).gated(g, u, h, kind)
        ctx.lora = Lora(stack, adapters, h)
        y, inner = ctx.lora.forward(h)
        ctx.save_for_backward(g, u, *([] if inner is None else [inner]))
        ctx.kind, ctx.shape = kind, shape
        return y.view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, u, *inner = ctx.saved_tensors
        gy = grad.reshape(len(g), -1).contiguous()
        gh, gu = ctx.lora.input_gradient(gy)
        dg, du = _gated_back(gh, g, u, ctx.kind)  # gh is act(g) u now
        out = ctx.lora.adapter_gradients(gh, gy, inner[0], gu) if gu is not None else []
        return dg.view(ctx.shape), du.view(ctx.shape), None, None, *out


class Heads(torch.autograd.Function):
    """Queries (T, H, D), keys and values (T, Hk, D) for attention from their projections, on a GPU.

    Norms and RoPE of a ``HeadLayout`` are applied to queries and keys. ``parts`` are queries (T, H D), keys and values
    (T, Hk D), or all of them joined. The gradients of ``parts`` are one buffer, as ``Projection`` takes it.
    """

    @staticmethod
    def forward(ctx: Context, layout: HeadLayout, *parts: Tensor) -> tuple[Tensor, ...]:
        whole, normed = joined(parts), layout.query_norm is not None
        q, k, width = layout.queries, layout.keys, layout.width
        # with norms the projections are kept for the way back, so values can stay where they are
        out = whole.new_empty(len(whole), layout.columns - (k * width if normed else 0))
        rstd = whole.new_empty(len(whole), q + k, dtype=torch.float32) if normed else None
        _gpu_kernels_of(whole).heads(whole, out, rstd, layout)
        if rstd is not None:
            ctx.save_for_backward(whole, rstd)
        ctx.layout, ctx.widths = layout, [part.shape[1] for part in parts]
        heads = out.view(len(out), -1, width)
        values = whole[:, (q + k) * width :].view(len(whole), k, width) if normed else heads[:, q + k :]
        return heads[:, :q], heads[:, q : q + k], values

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: HeadLayout = ctx.layout
        whole, rstd = ctx.saved_tensors or (None, None)
        gq, gk, gv = (g.reshape(len(g), -1) for g in grads)  # copies only what the plan left scattered
        grad = gq.new_empty(len(gq), layout.columns)
        _gpu_kernels_of(gq).heads_back((gq, gk, gv), grad, whole, rstd, layout)
        return None, *grad.split(ctx.widths, dim=1)


class AttentionCall(NamedTuple):
    """What one call of attention needs besides queries, keys and values.

    Attributes:
        plan: what attends to what.
        cosine, sine: (T, rot) of the tokens' positions.
        heads, kv: H and Hk.
        scaling: of the scores.
        window: keys in sight, including the query's own; None for all.
    """

    plan: PackedPlan
    cosine: Tensor
    sine: Tensor
    heads: int
    kv: int
    scaling: float
    window: int | None

    def rows(self, functions: Functions, q: Tensor, k: Tensor, v: Tensor) -> RowAttention:
        start, length, prefix = self.plan.rows()
        tensors = q, k, v, self.cosine, self.sine, start, length
        return RowAttention(functions, *tensors, prefix, self.heads, self.kv, self.scaling, self.window)


class Attention(torch.autograd.Function):
    """RoPE, causal attention within each row of a plan, and the shared prefix, over packed tokens, on a CPU.

    (T, H D) of projections q (T, H D), k and v (T, Hk D), whose rows may be strided.
    """

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        ctx.call = call
        plan, cosine, sine, heads, kv, scaling, window = call
        width, group = q.shape[1] // heads, heads // kv
        if (rows := row_attention(q.dtype, width)) is not None:
            out, lse = call.rows(rows, q, k, v).forward()
            ctx.save_for_backward(q, k, v, out, lse)
            return out
        kernels, rope = _c_kernels_of(q), (cosine, sine)
        out = q.new_empty(q.shape[0], heads * width)
        saved: list[Tensor] = []
        for number, block in enumerate(plan.packed_blocks()):
            prefix = plan.prefix if number else 0  # the prefix, where there is one, is the first block
            longest, keys = _rounded(block.longest), _rounded(prefix + block.longest)
            qb = q.new_empty(kv * block.rows, group * longest, width)
            kb, vb = (q.new_empty(kv * block.rows, keys, width) for _ in range(2))
            kernels.pack(q, rope, qb, block, heads=heads, group=group, scale=scaling)
            kernels.pack(k, rope, kb, block, heads=kv, prefix=prefix, scale=1.0)
            kernels.pack(v, None, vb, block, heads=kv, prefix=prefix, scale=1.0)
            probs = torch.bmm(qb, kb.transpose(1, 2))
            kernels.softmax(probs, longest, prefix, window)
            ob = torch.bmm(probs, vb)
            kernels.unpack(ob, None, out, block, heads=heads, group=group, scale=1.0)
            saved += [qb, kb, vb, probs]
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, grad = ctx.call, grad.contiguous()
        plan, cosine, sine, heads, kv, scaling, _ = call
        if (rows := row_attention(grad.dtype, grad.shape[1] // heads)) is not None:
            q, k, v, out, lse = ctx.saved_tensors
            return *call.rows(rows, q, k, v).backward(out, lse, grad), None
        saved = ctx.saved_tensors
        kernels, rope = _c_kernels_of(grad), (cosine, sine)
        group, width = heads // kv, grad.shape[1] // heads
        both = grad.new_empty(grad.shape[0], (heads + 2 * kv) * width)
        gq, gk, gv = both.split([heads * width, kv * width, kv * width], dim=1)
        totals = [torch.zeros(kv, plan.prefix, width) for _ in range(2)]  # for the prefix's keys and values
        for number, block in reversed(
            list(enumerate(plan.packed_blocks()))
        ):  # the prefix last: its gradient sums over all
            qb, kb, vb, probs = saved[4 * number : 4 * number + 4]
            prefix = plan.prefix if number else 0
            longest = _rounded(block.longest)
            go = torch.empty_like(qb)
            kernels.pack(grad, None, go, block, heads=heads, group=group, scale=1.0)
            dv = torch.bmm(probs.transpose(1, 2), go)
            ds = torch.bmm(go, vb.transpose(1, 2))
            kernels.softmax_back(probs, ds, longest, prefix)
            dq = torch.bmm(ds, kb)
            dk = torch.bmm(ds.transpose(1, 2), qb)
            for x, total in zip((dk, dv), totals, strict=True):
                if prefix:
                    kernels.gather_prefix(x, block.rows, total)
                elif plan.prefix:
                    kernels.add_prefix(x, total)
            kernels.unpack(dq, rope, gq, block, heads=heads, group=group, scale=scaling)
            kernels.unpack(dk, rope, gk, block, heads=kv, prefix=prefix, scale=1.0)
            kernels.unpack(dv, None, gv, block, heads=kv, prefix=prefix, scale=1.0)
        return gq, gk, gv, None


def _rounded(n: int) -> int:
    """Lengths in whole vectors, which the kernels require and products run faster with."""
    return -(-n // 16) * 16
