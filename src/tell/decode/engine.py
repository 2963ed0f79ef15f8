"""TELL's decoding engine: packed prefill, the shared prefix once, finished rows replaced at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch

from tell.decode.batch import Batch, KernelBatch, Packed, PlainBatch
from tell.decode.layers import describe
from tell.decode.room import answer_limits, rows_that_fit, token_bytes
from tell.decode.sampler import Decoding, uniforms
from tell.kernels.decode_ops import kernels
from tell.train.device import free_bytes
from tell.train.lora import adapter_merged
from tell.train.step import Body
from tell.train.torch_types import AnyModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tell.decode.guide import Guide

PREFILL_TOKENS = 4096  # most tokens of one prefill pass
ROOM = 1024  # tokens of a row, prompt and answer, that may join a running batch even if its first rows are shorter
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}  # relative distance of states that rounding explains


@dataclass(slots=True)
class Answer:
    """Decoded tokens without the stop token, and why decoding ended."""

    ids: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt for `Engine.serve`.

    Attributes:
        prompt: token ids, at least one.
        limit: most new tokens; prompt and answer fit into the model's context.
        seed: its random numbers are those of `Engine.generate` for a single prompt with that seed.
        on_token: gets each token as it comes; if it returns True, that token is the answer's last.
        on_end: gets the finished answer.
        guide: decides closed fields of the answer.
    """

    prompt: Sequence[int]
    limit: int
    seed: int
    on_token: Callable[[int], object]
    on_end: Callable[[Answer], object]
    guide: Guide | None = None


Arrivals = Callable[[int, Callable[[Request], bool]], Sequence[Request]]
"""``arrivals(free, fits)`` returns at most ``free`` requests that join a running batch, each of which ``fits``."""


