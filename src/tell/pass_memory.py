"""Memory of a forward and backward pass, and the largest pass that fits. Imports no torch.

A pass holds most when its forward pass is done and the loss computes its largest block of logits, or in the backward
pass of a layer. Of a layer that is recomputed (Chen et al. 2016, arXiv 1604.06174) only the input is kept until then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

MICRO_TOKENS = 3072  # of a pass whose size is not chosen by memory
FULL_PASS = 2048  # a larger pass makes a GPU hardly faster: layers are recomputed rather than passes made smaller
MOST_TOKENS = 16_384  # no pass is chosen larger; offsets into its widest tensors stay within 32 bits
LOSS_ROWS = 256  # positions whose logits a CPU computes at a time, as in train/loss.py
GPU_LOGITS = 1 << 27  # logits that a GPU computes at a time
GRADIENTS = 0.75  # of what a layer keeps, its gradients take at most: those of the MLP's inner states (a profile)
FRAGMENTS = 0.05  # share of free memory that the allocator's rounding may waste
WORKSPACE = 0.2e9  # bytes that the libraries of a GPU take at their first product
_SEGMENTS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@dataclass(frozen=True, slots=True)
class Fit:
    """A pass that was chosen by memory.

    Attributes:
        micro_tokens: most tokens of a pass.
        level: decoder layers that are recomputed, the first ones.
        bytes: predicted peak of the pass.
        fits: False where even the smallest pass needs more than there is.
    """

    micro_tokens: int
    level: int
    bytes: float
    fits: bool


@dataclass(frozen=True, slots=True)
class PassMemory:
    """What a pass keeps until its backward pass, in bytes.

    Attributes:
        layers: number of decoder layers.
        kept: per token, by one layer.
        entry: per token, by a layer that is recomputed: its input.
        rest: per token, outside the layers.
        block: of the largest block of logits with what is computed from it.
    """

    layers: int
    kept: float
    entry: float
    rest: float
    block: float

    def _slopes(self, level: int) -> tuple[float, float]:
        """Bytes per token at the end of the forward pass, and in the backward pass of a layer."""
        held = (self.layers - level) * self.kept + level * self.entry
        # The layers after the first ``level`` have been freed when one of these keeps all once more.
        back = (held if level < self.layers else held + self.kept) + GRADIENTS * self.kept
        if level:
            back = max(back, level * self.entry + (1 + GRADIENTS) * self.kept)
        return held + self.rest, back + self.rest

    def peak(self, tokens: float, level: int = 0) -> float:
        """Bytes of a pass over ``tokens`` tokens whose first ``level`` layers are recomputed."""
        forward, backward = self._slopes(level)
        return max(tokens * forward + self.block, tokens * backward)

    def most_tokens(self, free: float, level: int = 0) -> int:
        """The largest pass with a peak of at most ``free`` bytes; 0 where none fits."""
        forward, backward = self._slopes(level)
        return max(0, int(min((free - self.block) / forward, free / backward)))

    def choose(
        self, free: float, *, longest: int, largest: int, micro: int | None = None, level: int | None = None
    ) -> Fit:
        """The least recomputation with which passes of a useful size fit into ``free`` bytes.

        Args:
            longest: tokens of the longest row, which is never split.
            largest: tokens of the largest step.
            micro: most tokens of a pass, where that is given.
            level: layers to recompute, where that is given.
        """
        longest, largest = min(longest, largest), max(1, largest)
        wanted = max(longest, min(largest, FULL_PASS if micro is None else micro))
        most = max(longest, min(largest, MOST_TOKENS)) if micro is None else micro
        levels = range(self.layers + 1) if level is None else [min(level, self.layers)]
        for level in levels:
            room = self.most_tokens(free, level)
            if room >= wanted:
                tokens = min(room, most) if micro is None else micro
                return Fit(tokens, level, self.peak(min(tokens, largest), level), fits=True)
        level = max(levels, key=lambda level: self.most_tokens(free, level))
        room = self.most_tokens(free, level)
        tokens = max(longest, room)  # smaller passes, of a single row at last
        return Fit(tokens, level, self.peak(tokens, level), fits=room >= longest)


def loss_block(device: str, vocabulary: int, *, width: int, fused: bool) -> float:
    """Bytes of the largest block of logits of the loss, with what is computed from it.

    Args:
        device: name of its kind, ``cpu`` or ``cuda``.
        width: bytes of a number of the model's format.
        fused: a kernel turns logits into their gradient in place; else torch makes fp32 copies of them.
    """
    rows = max(LOSS_ROWS, GPU_LOGITS // vocabulary) if device == "cuda" else LOSS_ROWS
    return float(rows) * vocabulary * (width if fused else 2 * width + 8)


def usable(free: float, device: str, trained: int) -> float:
    """Of ``free`` bytes those a pass may take.

    Args:
        trained: parameters of the adapter, whose gradients, moments and copy in the model's format are yet to come.
    """
    later = 14.0 * trained + (WORKSPACE if device == "cuda" else 0)
    return max(0.0, (1 - FRAGMENTS) * free - later)


def host_memory() -> tuple[int, int]:
    """Bytes of this machine's memory within the process's control group, and those of them it may still take."""
    import psutil  # takes a tenth of a second

    whole = psutil.virtual_memory()
    total, free = whole.total, whole.available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        total, free = min(total, limit), min(free, limit - used + int(files["inactive_file"]))  # the page cache yields
    except (OSError, ValueError, KeyError):
        pass  # no control group, or one without a limit
    return total, max(0, free)


def grow_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's allocator grow its segments on a GPU, so that passes of uneven sizes leave no holes.

    To be called before CUDA starts; what the user has set stays.
    """
    if sys.platform == "linux" and not any(environment.get(name) for name in _SEGMENTS):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
