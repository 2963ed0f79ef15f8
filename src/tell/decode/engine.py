"""TELL's decoding engine: packed prefill, the shared prefix once, finished rows replaced at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from tell.decode.batch import Batch, KernelBatch, Packed, PlainBatch
from tell.decode.decode_loop import Loop
from tell.decode.engine_rows import Answer, Arrivals, Request, Row, waiting_rows
from tell.decode.layers import describe, kernels_take
from tell.decode.room import answer_limits, rows_that_fit, token_bytes
from tell.decode.sampler import Decoding, uniforms
from tell.decode.static_batch import StaticBatch, rounded_length
from tell.decode.static_model import StaticModel
from tell.decode.step_graphs import Recorder, recorder
from tell.errors import first_line
from tell.kernels.decode_ops import kernels
from tell.train.device import free_bytes
from tell.train.lora import adapter_applied
from tell.train.step import Body
from tell.train.torch_types import AnyModule
from tell.train.unmerged import beside_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tell.decode.grammar import Mask
    from tell.decode.guide import Guide

ROOM = 1024  # tokens of a row, prompt and answer, that may join a running batch even if its first rows are shorter
TOLERANCE = {
    torch.bfloat16: 0.05,
    torch.float16: 0.02,
    torch.float32: 1e-3,
}  # relative distance of states that rounding explains


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving at least one to each; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    low, high = min(map(list, prompts)), max(map(list, prompts))  # a prefix of both extremes is a prefix of all
    length = 0
    shortest = min(len(p) for p in prompts) - 1
    while length < shortest and low[length] == high[length]:
        length += 1
    return length


class Engine:
    """Decodes with a causal model whose adapter, if any, is applied.

    Args:
        model: a transformers causal model.
        device: of the model.
        max_positions: longest sequence of the model, in tokens.
        fast: use the kernels (CPU) or a static cache and CUDA graphs (GPU) where model and machine allow; False uses
            transformers' layers only.
    """

    name = "own"  # in ``generate.engine``
    fallback = ""  # why it decodes where another engine was wanted

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: str | torch.device = "cpu",
        max_positions: int | None = None,
        fast: bool = True,
    ) -> None:
        self.model, self.device = model, torch.device(device)
        self.body = Body(model)
        self.config = config = model.config.get_text_config()
        self.static = self.device.type == "cuda"  # decode over a static cache rather than by the CPU's kernels
        self.fast = fast and (self.static or self.device.type == "cpu")
        self.recorder: Callable[[torch.device], Recorder] = recorder
        # Why the faster way is not trusted with an adapter of this shape beside; "": it computes the same as the model.
        # What is checked is the program, which depends on the layers and ranks of an adapter beside the weights, not on
        # its numbers: other factors of that shape run the same one, and merged ones that of the base model.
        self._faults: dict[tuple[tuple[str, int], ...], str] = {}
        self.how = ""  # in words, how the last answers were decoded with what `adapter` applies, and why no faster
        self._why = ""  # transformers' layers decode
        self._said: set[str] = set()
        self._token_bytes: int | None = None
        self._fixed = False
        self._packed: Packed | StaticModel | None = None
        self._kept: tuple[object, StaticBatch] | None = None  # the last batch, while weights are fixed
        self.max_positions = max_positions or getattr(config, "max_position_embeddings", None) or 1 << 30

    @contextmanager
    def adapter(self, folder: Path | None) -> Iterator[None]:
        """Decodes inside with an adapter, merged into the model's weights or applied beside them."""
        with adapter_applied(self.model, folder):
            self.how = ""
            yield

    @property
    def trusted(self) -> bool | None:
        """Whether the faster way computes the same as the model with what is applied now; None: not checked yet."""
        fault = self._faults.get(beside_shape(self.model))
        return None if fault is None else not fault

    @torch.inference_mode()
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
        """Answer each prompt.

        Args:
            prompts: token ids, at least one each.
            decoding: sampler, limits, batch size and seed.
            limits: most new tokens of each prompt; None: ``decoding.max_new_tokens`` for all.
            progress: called after each step with (new tokens, progress in rows): an unfinished row counts by the share
                of its limit that is written.
            on_token: called with (prompt number, token) as tokens come; if it returns True, that token is the
                answer's last.
            guides: of each prompt; it decides closed fields of the answer.
            masks: of each prompt; the answer has only tokens that its mask allows, also where a guide decides. Tokens
                that must follow are fed in one pass with the one before. No row then has a repetition penalty: JSON
                repeats quotes, commas and keys. A mask that has ``failed`` ends its answer as the limit does.

        Returns:
            An Answer for each prompt, in order. A prompt's random numbers depend neither on batch size nor on order.

        Raises:
            TellError: a prompt fills the model's context.
            ValueError: ``limits`` are not one positive number a prompt.
        """
        limits = answer_limits(prompts, decoding.max_new_tokens, limits, self.max_positions)
        if not prompts:
            return []
        if any(mask is not None for mask in masks or ()):
            decoding = replace(decoding, repetition_penalty=1.0)
        nothing = [None] * len(prompts)
        steering = zip(prompts, limits, guides or nothing, masks or nothing, strict=True)
        rows = [
            Row(list(prompt), limit, uniforms(decoding.seed, number, limit), Answer(), guide, mask)
            for number, (prompt, limit, guide, mask) in enumerate(steering)
        ]
        if on_token is not None:
            for number, row in enumerate(rows):
                row.on_token = partial(on_token, number)
        prefix = list(prompts[0])[: shared_prefix(prompts)]
        self._run(rows, decoding, prefix, progress=progress)
        return [row.answer for row in rows]

    @torch.inference_mode()
    def serve(
        self, first: Sequence[Request], decoding: Decoding, arrivals: Arrivals, *, prefix: Sequence[int] = ()
    ) -> None:
        """Answer requests, and others that arrive meanwhile; returns when all are answered.

        Args:
            first: at least one.
            decoding: sampler and batch size; limits and seeds are those of the requests.
            arrivals: called before each step that has room for more.
            prefix: token ids that the prompts probably begin with; computed once if those of ``first`` do.
        """
        shared = list(prefix)
        if any(len(r.prompt) <= len(shared) or list(r.prompt[: len(shared)]) != shared for r in first):
            shared = []
        self._run([Row.of(request) for request in first], decoding, shared, arrivals=arrivals)

    def _run(
        self,
        rows: list[Row],
        decoding: Decoding,
        prefix: list[int],
        *,
        progress: Callable[[int, float], None] | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        was_training = self.model.training
        self.model.eval()
        try:
            self._decode(rows, decoding, prefix, progress, arrivals)
        finally:
            self.model.train(was_training)

    def _decode(
        self,
        rows: list[Row],
        decoding: Decoding,
        prefix: list[int],
        progress: Callable[[int, float], None] | None,
        arrivals: Arrivals | None,
    ) -> None:
        waiting = waiting_rows(rows, prefix)
        capacity = max(len(r.prompt) + r.limit for r in rows)
        wanted = min(decoding.batch_size, len(rows))
        if arrivals is not None:  # which may be longer and more than the first
            wanted, capacity = decoding.batch_size, max(capacity, min(ROOM, self.max_positions - len(prefix)))
        if self._token_bytes is None:
            self._token_bytes = token_bytes(self.body.core, self.device)
        free = free_bytes(self.device)
        if self._kept is not None:  # its cache is used again, or freed
            free += self._kept[1].cache.nbytes
        if self.static and self._fixed:
            capacity = rounded_length(capacity)  # so that the next call may find the same
        slots = rows_that_fit(wanted, capacity, self._token_bytes, free)
        batch = self._batch(decoding, slots, capacity, prefix)
        Loop(batch, decoding, prefix, slots, capacity, waiting, len(rows) - len(waiting), progress, arrivals).run()
        self.how = self._words(batch)

    def _words(self, batch: Batch) -> str:
        if isinstance(batch, StaticBatch):
            graphs = "CUDA graphs" if batch.recorded else ""
            if failed := batch.recorder.failed:
                graphs = f"CUDA graphs failed ({failed})"
            return ", ".join(filter(None, ("static cache", graphs)))
        if isinstance(batch, KernelBatch):
            return "kernels"
        return f"transformers' layers ({self._why})" if self._why else "transformers' layers"

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Promises that no weight changes inside, so that copies of weights are made once and kept for all calls."""
        self._fixed = True
        try:
            yield
        finally:
            self._fixed, self._packed, self._kept = False, None, None

    def _batch(self, decoding: Decoding, slots: int, capacity: int, prefix: list[int]) -> Batch:
        shape = beside_shape(self.model)
        self._why = self._faults.get(shape, "")
        packed = self._packed or self._pack() if self.fast and not self._why else None
        if packed is not None:
            if shape not in self._faults:
                self._faults[shape] = self._fault(packed, decoding)
            if not self._faults[shape]:
                # Otherwise copied for each call: weights may have changed, and the copy takes their memory again.
                self._packed = packed if self._fixed else None
                return self._fast_batch(packed, decoding, slots, capacity, prefix)
        return PlainBatch(self.body, decoding, slots, capacity, prefix, self.device)

    def _fast_batch(
        self, packed: Packed | StaticModel, decoding: Decoding, slots: int, capacity: int, prefix: Sequence[int]
    ) -> Batch:
        if isinstance(packed, StaticModel):
            # Recorded steps and the prefix serve again where nothing that they contain has changed.
            rule = replace(decoding, seed=0, max_new_tokens=0, stop_ids=(), batch_size=0)
            key = rule, slots, capacity, tuple(prefix)
            if self._kept is None or self._kept[0] != key:
                self._kept = None  # first, for its memory
                self._kept = key, StaticBatch(packed, decoding, slots, capacity, prefix, self.recorder(self.device))
            batch = self._kept[1]
            if not self._fixed:
                self._kept = None
            return batch
        return KernelBatch(packed, decoding, slots, capacity, prefix)

    def _pack(self) -> Packed | StaticModel | None:
        """The weights as the faster implementation of this device reads them; None where it does not support them."""
        description = describe(cast(AnyModule, self.body.core))
        if description is None:
            self._say(
                "the model is of a family, or has layers (other forwards, weights on other devices), that it lacks"
            )
            return None
        if self.static:
            return StaticModel(description, self.body)
        present = kernels(description.dtype) is not None
        if not present or not kernels_take(description):
            odd = " with an adapter beside its weights" if description.adapted else ""
            odd = " with quantised weights" if description.quantised else odd
            self._say(f"this machine has no kernels for the model{odd if present else ''}")
            return None
        return Packed(description, self.body)

    def _say(self, why: str) -> None:
        """Keep why transformers' layers decode; on a GPU also warn, once for each reason, that this is slow."""
        self._why = why
        if self.static and why not in self._said:
            self._said.add(why)
            warnings.warn(f"answers are decoded by transformers' layers, which is slower: {why}", stacklevel=2)

    def _fault(self, packed: Packed | StaticModel, decoding: Decoding) -> str:
        """What `_check` finds wrong, which is said, also where a function of this torch or GPU is missing; or ""."""
        try:
            fault = "" if self._check(packed, decoding) else "the faster implementation differs on this model"
        except RuntimeError as error:
            if not self.static:
                raise
            fault = f"the faster implementation fails ({first_line(error)})"
        if fault:
            self._say(fault)
        return fault

    def _check(self, packed: Packed | StaticModel, decoding: Decoding) -> bool:
        """Whether both implementations give the same states, within rounding, for some rows of this model."""
        size = len(self.body.head)
        head, *rows = [[i % size for i in ids] for ids in (range(1, 20), range(3, 40), [5], range(9, 15))]
        ours = self._fast_batch(packed, decoding, 3, 48, head)
        theirs: Batch = PlainBatch(self.body, decoding, 3, 48, head, self.device)
        states = []
        for batch in (ours, theirs):
            found = [batch.prefill(rows, 0)]
            for further in range(3 if self.static else 1):  # a step as it is, its record, and the record again
                found.append(batch.decode([len(row) + further for row in rows], [0, 1, 2]))
            states.append(torch.cat(found).float())
        error = float((states[0] - states[1]).norm() / states[1].norm())
        return error <= TOLERANCE[packed.description.dtype]
