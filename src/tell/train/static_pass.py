"""Shapes that passes are padded to, and passes in buffers that are refilled: what a captured graph computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tell.train.attention import Rule
from tell.train.fast.cuda import Copies, Layout, Sequences, Varlen, copies_of
from tell.train.packing import Pack, PackedRows, PackTargets

HEAD_COST = 1 / 3  # of the logits of a position, in that of a token: from 0.26 (SmolLM2-135M) to 0.35 (Qwen3-0.6B)
TOKENS, POSITIONS, ROWS = 256, 512, 16  # to multiples of which tokens, trained positions and sequences are rounded up
LEAST = 1024  # copies and longest sequences are rounded up to powers of two from here on: they cost next to nothing
ALIGNED = 16  # bytes

Find = Callable[[Tensor, Tensor], Varlen | None]


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _power(n: int) -> int:
    """The least power of two from ``LEAST`` on that is not below ``n``."""
    return max(LEAST, 1 << (n - 1).bit_length())


class Shape(NamedTuple):
    """Sizes of a pass.

    Attributes:
        tokens: T, the dead row's included.
        copies: keys beyond one for each token; 0 where no prefix is shared.
        sequences: with the prefix and the dead row.
        positions: trained, and one that is dead.
        soft, hard: positions trained on distributions, and, where there are some, the others.
        choices: tokens of a distribution.
        longest_q, longest_k: queries and keys of the longest sequence.
    """

    tokens: int
    copies: int
    sequences: int
    positions: int
    soft: int
    hard: int
    choices: int
    longest_q: int
    longest_k: int

    @classmethod
    def of(cls, host: PackedRows, layout: Layout) -> Shape:
        """The least that holds these rows."""
        sequences, soft = layout.sequences, host.soft
        return cls(
            len(host.ids),
            0 if layout.copies is None else len(layout.copies.token) - len(host.ids),
            len(sequences.ends_q),
            len(host.targets) + 1,
            0 if soft is None else len(soft.at),
            0 if soft is None else len(soft.hard),
            0 if soft is None else soft.ids.shape[1],
            sequences.longest_q,
            sequences.longest_k,
        )

    @property
    def cost(self) -> float:
        """In tokens."""
        return self.tokens + HEAD_COST * (self.soft + self.hard if self.soft else self.positions)

    def rounded(self) -> Shape:
        """A shape that holds this one and others like it."""
        soft, hard = (_up(max(n, 1), POSITIONS) if self.soft else 0 for n in (self.soft, self.hard))
        return Shape(
            tokens=_up(self.tokens, TOKENS),
            copies=_power(self.copies) if self.copies else 0,
            sequences=_up(self.sequences, ROWS),
            positions=_power(self.positions) if self.soft else _up(self.positions, POSITIONS),
            soft=soft,
            hard=hard,
            choices=self.choices,
            longest_q=_power(self.longest_q),
            longest_k=_power(self.longest_k),
        )

    def holds(self, other: Shape) -> bool:
        """Whether a pass of shape ``other`` can be padded to this one."""
        dead = self.tokens - other.tokens
        same = (self.choices, self.copies > 0) == (other.choices, other.copies > 0)
        return same and all(a >= b for a, b in zip(self, other, strict=True)) and dead <= self.longest_q


def padded(host: PackedRows, layout: Layout, weights: Tensor, shape: Shape) -> dict[str, Tensor]:
    """The tensors of a pass on the CPU, padded to ``shape``, by name.

    Args:
        weights: (n,) fp32, of each trained position.
    """
    tokens, dead = len(host.ids), shape.tokens - len(host.ids)
    slot, row = shape.positions - 1, shape.sequences - 1  # of dead positions
    out = {
        "ids": _filled(host.ids, shape.tokens),
        "positions": torch.cat([layout.positions, torch.arange(dead)]),
        "ends_q": _filled(layout.sequences.ends_q, shape.sequences + 1, shape.tokens),
        "predictors": _filled(host.predictors, shape.positions),
        "targets": _filled(host.targets, shape.positions),
        "row": _filled(host.row, shape.positions, row),
        "trained": _filled(host.trained, shape.sequences, 1),
        "weights": _filled(weights, shape.positions),
    }
    if layout.copies is not None:
        token = np.concatenate([layout.copies.token.numpy(), np.arange(tokens, shape.tokens)])
        copies = copies_of(token, shape.tokens)
        keys = shape.tokens + shape.copies
        rest = torch.arange(len(token), len(token) + shape.copies).clamp_max(keys)
        out["ends_k"] = _filled(layout.sequences.ends_k, shape.sequences + 1, len(token))
        # Keys at the end belong to no sequence: nobody reads them, nor their gradients, which are never written.
        out |= {"token": _filled(copies.token, keys), "keys": _filled(copies.keys, keys)}
        out["starts"] = torch.cat([copies.starts, rest])
    if host.soft is not None:
        out["soft_at"] = _filled(host.soft.at, shape.soft, slot)
        out["hard"] = _filled(host.soft.hard, shape.hard, slot)
        out["soft_ids"] = torch.arange(shape.choices).repeat(shape.soft, 1)
        out["soft_probs"] = torch.full((shape.soft, shape.choices + 1), 1 / (shape.choices + 1))
        for name, x in (("soft_ids", host.soft.ids), ("soft_probs", host.soft.probs)):
            out[name][: len(x)] = x
    return out


def _filled(x: Tensor, size: int, value: float = 0) -> Tensor:
    out = torch.full((size,), value, dtype=x.dtype)
    out[: len(x)] = x
    return out


class Buffers:
    """Tensors by name that are views of one buffer on a device, so that one copy fills them all.

    Args:
        like: their number formats and shapes.
    """

    def __init__(self, like: dict[str, Tensor], device: torch.device) -> None:
        ends = np.cumsum([0, *(_up(x.nbytes, ALIGNED) for x in like.values())])
        starts = zip(like.items(), ends.tolist(), strict=False)
        self.spans = {name: slice(at, at + x.nbytes) for (name, x), at in starts}
        self.like = {name: (x.dtype, x.shape) for name, x in like.items()}
        self.bytes = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=device)
        self.tensors = self._views(self.bytes)

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {name: buffer[self.spans[name]].view(dtype).view(shape) for name, (dtype, shape) in self.like.items()}

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copies ``tensors`` of the CPU, asynchronously to a GPU."""
        pinned = self.bytes.device.type == "cuda"
        host = torch.empty(len(self.bytes), dtype=torch.uint8, pin_memory=pinned)
        for name, view in self._views(host).items():
            view.copy_(tensors[name])
        self.bytes.copy_(host, non_blocking=pinned)