@dataclass(slots=True)
class _Row:
    prompt: list[int]  # after the shared prefix
    limit: int
    draws: np.ndarray
    answer: Answer
    guide: Guide | None = None
    on_token: Callable[[int], object] | None = None
    on_end: Callable[[Answer], object] | None = None

    @classmethod
    def of(cls, request: Request) -> _Row:
        draws = uniforms(request.seed, 0, request.limit)
        heard = (request.guide, request.on_token, request.on_end)
        return cls(list(request.prompt), request.limit, draws, Answer(), *heard)


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

        Returns:
            An Answer for each prompt, in order. A prompt's random numbers depend neither on batch size nor on order.

        Raises:
            TellError: a prompt fills the model's context.
            ValueError: ``limits`` are not one positive number a prompt.
        """
        limits = answer_limits(prompts, decoding.max_new_tokens, limits, self.max_positions)
        if not prompts:
            return []
        made = guides or [None] * len(prompts)
        rows = [
            _Row(list(prompt), limit, uniforms(decoding.seed, number, limit), Answer(), guide)
            for number, (prompt, limit, guide) in enumerate(zip(prompts, limits, made, strict=True))
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
        self._run([_Row.of(request) for request in first], decoding, shared, arrivals=arrivals)

    def _run(
        self,
        rows: list[_Row],
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
        rows: list[_Row],
        decoding: Decoding,
        prefix: list[int],
        progress: Callable[[int, float], None] | None,
        arrivals: Arrivals | None,
    ) -> None:
        for row in rows:
            row.prompt = row.prompt[len(prefix) :]
        waiting = _longest_last(rows)
        capacity = max(len(r.prompt) + r.limit for r in rows)
        wanted = min(decoding.batch_size, len(rows))
        if arrivals is not None:  # which may be longer and more than the first
            wanted, capacity = decoding.batch_size, max(capacity, min(ROOM, self.max_positions - len(prefix)))
        if self._token_bytes is None:
            self._token_bytes = token_bytes(self.body.core, self.device)
        slots = rows_that_fit(wanted, capacity, self._token_bytes, free_bytes(self.device))
        batch = self._batch(decoding, slots, capacity, prefix)
        active: list[_Row] = []
        last: list[int] = []
        ended, before = 0, 0.0

        def fits(request: Request) -> bool:
            own = len(request.prompt) - len(prefix)
            return 0 < own <= capacity - request.limit and list(request.prompt[: len(prefix)]) == prefix

        while waiting or active:
            if arrivals is not None and (room := slots - len(active) - len(waiting)) > 0:
                joined = [_Row.of(request) for request in arrivals(room, fits)]
                for row in joined:
                    row.prompt = row.prompt[len(prefix) :]
                waiting = _longest_last([*waiting[::-1], *joined]) if joined else waiting
            free = slots - len(active)
            if waiting and (not active or free >= max(1, slots // 4)):
                fresh: list[_Row] = []
                used = 0
                while waiting and len(fresh) < free and (not fresh or used + len(waiting[-1].prompt) <= PREFILL_TOKENS):
                    row = waiting.pop()
                    used += len(row.prompt)
                    fresh.append(row)
                begin = len(active)
                states = batch.prefill([row.prompt for row in fresh], begin)
                batch.see(begin, [prefix + row.prompt for row in fresh])
                active += fresh
                last += _next_tokens(batch, states, begin, fresh, decoding)
                finished = self._record(active, last, len(active) - len(fresh), decoding)
                new = len(fresh)
            else:
                states = batch.decode([len(r.prompt) + len(r.answer.ids) - 1 for r in active], last)
                last = _next_tokens(batch, states, 0, active, decoding)
                finished = self._record(active, last, 0, decoding)
                new = len(active)
            for row in (active[at] for at in finished):
                if row.on_end:
                    row.on_end(row.answer)
            self._retire(active, last, finished, batch)
            ended += len(finished)
            if progress:
                now = ended + sum(len(row.answer.ids) / row.limit for row in active)
                progress(new, now - before)
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
    def _record(active: list[_Row], last: list[int], begin: int, decoding: Decoding) -> list[int]:
        """Append the tokens just drawn; returns the positions of finished rows."""
        finished = []
        for at in range(begin, len(active)):
            row, token = active[at], last[at]
            if token in decoding.stop_ids:
                row.answer.finish = "stop"
                finished.append(at)
                continue
            row.answer.ids.append(token)
            if row.on_token and row.on_token(token) is True:
                row.answer.finish = "stop"
                finished.append(at)
            elif len(row.answer.ids) >= row.limit:
                finished.append(at)
        return finished

    @staticmethod
    def _retire(active: list[_Row], last: list[int], finished: list[int], batch: Batch) -> None:
        """Remove finished rows; the last rows move into the gaps."""
        left = len(active) - len(finished)
        targets = [at for at in finished if at < left]
        sources = sorted(set(range(left, len(active))) - set(finished), reverse=True)
        if targets:
            batch.move(sources, targets, max(len(active[s].prompt) + len(active[s].answer.ids) for s in sources))
        for source, target in zip(sources, targets, strict=True):
            active[target], last[target] = active[source], last[source]
        del active[left:], last[left:]


def _longest_last(rows: Sequence[_Row]) -> list[_Row]:
    """Waiting rows, taken from the end: long prompts first, so that rows prefilled together are alike in length."""
    return sorted(reversed(rows), key=lambda row: len(row.prompt))  # of equal ones the first is taken first


def _next_tokens(batch: Batch, states: torch.Tensor, begin: int, rows: list[_Row], decoding: Decoding) -> list[int]:
    """The next token of each row, which have the places from ``begin`` on: decided by its guide, else chosen."""
    draws = torch.tensor([row.draws[len(row.answer.ids)] for row in rows], dtype=torch.float32)
    found = [None if row.guide is None else row.guide.decision(row.answer.ids) for row in rows]
    decisions = {at: decision for at, decision in enumerate(found) if decision is not None}
    if not decisions:
        return batch.choose(states, range(begin, begin + len(rows)), draws)
    tokens = [0] * len(rows)
    free = [at for at in range(len(rows)) if at not in decisions]
    if free:
        chosen = batch.choose(states[free], [begin + at for at in free], draws[free])
        for at, token in zip(free, chosen, strict=True):
            tokens[at] = token
    decided = list(decisions)
    logits = batch.logits(states[decided]).log_softmax(dim=-1).cpu().numpy()
    logits[:, list(decoding.banned_ids)] = -np.inf
    for scores, (at, decision) in zip(logits, decisions.items(), strict=True):
        tokens[at] = decision.pick(scores)
    batch.mark([begin + at for at in decided], [tokens[at] for at in decided])
    return tokens
