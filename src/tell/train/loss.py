"""Cross-entropy over trained positions only, in blocks that never hold the full logits."""

from __future__ import annotations

import torch
from torch import Tensor

from tell.kernels.ops import kernels_for
from tell.pass_memory import GPU_LOGITS, LOSS_ROWS
from tell.train.torch_types import Context


def block_size(device: torch.device, vocabulary: int) -> int:
    """Positions whose logits are computed at a time."""
    return max(LOSS_ROWS, GPU_LOGITS // vocabulary) if device.type == "cuda" else LOSS_ROWS


class GradientMade(torch.autograd.Function):
    """A weighted sum whose gradient with respect to the states was computed in the forward pass, as ``ctx.grad``."""

    @staticmethod
    def backward(ctx: Context, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.grad * grad_loss.to(ctx.grad.dtype) if ctx.grad is not None else None
        return grad, None, None, None, None, None


class _BlockedCrossEntropy(GradientMade):
    """sum_i weight_i * nll_i; the gradient is computed in the forward pass, block by block."""

    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        softcap: float | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        kernels = kernels_for(hidden)
        if kernels is not None and softcap is not None and not kernels.caps_logits:
            kernels = None
        weights = weights.float().contiguous()
        block = min(block_size(hidden.device, len(head)), len(targets))
        room = hidden.new_empty(block, len(head))  # shared by all blocks: too large for the allocator to keep
        for begin in range(0, len(targets), block):
            span = slice(begin, begin + block)
            logits = room[: len(targets[span])]
            torch.mm(hidden[span], head.t(), out=logits)
            if bias is not None:
                logits += bias
            if kernels is not None:
                part = nll[span]
                kernels.cross_entropy(logits, targets[span], None if grad is None else weights[span], part, softcap)
                if grad is not None:
                    torch.mm(logits, head, out=grad[span])
                continue
            logits = logits.float()
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            picked = logits.gather(1, targets[span, None])
            lse = logits.logsumexp(dim=1, keepdim=True)
            nll[span] = (lse - picked)[:, 0]
            if grad is not None:
                slope = None if softcap is None else 1 - (logits / softcap) ** 2
                probs = logits.sub_(lse).exp_()
                probs.scatter_add_(1, targets[span, None], torch.full_like(picked, -1.0))
                probs.mul_(weights[span, None])
                if slope is not None:
                    probs.mul_(slope)
                grad[span] = probs.to(head.dtype) @ head
                del probs, slope  # else they are held while the next block is made
            del logits
        ctx.grad = grad
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll


def blocked_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of negative log-likelihoods, and each of them: (n,) fp32 nats, without gradient.

    Args:
        hidden: (n, h) final hidden states at the trained positions.
        head: (V, h) output embedding; gets no gradient.
        targets: (n,) int64 next tokens.
        weights: (n,) fp32 weight of each position in the sum.
        softcap: Gemma 2's cap on logits.
        bias: (V,) of the output layer, where it has one (Phi-2); gets no gradient.
    """
    return _BlockedCrossEntropy.apply(hidden, head, targets, weights, softcap, bias)
