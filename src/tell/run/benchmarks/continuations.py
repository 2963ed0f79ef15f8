"""Log-likelihoods of given continuations, and whether greedy decoding would write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tell.errors import TellError
from tell.train.loss import block_size
from tell.train.packing import Pack, TrainRow, pack, split_packs
from tell.train.step import Body

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORTH = 64  # tokens; a context is shared in a separate pass only if that saves at least as many

Pair = tuple[Sequence[int], Sequence[int]]


@torch.no_grad()
def continuation_scores(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    max_positions: int,
    micro_tokens: int = 3072,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, bool]]:
    """Log-likelihood in nats of each continuation given its context, and whether each of its tokens is the likeliest.

    Continuations of one long context are computed in one pass, the context once; all others are packed by length.

    Args:
        pairs: (context ids, continuation ids), at least one each.
        max_positions: longest row, in tokens; a longer context is truncated at its start.
        micro_tokens: tokens of one pass.
        progress: called with the number of pairs finished in each pass.

    Raises:
        TellError: a continuation leaves no room for context.
    """
    body = Body(model)
    out: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    was_training = model.training
    model.eval()
    for part in _parts(pairs, max_positions):
        for rows in split_packs(part, micro_tokens, share_prefix=True):
            batch = pack(rows, share_prefix=True, device=device)
            logprobs, likeliest = _score(body, batch)
            for row, logprob, greedy in zip(rows, logprobs.tolist(), likeliest.tolist(), strict=True):
                out[row.source] = logprob, greedy
            if progress:
                progress(len(rows))
    model.train(was_training)
    return out


def _parts(pairs: Sequence[Pair], max_positions: int) -> list[list[TrainRow]]:
    """Rows that are computed together; ``source`` of a row is the number of its pair."""
    by_context: dict[tuple[int, ...], list[TrainRow]] = {}
    for i, (context, continuation) in enumerate(pairs):
        n = len(continuation)
        if n >= max_positions:
            raise TellError(
                f"an answer has {n:,} tokens and the model takes {max_positions:,}",
                where="benchmark",
                remedy="Leave that benchmark out, or use a model with a longer context.",
            )
        ids = np.array([*context, *continuation][-max_positions:], dtype=np.int64)
        mask = np.arange(len(ids)) >= len(ids) - n
        by_context.setdefault(tuple(context), []).append(TrainRow(ids, mask, i, False))
    apart = {key for key, rows in by_context.items() if len(key) * (len(rows) - 1) >= WORTH}
    rest = [row for key, rows in by_context.items() if key not in apart for row in rows]
    return [by_context[key] for key in by_context if key in apart] + ([rest] if rest else [])


def _score(body: Body, batch: Pack) -> tuple[Tensor, Tensor]:
    """(rows,) log-likelihood and (rows,) bool, over the trained tokens of each row of a pack."""
    states, targets = body.states(batch), batch.targets
    logprob = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
    wrong = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
    block = block_size(states.device, len(body.head))
    for begin in range(0, len(targets), block):
        span = slice(begin, begin + block)
        logits = torch.nn.functional.linear(states[span], body.head, body.bias).float()
        if body.softcap is not None:
            logits = logits.div_(body.softcap).tanh_().mul_(body.softcap)
        picked = logits.gather(1, targets[span, None])[:, 0]
        logprob[span] = picked - logits.logsumexp(dim=1)
        wrong[span] = (logits.argmax(dim=1) != targets[span]).float()
    zeros = torch.zeros(len(batch.trained), dtype=torch.float32, device=targets.device)
    return zeros.index_add(0, batch.row, logprob), zeros.index_add(0, batch.row, wrong) == 0
