"""Differentiable operations over the compiled kernels: norm, projections with LoRA, gated product, packed attention.

Each computes what the model's own modules compute, rounding to the model's number format once where torch
operations round after every pass. Frozen weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tell.kernels.ops import Kernels, kernels_for
from tell.train.attention import PackedPlan


def _kernels(x: Tensor) -> Kernels:
    found = kernels_for(x)
    if found is None:
        raise RuntimeError(f"no kernels for {x.dtype} on {x.device}")
    return found


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * (offset + weight) over each head of x (..., heads * width); Zhang and Sennrich 2019."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        flat = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        heads = flat.shape[1] // weight.shape[0]
        y = torch.empty(flat.shape, dtype=x.dtype)
        rstd = torch.empty(len(flat), heads)
        _kernels(x).rmsnorm(flat, y, weight, rstd, heads=heads, eps=eps, offset=offset)
        ctx.save_for_backward(flat, weight, rstd)
        ctx.offset, ctx.heads, ctx.shape = offset, heads, x.shape
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy = grad.reshape(-1, x.shape[1])
        dx = torch.empty(x.shape, dtype=x.dtype)
        _kernels(x).rmsnorm_back(dy, x, weight, rstd, dx, heads=ctx.heads, offset=ctx.offset)
        return dx.view(ctx.shape), None, None, None


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Column blocks (T, n_i) as one (T, sum n_i): without a copy where they already lie side by side."""
    first = parts[0]
    if len(parts) == 1:
        return first.contiguous()
    width = sum(part.shape[1] for part in parts)
    at = first.data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.stride() != (width, 1):
            return torch.cat(list(parts), dim=1)
        at += part.shape[1] * part.element_size()
    return first.as_strided((first.shape[0], width), (width, 1))


class Projection(torch.autograd.Function):
    """Linear layers over one input as one product: x W^T + b, plus s_i (dropout_i(x) A_i^T) B_i^T for each layer.

    Args:
        x: (..., K).
        weight, bias: (N, K) and (N,) or None, frozen, of all layers, one below the other.
        widths: N_i of each layer.
        scales: s_i of each layer; None where it has no adapter.
        dropout: rate on the adapters' inputs; every layer draws its own mask.
        adapters: A_i (r, K) and B_i (N_i, r) of each adapted layer, in turn.

    Returns:
        The layers' outputs (..., N_i), column blocks of one buffer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        widths: tuple[int, ...],
        scales: tuple[float | None, ...],
        dropout: float,
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.nn.functional.linear(flat, weight, bias)
        ctx.parts, ctx.seed, ctx.dropout = (), 0, dropout
        if adapters:
            parts, column, rank = [], 0, 0  # (columns, ranks, scale) of each adapter
            for width, scale in zip(widths, scales, strict=True):
                if scale is not None:
                    r = adapters[2 * len(parts)].shape[0]
                    parts.append((slice(column, column + width), slice(rank, rank + r), scale))
                    rank += r
                column += width
            a = torch.cat(adapters[0::2]).to(x.dtype)
            if len(parts) == 1 and len(widths) == 1:
                b = (adapters[1] * parts[0][2]).to(x.dtype)
            else:
                b = torch.zeros(column, rank, dtype=x.dtype)
                for (columns, ranks, scale), matrix in zip(parts, adapters[1::2], strict=True):
                    b[columns, ranks] = matrix * scale
            if dropout:
                ctx.seed = int(torch.randint(2**31, ()))
                u = torch.empty(len(flat), rank, dtype=x.dtype)
                kept = torch.empty_like(flat)
                for i, (_, ranks, _) in enumerate(parts):
                    _kernels(x).dropout(flat, kept, dropout, ctx.seed + i)
                    u[:, ranks] = kept @ a[ranks].t()
            else:
                u = flat @ a.t()
            y.addmm_(u, b.t())
            ctx.parts = tuple(parts)
            ctx.save_for_backward(flat, u, a, b, weight)
        else:
            ctx.save_for_backward(weight)
        ctx.shape = x.shape
        return tuple(part.view(*x.shape[:-1], -1) for part in y.split(widths, dim=1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gy = joined([grad.reshape(-1, grad.shape[-1]) for grad in grads])
        if not ctx.parts:
            (weight,) = ctx.saved_tensors
            return ((gy @ weight).view(ctx.shape), *[None] * 5)
        flat, u, a, b, weight = ctx.saved_tensors
        gu = gy @ b
        gx = gy @ weight if ctx.needs_input_grad[0] else None
        gb = gy.t() @ u
        if ctx.dropout:
            ga = torch.empty_like(a)
            kept = torch.empty_like(flat)
            for i, (_, ranks, _) in enumerate(ctx.parts):
                _kernels(flat).dropout(flat, kept, ctx.dropout, ctx.seed + i)
                g = gu[:, ranks].contiguous()
                torch.mm(g.t(), kept, out=ga[ranks])
                if gx is not None:
                    torch.mm(g, a[ranks], out=kept)
                    _kernels(flat).dropout(kept, gx, ctx.dropout, ctx.seed + i, add=True)
        else:
            ga = gu.t() @ flat
            if gx is not None:
                gx.addmm_(gu, a)
        out: list[Tensor] = []
        for columns, ranks, scale in ctx.parts:
            out += [ga[ranks].float(), gb[columns, ranks].float() * scale]
        return (None if gx is None else gx.view(ctx.shape), *[None] * 5, *out)


class Gated(torch.autograd.Function):
    """act(g) u for g, u (..., width), equally strided."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, kind: int) -> Tensor:
        shape = g.shape
        g, u = (x if x.dim() == 2 else x.view(-1, x.shape[-1]) for x in (g, u))
        if g.stride() != u.stride():
            g, u = g.contiguous(), u.contiguous()
        h = torch.empty(g.shape, dtype=g.dtype)
        _kernels(g).gated(g, u, h, kind)
        ctx.save_for_backward(g, u)
        ctx.kind, ctx.shape = kind, shape
        return h.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        g, u = ctx.saved_tensors
        rows, width = g.shape
        both = torch.empty(rows, 2 * width, dtype=g.dtype)
        dg, du = both[:, :width], both[:, width:]
        _kernels(g).gated_back(grad.reshape(rows, width).contiguous(), g, u, dg, du, ctx.kind)
        return dg.view(*ctx.shape[:-1], width), du.view(*ctx.shape[:-1], width), None


