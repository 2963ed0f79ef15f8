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
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from tell.errors import first_line
from tell.train.fast.cuda import Layout, find_varlen, flash_refusal
from tell.train.packing import Pack, TrainRow, pack_rows
from tell.train.static_pass import Buffers, Find, Shape, padded, static_pack
from tell.train.step import Body, Pass, causal_of, pass_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

MOST_GRAPHS = 12  # alive; the least recently used is dropped
MOST_PARAMETERS = 2_000_000_000  # of a larger model the kernels take longer than their launches
SLACK = 1.25  # a pass may be padded to this many times its cost rather than captured once more,
FULL_SLACK = 1.5  # and to this many rather than that another graph is dropped


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
