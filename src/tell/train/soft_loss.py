"""Cross-entropy against a distribution instead of a token: the likeliest tokens, and one bucket for all others.

The bucket keeps the loss proper. With the likeliest tokens alone, renormalised, a student equal to its teacher would
still be pushed to take all mass from the others; with the bucket its gradient is zero, and up to the target's entropy
the loss is the KL divergence of the two distributions over k + 1 outcomes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tell.train.loss import GradientMade, block_size
from tell.train.torch_types import Context


def capped_logits(hidden: Tensor, head: Tensor, softcap: float | None, bias: Tensor | None) -> Tensor:
    """(n, V) logits in fp32, or in fp64 where the states are; arguments as in ``blocked_cross_entropy``."""
    logits = torch.mm(hidden, head.t())
    if bias is not None:
        logits += bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


@torch.no_grad()
def top_distribution(
    hidden: Tensor, head: Tensor, k: int, softcap: float | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(n, k) int64 likeliest tokens and (n, k + 1) fp32 their probabilities, the last of all other tokens together.

    Args:
        hidden: (n, h) final hidden states.
        head: (V, h) output embedding, V above k.
        softcap, bias: as in ``blocked_cross_entropy``.
    """
    tokens, probabilities = [], []
    for states in hidden.split(block_size(hidden.device, len(head))):
        probs = torch.softmax(capped_logits(states, head, softcap, bias), dim=1)
        top, ids = probs.topk(k, dim=1)
        rest = probs.scatter_(1, ids, 0.0).sum(1, keepdim=True)  # summed: 1 - top would lose a small rest
        tokens.append(ids)
        probabilities.append(torch.cat([top, rest], dim=1))
    return torch.cat(tokens), torch.cat(probabilities)


def soft_cross_entropy(logits: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    """(n,) cross-entropy in nats by plain torch operations: the reference, and what the plain path trains with.

    Args:
        logits: (n, V) fp32 or fp64.
        ids, probs: as in ``blocked_soft_cross_entropy``.
    """
    log_probs = torch.log_softmax(logits, dim=1)
    rest = log_probs.scatter(1, ids, float("-inf")).logsumexp(1, keepdim=True)
    return -(probs * torch.cat([log_probs.gather(1, ids), rest], dim=1)).sum(1)


class _BlockedSoftCrossEntropy(GradientMade):
    """sum_i weight_i * cross-entropy_i; the gradient is computed in the forward pass, block by block."""

    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        head: Tensor,
        targets: tuple[Tensor, Tensor],
        weights: Tensor,
        softcap: float | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ids, goal = targets
        kind = torch.promote_types(hidden.dtype, torch.float32)
        weights, goal = weights.to(kind), goal.to(kind)
        out = torch.empty(len(ids), dtype=kind, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        block = block_size(hidden.device, len(head))
        for begin in range(0, len(ids), block):
            span = slice(begin, begin + block)
            logits = capped_logits(hidden[span], head, softcap, bias)
            top, lse = ids[span], logits.logsumexp(dim=1, keepdim=True)
            log_top = logits.gather(1, top) - lse
            slope = None if softcap is None or grad is None else 1 - (logits / softcap) ** 2
            probs = logits.sub_(lse).exp_().scatter_(1, top, 0.0)
            rest = probs.sum(1, keepdim=True).clamp_min(torch.finfo(kind).tiny)
            likely, other = goal[span, :-1], goal[span, -1:]
            out[span] = -(likely * log_top).sum(1) - (other * rest.log())[:, 0]
            if grad is not None:
                probs.mul_(1 - other / rest).scatter_(1, top, log_top.exp() - likely).mul_(weights[span, None])
                if slope is not None:
                    probs.mul_(slope)
                grad[span] = probs.to(head.dtype) @ head
            del logits, probs, slope  # else they are held while the next block is made
        ctx.grad = grad
        ctx.mark_non_differentiable(out)
        return (out * weights).sum(), out


def blocked_soft_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: tuple[Tensor, Tensor],
    weights: Tensor,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies to given distributions, and (n,) each of them in nats, without gradient.

    Args:
        hidden: (n, h) final hidden states at the trained positions.
        head: (V, h) output embedding, V above k; gets no gradient.
        targets: (n, k) int64 different tokens of each position, and (n, k + 1) their probabilities, the last of all
            other tokens together; each row sums to one.
        weights: (n,) weight of each position in the sum.
        softcap, bias: as in ``blocked_cross_entropy``.
    """
    return _BlockedSoftCrossEntropy.apply(hidden, head, targets, weights, softcap, bias)