class NoFlash(RuntimeError):
    """Flash attention does not compute a layer; raised in the forward pass."""


class StaticPlan:
    """A plan whose index tensors are refilled for each pass; it needs flash attention.

    Args:
        layout: views of buffers.
        find: as of ``VarlenPlan``.
    """

    def __init__(self, layout: Layout, find: Find) -> None:
        self.layout, self.find = layout, find

    def positions(self) -> Tensor:
        return self.layout.positions[None]

    def attend(self, layer: nn.Module | None, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        varlen = self.find(query, value) if rule.softcap is None else None
        if varlen is None:
            raise NoFlash(f"flash attention does not compute {type(layer).__name__}")
        return self.layout.attend(varlen, query, key, value, rule)


def static_pack(tensors: dict[str, Tensor], shape: Shape, find: Find) -> Pack:
    """The pass whose tensors are those of ``padded`` in buffers."""
    ends_q = tensors["ends_q"]
    sequences = Sequences(ends_q, tensors.get("ends_k", ends_q), shape.longest_q, shape.longest_k)
    copies = Copies(tensors["token"], tensors["keys"], tensors["starts"]) if shape.copies else None
    soft = None
    if shape.soft:
        soft = PackTargets(*(tensors[name] for name in ("soft_at", "hard", "soft_ids", "soft_probs")))
    return Pack(
        plan=StaticPlan(Layout(tensors["positions"], sequences, copies), find),
        ids=tensors["ids"],
        predictors=tensors["predictors"],
        targets=tensors["targets"],
        row=tensors["row"],
        trained=tensors["trained"],
        source=torch.zeros(0),
        real=0,
        soft=soft,
    )
