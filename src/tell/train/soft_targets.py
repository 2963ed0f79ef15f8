"""What the untuned model expects at the trained positions of rows: targets of self-distillation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tell.errors import TellError
from tell.files import atomic_path
from tell.rows.row_table import RowTable
from tell.train.device import free_bytes
from tell.train.packing import RowTargets, TrainRow, pack
from tell.train.row_losses import length_groups
from tell.train.soft_loss import top_distribution
from tell.train.step import Body

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP_K = 32  # tokens kept of each distribution; the others are one bucket
MOST_MEMORY = 0.75  # share of the free memory that they may take
_PARTS = ("rows", "starts", "ids", "probs")


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """Next-token distributions at the trained positions of m rows of a table, n positions together.

    Attributes:
        rows: (m,) int64 indices into the table, ascending.
        starts: (m + 1,) int64, the positions of row ``rows[i]`` are ``starts[i]:starts[i + 1]``.
        ids: (n, k) int32 likeliest tokens.
        probs: (n, k + 1) float16 their probabilities, the last of all other tokens together.
    """

    rows: np.ndarray
    starts: np.ndarray
    ids: np.ndarray
    probs: np.ndarray

    def row(self, i: int) -> RowTargets:
        """Of row ``i`` of the table.

        Raises:
            KeyError: it is not among these.
        """
        at = int(np.searchsorted(self.rows, i))
        if at == len(self.rows) or self.rows[at] != i:
            raise KeyError(f"row {i} has no targets")
        span = slice(int(self.starts[at]), int(self.starts[at + 1]))
        return RowTargets(self.ids[span], self.probs[span])

    def mass(self) -> float:
        """Mean probability of the tokens that are kept one by one."""
        return float(1 - self.probs[:, -1].mean(dtype=np.float64))


def untuned_targets(
    model: PreTrainedModel,
    table: RowTable,
    rows: Sequence[int] | np.ndarray,
    *,
    k: int = TOP_K,
    micro_tokens: int = 3072,
    progress: Callable[[int], None] | None = None,
) -> SoftTargets:
    """The model's distributions at the trained positions of ``rows``, by packed passes without gradient.

    Args:
        model: causal, without an adapter.
        table: whose rows they are.
        rows: indices into it, each taken once.
        k: tokens kept of each distribution; fewer where the vocabulary is smaller.
        micro_tokens: tokens of one pass; a longer row gets its own pass.
        progress: called with the rows of each pass.

    Raises:
        TellError: there is not enough memory for them.
    """
    body = Body(model)
    k = min(k, len(body.head) - 1)
    chosen = np.unique(np.asarray(rows, dtype=np.int64))
    starts = np.concatenate([[0], np.cumsum(table.trained[chosen], dtype=np.int64)])
    _check_room(int(starts[-1]), k)
    ids = np.empty((int(starts[-1]), k), dtype=np.int32)
    probs = np.empty((int(starts[-1]), k + 1), dtype=np.float16)
    places = dict(zip(chosen.tolist(), zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True), strict=True))
    was_training = model.training
    model.eval()
    try:
        for group in length_groups(table, chosen.tolist(), micro_tokens):
            batch = pack([TrainRow(*table.row(i), 0, False) for i in group], share_prefix=True, device=body.device)
            with torch.no_grad():
                found = top_distribution(body.states(batch), body.head, k, body.softcap, body.bias)
            tokens, likely = found[0].int().cpu().numpy(), found[1].half().cpu().numpy()
            at = np.concatenate([np.arange(*places[i]) for i in group])
            ids[at], probs[at] = tokens, likely
            if progress:
                progress(len(group))
    finally:
        model.train(was_training)
    return SoftTargets(chosen, starts, ids, probs)


def _check_room(positions: int, k: int) -> None:
    needed, free = positions * (4 * k + 2 * (k + 1)), free_bytes(torch.device("cpu"))
    if needed > MOST_MEMORY * free:
        raise TellError(
            f"the distributions at {positions:,} positions take {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB free",
            where="train.general_target",
            remedy="Lower general.tokens, or use train.general_target=text.",
        )


def cached_targets(path: Path, table: RowTable, rows: np.ndarray, make: Callable[[], SoftTargets]) -> SoftTargets:
    """The targets of a stopped training, so that it goes on with the very same ones; made and kept where missing.

    Args:
        path: of the cache; one of other rows, or that cannot be read, is replaced. One that cannot be written costs
            a resumed run the time to make them again, not the run.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file

    digest = _digest(table, rows)
    with suppress(OSError, ValueError, SafetensorError), safe_open(str(path), "numpy") as file:
        if (file.metadata() or {}).get("digest") == digest:
            return SoftTargets(*(file.get_tensor(part) for part in _PARTS))
    targets = make()
    with suppress(TellError, OSError, SafetensorError), atomic_path(path) as temporary:
        parts = {part: np.ascontiguousarray(getattr(targets, part)) for part in _PARTS}
        save_file(parts, str(temporary), {"digest": digest})
    return targets


def _digest(table: RowTable, rows: np.ndarray) -> str:
    """Of the tokens and masks of rows, and of how much is kept of their distributions."""
    digest = hashlib.sha256(f"{TOP_K} {len(rows)}".encode())
    for i in np.unique(rows).tolist():
        ids, mask = table.row(i)
        digest.update(i.to_bytes(8, "little") + ids.tobytes() + mask.tobytes())
    return digest.hexdigest()
