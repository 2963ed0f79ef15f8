"""Memory of a forward and backward pass, and the largest pass that fits. Imports no torch.

A pass holds most when its forward pass is done and the loss computes its largest block of logits, or in the backward
pass of a layer. Of a layer that is recomputed (Chen et al. 2016, arXiv 1604.06174) only the input is kept until then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

MICRO_TOKENS = 3072  # of a pass whose size is not chosen by memory
FULL_PASS = 2048  # a larger pass makes a GPU hardly faster: layers are recomputed rather than passes made smaller
MOST_TOKENS = 16_384  # no pass is chosen larger; offsets into its widest tensors stay within 32 bits
LOSS_ROWS = 256  # positions whose logits a CPU computes at a time: 256 x 49,152 fp32 logits are 50 MB
GPU_LOGITS = 1 << 27  # logits that a GPU computes at a time, 512 MB in fp32: small products leave it idle
GRAPHED = 2_000_000_000  # parameters of the largest model whose passes a GPU replays: above, kernels outlast launches
GRADIENTS = 0.75  # of what a layer keeps, its gradients take at most: those of the MLP's inner states (a profile)
FRAGMENTS = 0.05  # share of free memory that the allocator's rounding may waste
WORKSPACE = 0.2e9  # bytes that the libraries of a GPU take at their first product
SHARE = 4  # a key-value cache or a copy of weights takes at most this fraction (1 / n) of the free bytes
# Bytes of the largest weights that a GPU merges an adapter into, keeping the originals: of some 2 billion parameters.
# Applied beside, an adapter costs 8 short launches a layer and token step, by estimate 3 us each: a third of the step
# of 135M, and of 8B 0.8 ms of some 8. The 14 GB of originals of 8B cost a merge 0.4 s on the card, as much as 500
# steps, and pinned on the host 8.3 s at the first time, 10,000 steps (measured: docs/results/gpu/h100-2026-11-27).
MERGED = 4e9
_SET, _GROWING = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
_SEGMENTS = ("PYTORCH_ALLOC_CONF", _SET, "PYTORCH_HIP_ALLOC_CONF")


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
        copied: by one layer, whatever the tokens: a shared prefix's keys and values, copied for every row behind it.
    """

    layers: int
    kept: float
    entry: float
    rest: float
    block: float
    copied: float = 0.0

    def _moments(self, level: int) -> list[tuple[float, float]]:
        """Bytes per token and whatever the tokens: at the end of the forward pass, in backward passes of layers."""

        def holding(layers: float, block: float = 0.0) -> tuple[float, float]:
            return layers * self.kept + level * self.entry + self.rest, layers * self.copied + block

        whole = self.layers - level
        found = [holding(whole, self.block), holding(whole + GRADIENTS + (1 if level == self.layers else 0))]
        # The layers after the first ``level`` have been freed when one of these keeps all once more.
        return [*found, holding(1 + GRADIENTS)] if level else found

    def copying(self, tokens: int, width: float) -> PassMemory:
        """The same where attention copies the keys and values of a shared prefix, and with them those of the rows.

        Args:
            tokens: of the prefix, over all rows of a pass; 0: nothing is copied.
            width: bytes of the keys and values of a token.
        """
        return replace(self, kept=self.kept + width, copied=tokens * width) if tokens else self

    def peak(self, tokens: float, level: int = 0) -> float:
        """Bytes of a pass over ``tokens`` tokens whose first ``level`` layers are recomputed."""
        return max(tokens * each + fixed for each, fixed in self._moments(level))

    def most_tokens(self, free: float, level: int = 0) -> int:
        """The largest pass with a peak of at most ``free`` bytes; 0 where none fits."""
        return max(0, int(min((free - fixed) / each for each, fixed in self._moments(level))))

    def choose(
        self,
        free: float,
        *,
        longest: int,
        largest: int,
        micro: int | None = None,
        level: int | None = None,
        graphs: bool = False,
    ) -> Fit:
        """The least recomputation with which passes of a useful size fit into ``free`` bytes.

        Args:
            longest: tokens of the longest row, which is never split.
            largest: tokens of the largest step.
            micro: most tokens of a pass, where that is given.
            level: layers to recompute, where that is given.
            graphs: passes become CUDA graphs where nothing is recomputed. Their memory is their own, next to that of
                the passes before they were captured, and holds a pass once more.
        """
        if graphs:
            choose = partial(self.choose, longest=longest, largest=largest, micro=micro, level=level)
            half, whole = choose(free / 2), choose(free)
            return whole if half.level and whole.level else half
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


def loss_block(
    device: str, vocabulary: int, *, width: int, fused: bool, soft: bool = False, capped: bool = False
) -> float:
    """Bytes of the largest block of logits of the loss, with what is computed from it.

    Args:
        device: name of its kind, ``cpu`` or ``cuda``.
        width: bytes of a number of the model's format.
        fused: a kernel turns logits into their gradient in place; else torch makes an fp32 copy, and another for
            their logsumexp.
        soft: rows are trained on distributions, which no kernel does; their logits are not kept beside the copy.
        capped: logits have a soft cap, whose slope torch keeps.
    """
    rows = max(LOSS_ROWS, GPU_LOGITS // vocabulary) if device == "cuda" else LOSS_ROWS
    plain = 8 + (0 if soft or width == 4 else width) + (4 if capped else 0)
    return float(rows) * vocabulary * (width if fused and not soft else plain)


def usable(free: float, device: str, adapter: float) -> float:
    """Of ``free`` bytes those a pass may take.

    Args:
        adapter: bytes that the adapter's weights, gradients, moments and copies are yet to take.
    """
    return max(0.0, (1 - FRAGMENTS) * free - adapter - (WORKSPACE if device == "cuda" else 0))


def merges(weights: float, free: float) -> bool:
    """Whether a GPU with ``free`` bytes merges an adapter into ``weights`` bytes, of which it then keeps the originals.

    Otherwise the adapter is applied beside them.
    """
    return weights <= min(MERGED, free / SHARE)


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
        environment[_SET] = _GROWING


@contextmanager
def fixed_segments(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Processes that begin in this context do without what ``grow_segments`` set."""
    ours = environment.get(_SET) == _GROWING
    if ours:
        del environment[_SET]
    try:
        yield
    finally:
        if ours:
            environment[_SET] = _GROWING