class Attention(torch.autograd.Function):
    """Rotary positions, causal attention within each row of a plan, and the shared prefix, over packed tokens.

    Args:
        q, k, v: (T, H D), (T, Hk D), (T, Hk D) projections, rows may be strided.
        cosine, sine: (T, rot) of the tokens' positions.
        plan: what attends to what.
        heads, kv: H and Hk.
        scaling: of the scores.
        window: keys in sight, the query's own included; None for all.

    Returns:
        (T, H D).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cosine: Tensor,
        sine: Tensor,
        plan: PackedPlan,
        heads: int,
        kv: int,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        kernels, rope = _kernels(q), (cosine, sine)
        width, group = q.shape[1] // heads, heads // kv
        out = torch.empty(q.shape[0], heads * width, dtype=q.dtype)
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
        ctx.save_for_backward(cosine, sine, *saved)
        ctx.plan, ctx.facts = plan, (heads, kv, scaling)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cosine, sine, *saved), plan = ctx.saved_tensors, ctx.plan
        heads, kv, scaling = ctx.facts
        grad = grad.contiguous()
        kernels, rope = _kernels(grad), (cosine, sine)
        group, width = heads // kv, grad.shape[1] // heads
        both = grad.new_empty(grad.shape[0], (heads + 2 * kv) * width)
        gq, gk, gv = both.split([heads * width, kv * width, kv * width], dim=1)
        totals = [torch.zeros(kv, plan.prefix, width) for _ in range(2)]  # of the prefix's keys and values
        for number, block in reversed(list(enumerate(plan.packed_blocks()))):  # the prefix last: it gathers from all
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
        return gq, gk, gv, *[None] * 7


def _rounded(n: int) -> int:
    """Lengths in whole vectors, which the kernels count on and products run faster with."""
    return -(-n // 16) * 16
