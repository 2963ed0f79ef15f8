"""Noise on the embeddings while training: NEFTune (arXiv 2310.05914)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from tell.train.attention import current_plan
from tell.train.device import send
from tell.train.plain import PaddedRows

if TYPE_CHECKING:
    from peft import PeftModel


@contextmanager
def embedding_noise(model: PeftModel, alpha: float) -> Iterator[None]:
    """NEFTune (arXiv 2310.05914): uniform noise of size alpha / sqrt(L d) on the embeddings while training."""

    def hook(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        if not model.training:
            return output
        plan = current_plan()
        lengths = torch.tensor(plan.lengths)  # L is each row's own length, without padding or packing
        if isinstance(plan, PaddedRows):
            size = send(alpha / (lengths * output.shape[-1]).sqrt(), output.device).to(output.dtype)
            return output + torch.empty_like(output).uniform_(-1, 1) * size[:, None, None]
        tokens = send(torch.repeat_interleave(lengths, lengths), output.device)
        size = alpha / (tokens * output.shape[-1]).sqrt().to(output.dtype)
        return output + torch.empty_like(output).uniform_(-1, 1) * size[:, None]

    handle = model.get_input_embeddings().register_forward_hook(hook) if alpha else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
