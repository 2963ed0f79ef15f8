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
from tell.pass_memory import GRAPHED
from tell.train.capture import CudaCapturer
from tell.train.fast.base_weight import parameter_count
from tell.train.fast.cuda import Layout, find_varlen, flash_refusal
from tell.train.packing import Pack, TrainRow, pack_rows
from tell.train.static_pass import Buffers, Find, NoFlash, Shape, padded, static_pack
from tell.train.step import Body, Pass, causal_of, pass_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

    from tell.train.recompute import Recompute

MOST_GRAPHS = 12  # alive; the least recently used is dropped
RECOMPUTED = "layers are recomputed on the way back"  # which saves random states: not while captured
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
        layers: of the model; no graphs from where some are recomputed.
        passes, replayed, captured: counts so far.
    """

    parameters: list[nn.Parameter]
    capturer: Capturer
    note: Callable[[str], None] = lambda text: None
    find: Find = find_varlen
    layers: Recompute | None = None
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
        if self.layers is not None and self.layers.level and not self._failed:
            self._stop(RECOMPUTED)
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
        elif not self._warm(entry, compute):
            return None
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

    def _warm(self, entry: _Entry, compute: Callable[[], None]) -> bool:
        """Compute a pass in the buffers; where memory ends, the graphs give theirs back first of all."""
        try:
            self.capturer.warm(compute)
        except torch.OutOfMemoryError:
            self._stop("memory ended")
            raise
        except NoFlash as error:  # in the forward pass: no gradient was added
            self._stop(str(error))
            return False
        entry.used = True
        return True

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
    model: PeftModel,
    parameters: Iterable[nn.Parameter],
    *,
    layers: Recompute,
    refusal: str | None,
    note: Callable[[str], None],
) -> PassGraphs | None:
    """The graphs of a model's training; None where they cannot be had or would not pay.

    Args:
        layers: as of ``PassGraphs``.
        refusal: why this run has none, apart from its model.
        note: as of ``PassGraphs``; also receives why a small model on a GPU trains without graphs.
    """
    causal = causal_of(model)
    device = causal.get_output_embeddings().weight.device
    if device.type != "cuda" or parameter_count(causal) > GRAPHED:
        return None
    why = refusal or (RECOMPUTED if layers.level else flash_refusal(causal))
    if why is not None:
        note(f"CUDA graphs: none ({why})")
        return None
    return PassGraphs(list(parameters), CudaCapturer(device), note, layers=layers)
