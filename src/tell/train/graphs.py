"""Passes of small models replayed as CUDA graphs.

A pass of a small model launches thousands of kernels, each shorter than its launch. A CUDA graph launches them all at
once, but computes with the same shapes and addresses each time. So packed rows are padded to a shape that many steps
share, and copied into buffers that stay: a dead row follows the others, dead positions have weight 0, sequences at the
end are empty. The first pass of a shape is computed as usual, but in the buffers; the second is captured.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tell.errors import first_line
from tell.train.attention import Rule
from tell.train.fast.cuda import Copies, Layout, Sequences, Varlen, copies_of, find_varlen, flash_refusal
from tell.train.packing import Pack, PackedRows, PackTargets, TrainRow, pack_rows
from tell.train.step import Body, Pass, causal_of, pass_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

MOST_GRAPHS = 12  # alive; the least recently used is dropped
MOST_PARAMETERS = 2_000_000_000  # of a larger model the kernels take longer than their launches
SLACK = 1.25  # a pass may be padded to this many times its cost rather than captured once more,
FULL_SLACK = 1.5  # and to this many rather than that another graph is dropped
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
            raise RuntimeError("flash attention does not compute this layer")
        return self.layout.attend(varlen, query, key, value, rule)


class Capturer(Protocol):
    """Captures work on a device."""

    def warm(self, work: Callable[[], None]) -> None:
        """Do ``work`` where it will be captured."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work`` without doing it; returns what does it."""
        ...


