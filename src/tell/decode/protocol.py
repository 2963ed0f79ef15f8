"""What a decoding engine offers, whichever decodes: ours or vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from tell.decode.engine import Answer
    from tell.decode.sampler import Decoding


class DecodingEngine(Protocol):
    """Decodes with a model whose adapter, if any, is merged."""

    name: str
    device: torch.device
    max_positions: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        limits: Sequence[int] | None = None,
        progress: Callable[[int, float], None] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answers in the order of ``prompts``; see `tell.decode.engine.Engine.generate`."""
        ...
