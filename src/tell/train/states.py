"""Hidden states of prompts at any layer, in one packed pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from tell.train.attention import use_plan
from tell.train.packing import Pack, TrainRow, pack, split_packs
from tell.train.step import Body

if TYPE_CHECKING:
    from transformers import PreTrainedModel

State = Literal["last", "mean"]


def hidden_states(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    states: Sequence[State] = ("last",),
    micro_tokens: int = 3072,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """(states, layers, rows, width) float32 hidden states of each prompt.

    Args:
        model: a causal model.
        prompts: token ids of each row.
        layers: 0 for the embeddings, k for the k-th block's output; the last block's comes after the final norm, as
            transformers' ``hidden_states`` has it.
        states: of the last token, or the mean over all tokens.
        micro_tokens: tokens of one pass; a longer row gets its own pass.
        progress: called with the rows of each pass.

    Raises:
        TellError: an architecture that cannot be computed over packed rows.
    """
    body, device = Body(model), model.device
    # A pack returns the states that predict trained tokens, so a dummy token follows each prompt.
    rows = [
        TrainRow(np.array([*ids, 0]), np.arange(len(ids) + 1) == len(ids), i, False) for i, ids in enumerate(prompts)
    ]
    groups: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    was_training = model.training
    model.eval()
    for group in split_packs(rows, micro_tokens, share_prefix=True):
        batch = pack(group, share_prefix=True, device=device)
        with torch.no_grad(), use_plan(batch.plan):
            found = body.core(
                input_ids=batch.ids[None],
                position_ids=batch.plan.positions(),
                use_cache=False,
                output_hidden_states=True,
            )
            wanted = [found.hidden_states[layer][0] for layer in layers]
            made = [torch.stack([_pooled(tokens, batch, group, state) for tokens in wanted]) for state in states]
        groups.append(batch.source.numpy())
        parts.append(torch.stack(made).cpu().numpy())
        if progress:
            progress(len(group))
    model.train(was_training)
    order = np.argsort(np.concatenate(groups))
    return np.concatenate(parts, axis=2)[:, :, order]


def _pooled(tokens: Tensor, batch: Pack, group: Sequence[TrainRow], state: State) -> Tensor:
    """(rows, width) fp32 states of the rows of a pack, from its tokens' (T, width)."""
    if state == "last":
        return tokens.index_select(0, batch.predictors).float()
    tokens = tokens.cpu() if tokens.device.type == "mps" else tokens  # Metal has no fp64
    sums = torch.cat([tokens.new_zeros(1, tokens.shape[1]), tokens]).double().cumsum(0)
    ends, lengths = batch.predictors.to(sums.device) + 1, [len(row.ids) - 1 for row in group]
    n = torch.tensor(lengths, device=sums.device)
    prefix = batch.prefix
    return ((sums[ends] - sums[ends - n + prefix] + sums[prefix]) / n[:, None]).float()