class CudaCapturer:
    """CUDA graphs on one side stream and in one memory pool: they run one after the other.

    What a graph computes is overwritten by the next one; results must leave the pool before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        current, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                work()
        except Exception:
            torch.cuda.set_stream(current)  # which a capture that fails at its end does not restore
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())  # and the copy is not marked as being captured
            raise
        return graph.replay


@dataclass(slots=True)
class _Entry:
    """One shape: its buffers and, once captured, its graph."""

    buffers: Buffers
    pack: Pack
    out: Tensor  # (1 + sequences,) fp32: the loss, and the mean of each row
    used: bool = False
    replay: Callable[[], None] | None = None


@dataclass(slots=True)
class PassGraphs:
    """Computes passes with their gradients, by CUDA graphs from the second of a shape on.

    Attributes:
        parameters: that get gradients.
        capturer: of the device.
        note: receives a sentence where capturing fails; passes are computed without graphs from then on.
        find: as of ``VarlenPlan``.
        passes, replayed, captured: counts so far.
    """

    parameters: list[nn.Parameter]
    capturer: Capturer
    note: Callable[[str], None] = lambda text: None
    find: Find = find_varlen
    passes: int = 0
    replayed: int = 0
    captured: int = 0
    _failed: bool = False
    _entries: OrderedDict[Shape, _Entry] = field(default_factory=OrderedDict)
    _grads: list[Tensor] = field(default_factory=list)

    def run(
        self, body: Body, rows: Sequence[TrainRow], weights: Tensor, *, share_prefix: bool, scale: Tensor | None = None
    ) -> Pass | None:
        """The pass over ``rows``, its gradients accumulated; None where it must be computed without graphs.

        Args:
            body: the model's parts, the same in each call; its parameters keep their addresses.
            weights: (n,) fp32 of each trained position, on the CPU.
            scale: scalar on the device that they are multiplied by.
        """
        if self._failed:
            return None
        host = pack_rows(rows, share_prefix=share_prefix, device=body.device)
        layout = Layout.of(host.lengths, host.prefix, host.ahead)
        shape = self._shape(Shape.of(host, layout))
        tensors = padded(host, layout, weights, shape)
        entry = self._entry(shape, tensors, body.device)
        entry.buffers.fill(tensors)
        if scale is not None:
            entry.buffers.tensors["weights"].mul_(scale)
        self._keep_gradients()

        def compute() -> None:
            loss, means = pass_loss(body, entry.pack, entry.buffers.tensors["weights"])
            loss.backward()
            entry.out.copy_(torch.cat([loss.detach().float().reshape(1), means]))

        if entry.used and entry.replay is None and not self._capture(entry, compute):
            return None
        if entry.replay is not None:
            entry.replay()
            self.replayed += 1
        else:
            self._warm(entry, compute)
        self.passes += 1
        out = entry.out.clone()  # the next pass may be of the same shape
        return Pass(out[0], out[1 : 1 + len(rows)], host.source.numpy(), host.real, finished=True)

    def summary(self) -> str:
        """A sentence on what was replayed."""
        share = self.replayed / self.passes if self.passes else 0.0
        return f"CUDA graphs: {self.captured} captured, {share:.0%} of {self.passes} passes replayed"

    def _shape(self, need: Shape) -> Shape:
        """A known shape that costs little more than needed, else a new one."""
        most = need.cost * (SLACK if len(self._entries) < MOST_GRAPHS else FULL_SLACK)
        fitting = [shape for shape in self._entries if shape.holds(need) and shape.cost <= most]
        return min(fitting, key=lambda shape: shape.cost, default=need.rounded())

    def _entry(self, shape: Shape, tensors: dict[str, Tensor], device: torch.device) -> _Entry:
        if shape not in self._entries:
            while len(self._entries) >= MOST_GRAPHS:
                self._entries.popitem(last=False)
            buffers = Buffers(tensors, device)
            out = torch.zeros(1 + shape.sequences, device=device)
            self._entries[shape] = _Entry(buffers, static_pack(buffers.tensors, shape, self.find), out)
        self._entries.move_to_end(shape)
        return self._entries[shape]

    def _keep_gradients(self) -> None:
        """Gradients accumulate where the graphs add to them, whatever was set between two steps."""
        if not self._grads:
            self._grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        pairs = list(zip(self.parameters, self._grads, strict=True))
        if dropped := [grad for p, grad in pairs if p.grad is None]:
            torch._foreach_zero_(dropped)
        for p, grad in pairs:
            if p.grad is not None and p.grad is not grad:
                grad.copy_(p.grad)
            p.grad = grad

    def _warm(self, entry: _Entry, compute: Callable[[], None]) -> None:
        """Compute a pass in the buffers; where memory ends, the graphs give theirs back first of all."""
        try:
            self.capturer.warm(compute)
        except torch.OutOfMemoryError:
            self._stop("memory ended")
            raise
        entry.used = True

    def _stop(self, why: str) -> None:
        self._failed = True
        self._entries.clear()
        self.note(f"CUDA graphs: none from here on ({why})")

    def _capture(self, entry: _Entry, compute: Callable[[], None]) -> bool:
        try:
            entry.replay = self.capturer.capture(compute)
        except Exception as error:  # a graph only saves time
            cause = error.__context__ or error  # the end of a capture that failed raises again
            self._stop(f"capturing failed, {type(cause).__name__}: {first_line(cause)}")
            return False
        self.captured += 1
        return True


def static_pack(tensors: dict[str, Tensor], shape: Shape, find: Find) -> Pack:
    """The pass whose tensors are those of ``padded`` in buffers."""
    ends_q = tensors["ends_q"]
    sequences = Sequences(ends_q, tensors.get("ends_k", ends_q), shape.longest_q, shape.longest_k)
    copies = Copies(tensors["token"], tensors["keys"], tensors["starts"]) if shape.copies else None
    soft = None
    if shape.soft:
        soft = PackTargets(*(tensors[name] for name in ("soft_at", "hard", "soft_ids", "soft_probs")))
    return Pack(
        StaticPlan(Layout(tensors["positions"], sequences, copies), find),
        ids=tensors["ids"],
        predictors=tensors["predictors"],
        targets=tensors["targets"],
        row=tensors["row"],
        trained=tensors["trained"],
        source=torch.zeros(0),
        real=0,
        soft=soft,
    )


def graphs_for(
    model: PeftModel, parameters: Iterable[nn.Parameter], *, noise: bool, note: Callable[[str], None]
) -> PassGraphs | None:
    """The graphs of a model's training; None where they cannot be had or would not pay.

    Args:
        noise: something else than the model's own forward reads the plan (NEFTune).
        note: as of ``PassGraphs``; also receives why a small model on a GPU trains without graphs.
    """
    causal = causal_of(model)
    device = causal.get_output_embeddings().weight.device
    if device.type != "cuda" or causal.num_parameters() > MOST_PARAMETERS:
        return None
    why = "NEFTune draws noise by each row's length" if noise else flash_refusal(causal)
    if why is not None:
        note(f"CUDA graphs: none ({why})")
        return None
    return PassGraphs(list(parameters), CudaCapturer(device), note)
