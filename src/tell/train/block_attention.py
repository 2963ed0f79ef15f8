"""Attention over rows padded into blocks: gathers with cheap gradients, and two batched products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tell.train.torch_types import Context

if TYPE_CHECKING:
    from tell.train.attention import Rule


class Gather(torch.autograd.Function):
    """Rows of x at ``index``; the gradient is a gather too, by the inverse index (no scatter-add)."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, index: Tensor, inverse: Tensor, holes: Tensor | None) -> Tensor:
        ctx.inverse, ctx.holes = inverse, holes
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.index_select(0, ctx.inverse)
        if ctx.holes is not None:  # slots that fed no output get no gradient
            out.index_fill_(0, ctx.holes, 0)
        return out, None, None, None


def softmax_scores(scores: Tensor, rule: Rule, hidden: Tensor | None) -> Tensor:
    """Probabilities of scores (..., queries, keys); ``hidden`` is True where a key is masked."""
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1)


class BlockAttention(torch.autograd.Function):
    """softmax([q kp^T, q k^T]) [vp; v] for a block of rows, with its backward pass written out.

    Autograd over the same products would save and zero-fill a full score matrix for each slice, mask and
    concatenation; here only the probabilities are kept. Shapes: q (N, M, D) with N = key heads x rows and
    M = query heads per key head x length; k, v (N, L, D); kp, vp (key heads, P, D) or None, P keys that all
    rows of a head share and all queries see; hidden (L, L) bool.
    """

    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, kp: Tensor | None, vp: Tensor | None, hidden: Tensor
    ) -> Tensor:
        n, m, width = q.shape
        length = k.shape[1]
        scores = torch.bmm(q, k.transpose(1, 2))
        scores.view(n, m // length, length, length).masked_fill_(hidden, float("-inf"))
        if kp is not None:
            ahead = torch.bmm(q.view(len(kp), -1, width), kp.transpose(1, 2))
            scores = torch.cat([ahead.view(n, m, -1), scores], dim=-1)
        probs = scores.softmax(dim=-1)
        del scores
        ctx.save_for_backward(q, k, v, kp, vp, probs)
        if kp is None or vp is None:
            return torch.bmm(probs, v)
        prefix = kp.shape[1]
        out = torch.bmm(probs[..., :prefix].reshape(len(kp), -1, prefix), vp).view(n, m, -1)
        return out.baddbmm_(probs[..., prefix:].contiguous(), v)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kp, vp, probs = ctx.saved_tensors
        n, m, width = q.shape
        grad = grad.contiguous()
        d_probs = torch.bmm(grad, v.transpose(1, 2))
        if kp is None:
            dv = torch.bmm(probs.transpose(1, 2), grad)
            ds = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            return torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), dv, None, None, None
        kv, prefix = len(kp), kp.shape[1]
        grads, queries = grad.view(kv, -1, grad.shape[-1]), q.view(kv, -1, width)
        ahead, own = probs[..., :prefix].reshape(kv, -1, prefix), probs[..., prefix:].contiguous()
        dv = torch.bmm(own.transpose(1, 2), grad)
        dvp = torch.bmm(ahead.transpose(1, 2), grads)
        d_ahead = torch.bmm(grads, vp.transpose(1, 2)).view(n, m, prefix)
        ds = torch._softmax_backward_data(torch.cat([d_ahead, d_probs], dim=-1), probs, -1, probs.dtype)
        ds_ahead, ds_own = ds[..., :prefix].reshape(kv, -1, prefix), ds[..., prefix:].contiguous()
        dq = torch.bmm(ds_ahead, kp).view(n, m, width).baddbmm_(ds_own, k)
        dkp = torch.bmm(ds_ahead.transpose(1, 2), queries)
        return dq, torch.bmm(ds_own.transpose(1, 2), q), dv, dkp, dvp, None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of similar length, padded to the longest.

    Attributes:
        rows: number of rows.
        longest: tokens of the longest.
        start: (rows,) int64, on the CPU: first packed token of each row.
        length: (rows,) int64, on the CPU: tokens of each row.
    """

    rows: int
    longest: int
    start: Tensor
    length: Tensor
