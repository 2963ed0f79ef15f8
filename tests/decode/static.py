"""A static batch without a GPU: a tape that repeats a step's operations on the tensors they had, as a graph does."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tell.decode.engine import Engine


def storages(values) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


class Operations(TorchDispatchMode):
    """Keeps each operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made.append((func, args, kwargs or {}, out))
        return out

    def launches(self) -> int:
        """Operations that a GPU would run: those that make or change numbers."""
        return sum(
            func._schema.is_mutable or not storages((args, kwargs)) & storages(out)
            for func, args, kwargs, out in self.made
            if func.overloadpacket.__name__ not in ("empty", "new_empty")
        )


class Tape:
    """A recorder: runs steps as they are, and repeats the operations of recorded ones.

    As with a CUDA graph, recording computes nothing (what it changed is restored), and whatever the host computed then
    (shapes, numbers) is the same at every repetition.
    """

    failed = ""

    def __init__(self) -> None:
        self.runs, self.records, self.repeats = 0, 0, 0

    def run(self, call) -> None:
        self.runs += 1
        call()

    def record(self, call):
        self.records += 1
        batch = call.func.__self__
        buffers = batch.state, batch.seen, batch.cache, batch.states
        kept = [x.clone() for x in buffers]
        with Operations() as operations:
            call()
        for x, before in zip(buffers, kept, strict=True):
            x.copy_(before)
        return lambda: self._repeat(operations.made)

    def _repeat(self, made) -> None:
        self.repeats += 1
        for func, args, kwargs, out in made:
            again = func(*args, **kwargs)
            if not storages(out) & storages((args, kwargs)):
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    old.copy_(new)


def static_engine(model, **options) -> tuple[Engine, Tape]:
    """An engine that decodes on the CPU as it does on a GPU."""
    engine, tape = Engine(model, **options), Tape()
    engine.static, engine.recorder = True, lambda _: tape
    return engine, tape
