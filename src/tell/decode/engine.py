"""TELL's decoding engine: packed prefill, the shared prefix once, finished rows replaced at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from tell.decode.batch import Batch, KernelBatch, Packed, PlainBatch, only
from tell.decode.engine_rows import Answer, Arrivals, Request, Row, longest_last, waiting_rows
from tell.decode.layers import describe
from tell.decode.room import answer_limits, rows_that_fit, token_bytes
from tell.decode.sampler import Decoding, uniforms
from tell.kernels.decode_ops import kernels
from tell.train.device import free_bytes, send
from tell.train.lora import adapter_merged
from tell.train.step import Body
from tell.train.torch_types import AnyModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tell.decode.grammar import Mask
    from tell.decode.guide import Guide

PREFILL_TOKENS = 4096  # most tokens of one prefill pass
ROOM = 1024  # tokens of a row, prompt and answer, that may join a running batch even if its first rows are shorter
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}  # relative distance of states that rounding explains


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
    """Decodes with a causal model whose adapter, if any, is merged.

    Args:
        model: a transformers causal model.
        device: of the model.
        max_positions: longest sequence of the model, in tokens.
        fast: use the kernels where model and machine allow; False uses torch operations only.
    """

    name = "own"  # in ``generate.engine``

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
        self.fast = fast and self.device.type == "cpu"
        self.trusted: bool | None = None  # whether the kernels compute the same as the model; None: not checked yet
        self._token_bytes: int | None = None
        self._fixed = False
        self._packed: Packed | None = None
        self.max_positions = max_positions or getattr(config, "max_position_embeddings", None) or 1 << 30

    @contextmanager
    def adapter(self, folder: Path | None) -> Iterator[None]:
        """Decodes inside with an adapter merged into the model's weights."""
        with adapter_merged(self.model, folder):
            yield

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
        slots = rows_that_fit(wanted, capacity, self._token_bytes, free_bytes(self.device))
        batch = self._batch(decoding, slots, capacity, prefix)

        def fits(request: Request) -> bool:
            own = len(request.prompt) - len(prefix)
            return 0 < own <= capacity - request.limit and list(request.prompt[: len(prefix)]) == prefix

        active: list[Row] = []
        ended, before = len(rows) - len(waiting), 0.0
        while waiting or active:
            if arrivals is not None and (room := slots - len(active) - len(waiting)) > 0:
                joined = waiting_rows([Row.of(request) for request in arrivals(room, fits)], prefix)
                waiting = longest_last([*waiting[::-1], *joined[::-1]]) if joined else waiting
            free = slots - len(active)
            if waiting and (not active or free >= max(1, slots // 4)):
                fresh: list[Row] = []
                used = 0
                while waiting and len(fresh) < free and (not fresh or used + len(waiting[-1].whole) <= PREFILL_TOKENS):
                    row = waiting.pop()
                    used += len(row.whole)
                    fresh.append(row)
                begin = len(active)
                states = batch.prefill([row.whole for row in fresh], begin)
                batch.see(begin, [prefix + row.prompt for row in fresh])
                active += fresh
            else:
                begin, new = 0, [row.fresh for row in active]
                lengths = [row.cached for row in active]
                several = any(len(tokens) > 1 for tokens in new)
                states = batch.extend(lengths, new) if several else batch.decode(lengths, [t for (t,) in new])
            known = sum(len(row.answer.ids) for row in active)
            for row in active[begin:]:
                row.cached = len(row.whole)
            tokens = _next_tokens(batch, states, begin, active[begin:], decoding)
            finished = self._record(active, tokens, begin, decoding)
            # A token a row, be it the end; with masks those that follow it too.
            written = max(len(tokens), sum(len(row.answer.ids) for row in active) - known)
            self._retire(active, finished, batch)
            ended += len(finished)
            if progress:
                now = ended + sum(len(row.answer.ids) / row.limit for row in active)
                progress(written, now - before)
                before = now

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Promises that no weight changes inside, so that the kernels' copy is made once and kept for all calls."""
        self._fixed = True
        try:
            yield
        finally:
            self._fixed, self._packed = False, None

    def _batch(self, decoding: Decoding, slots: int, capacity: int, prefix: list[int]) -> Batch:
        packed = self._packed or self._pack() if self.fast and self.trusted is not False else None
        if packed is not None:
            if self.trusted is None:
                self.trusted = self._check(packed, decoding)
            if self.trusted:
                # Otherwise copied for each call: weights may have changed, and the copy takes their memory again.
                self._packed = packed if self._fixed else None
                return KernelBatch(packed, decoding, slots, capacity, prefix)
        return PlainBatch(self.body, decoding, slots, capacity, prefix, self.device)

    def _pack(self) -> Packed | None:
        """The weights in the kernels' layout; None where the kernels do not support this model."""
        description = describe(cast(AnyModule, self.body.core))
        if description is None or kernels(description.dtype) is None:
            return None
        return Packed(description, self.body)

    def _check(self, packed: Packed, decoding: Decoding) -> bool:
        """Whether both implementations give the same states, within rounding, for some rows of this model."""
        size = len(self.body.head)
        head, *rows = [[i % size for i in ids] for ids in (range(1, 20), range(3, 40), [5], range(9, 15))]
        ours: Batch = KernelBatch(packed, decoding, 3, 48, head)
        theirs: Batch = PlainBatch(self.body, decoding, 3, 48, head, self.device)
        states = []
        for batch in (ours, theirs):
            first = batch.prefill(rows, 0)
            states.append(torch.cat([first, batch.decode([len(row) for row in rows], [0, 1, 2])]).float())
        error = float((states[0] - states[1]).norm() / states[1].norm())
        return error <= TOLERANCE[packed.description.dtype]

    @staticmethod
    def _record(active: list[Row], tokens: list[int], begin: int, decoding: Decoding) -> list[int]:
        """Append the tokens just drawn for the rows from ``begin`` on; returns the positions of finished rows."""
        finished = []
        for at, token in enumerate(tokens, begin):
            row = active[at]
            if row.mask is not None and row.mask.failed:
                finished.append(at)
            elif token in decoding.stop_ids:
                row.answer.finish = "stop"
                finished.append(at)
            elif row.append([token, *(row.mask.take(token) if row.mask is not None else ())]):
                finished.append(at)
        return finished

    @staticmethod
    def _retire(active: list[Row], finished: list[int], batch: Batch) -> None:
        """Remove finished rows; the last rows move into the gaps."""
        for row in (active[at] for at in finished):
            row.end()
        left = len(active) - len(finished)
        targets = [at for at in finished if at < left]
        sources = sorted(set(range(left, len(active))) - set(finished), reverse=True)
        if targets:
            batch.move(sources, targets, max(len(active[s].whole) for s in sources))
        for source, target in zip(sources, targets, strict=True):
            active[target] = active[source]
        del active[left:]


def _next_tokens(batch: Batch, states: torch.Tensor, begin: int, rows: list[Row], decoding: Decoding) -> list[int]:
    """The next token of each row, which have the places from ``begin`` on: decided by its guide, else chosen; in both
    cases among those that its mask allows."""
    draws = torch.tensor([row.draws[len(row.answer.ids)] for row in rows], dtype=torch.float32)
    found = [None if row.guide is None else row.guide.decision(row.answer.ids) for row in rows]
    decisions = {at: decision for at, decision in enumerate(found) if decision is not None}
    allowed = _allowed(rows, batch.vocabulary, states.device)
    if not decisions:
        return batch.choose(states, range(begin, begin + len(rows)), draws, allowed)
    tokens = [0] * len(rows)
    free = [at for at in range(len(rows)) if at not in decisions]
    if free:
        among = None if allowed is None else allowed[free]
        chosen = batch.choose(states[free], [begin + at for at in free], draws[free], among)
        for at, token in zip(free, chosen, strict=True):
            tokens[at] = token
    decided = list(decisions)
    among = None if allowed is None else allowed[decided]
    logits = only(batch.logits(states[decided]), among).log_softmax(dim=-1).cpu().numpy()
    logits[:, list(decoding.banned_ids)] = -np.inf
    for scores, (at, decision) in zip(logits, decisions.items(), strict=True):
        tokens[at] = decision.pick(scores)
        if scores[tokens[at]] == -np.inf:  # the mask leaves none of the values that the guide knows
            tokens[at] = int(scores.argmax())
    batch.mark([begin + at for at in decided], [tokens[at] for at in decided])
    return tokens


def _allowed(rows: Sequence[Row], vocabulary: int, device: torch.device) -> torch.Tensor | None:
    """(n, V) bool, the tokens that each row may go on with; None where no row has a mask."""
    if all(row.mask is None for row in rows):
        return None
    every = np.ones(vocabulary, dtype=bool)
    made = [every if row.mask is None else row.mask.allowed(vocabulary) for row in rows]
    return send(torch.from_numpy(np.stack(made)), device)
