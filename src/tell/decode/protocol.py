"""The interface of decoding engines: TELL's own and vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from tell.decode.engine_rows import Answer
    from tell.decode.grammar import Mask
    from tell.decode.guide import Guide
    from tell.decode.sampler import Decoding


class DecodingEngine(Protocol):
    """Decodes with a base model, or inside ``adapter`` with a fine-tuned one.

    Attributes:
        name: in ``generate.engine``.
        how: in words, how the last answers were decoded; "" where there were none.
        fallback: why it decodes where another engine was wanted; "" where none was.
    """

    name: str
    how: str
    fallback: str
    device: torch.device
    max_positions: int

    def adapter(self, folder: Path | None) -> AbstractContextManager[None]:
        """Answers inside come from the model with the LoRA adapter in ``folder``; None for the base model.

        Meanwhile the transformers model computes with it too, merged into its weights or beside them, so that losses
        are the adapter's.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        limits: Sequence[int] | None = None,
        progress: Callable[[int, float], None] | None = None,
        on_token: Callable[[int, int], object] | None = None,
        guides: Sequence[Guide | None] | None = None,
        masks: Sequence[Mask | None] | None = None,
    ) -> list[Answer]:
        """Answers in the order of ``prompts``; see `tell.decode.engine.Engine.generate`."""
        ...
