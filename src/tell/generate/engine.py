"""One decoding engine: rows end to end, the shared prefix once, finished rows replaced at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from tell.errors import TellError
from tell.generate.cache import DecodePlan, PrefillPlan, PrefixPlan, Store
from tell.generate.sampler import Decoding, choose, uniforms
from tell.train.attention import use_plan
from tell.train.step import Body

PREFILL_TOKENS = 4096


@dataclass(slots=True)
class Answer:
    """Decoded tokens without the stop token, and why decoding ended."""

    ids: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"


@dataclass(slots=True)
class _Row:
    number: int
    prompt: list[int]  # behind the shared prefix
    limit: int
    draws: np.ndarray
    answer: Answer


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving at least one to each; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)  # whatever the extremes share, all share
    length = 0
    shortest = min(len(p) for p in prompts) - 1
    while length < shortest and low[length] == high[length]:
        length += 1
    return length


class Engine:
    """Decodes with a causal model whose adapter, if any, is merged.

    Args:
        model: a transformers causal model.
        device: where it lies.
        max_positions: longest sequence the model knows, in tokens.
    """

    def __init__(self, model: Any, *, device: str | torch.device = "cpu", max_positions: int | None = None) -> None:
        self.model, self.device = model, torch.device(device)
        self.body = Body(model)
        config = model.config.get_text_config()
        self.max_positions = max_positions or getattr(config, "max_position_embeddings", None) or 1 << 30

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        progress: Callable[[int, int], None] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answer each prompt.

        Args:
            prompts: token ids, at least one each.
            decoding: sampler, limits, batch size and seed.
            progress: called with (new tokens, finished rows) after each step.
            on_token: called with (prompt number, token) as tokens come.

        Returns:
            An Answer for each prompt, in their order. Neither batch size nor order changes the random
            numbers a prompt gets.

        Raises:
            TellError: a prompt fills the model's context.
        """
        if not prompts:
            return []
        was_training = self.model.training
        self.model.eval()
        try:
            return self._run([list(p) for p in prompts], decoding, progress, on_token)
        finally:
            self.model.train(was_training)

    def _run(
        self,
        prompts: list[list[int]],
        decoding: Decoding,
        progress: Callable[[int, int], None] | None,
        on_token: Callable[[int, int], None] | None,
    ) -> list[Answer]:
        prefix = shared_prefix(prompts)
        rows = []
        for number, prompt in enumerate(prompts):
            room = self.max_positions - len(prompt)
            if room < 1:
                raise TellError(
                    f"the prompt has {len(prompt):,} tokens and the model takes {self.max_positions:,}",
                    where=f"prompt {number + 1}",
                    remedy="Shorten the prompt, or give fewer in-context examples.",
                )
            limit = min(decoding.max_new_tokens, room)
            draws = uniforms(decoding.seed, number, limit)
            rows.append(_Row(number, prompt[prefix:], limit, draws, Answer()))
        answers = [row.answer for row in rows]
        # Long prompts first, so that rows prefilled together are alike in length; ties by number.
        waiting = sorted(rows, key=lambda r: (len(r.prompt), -r.number))
        slots = min(decoding.batch_size, len(rows))
        capacity = max(len(r.prompt) + r.limit for r in rows)
        store = Store(slots, capacity)
        if prefix:
            self._forward(PrefixPlan(prefix, store, self.device), prompts[0][:prefix])
        vocabulary = self.body.head.shape[0]
        self.seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=self.device)
        active: list[_Row] = []
        last: list[int] = []
        while waiting or active:
            free = slots - len(active)
            if waiting and (not active or free >= max(1, slots // 4)):
                fresh, used = [], 0
                while waiting and len(fresh) < free and (not fresh or used + len(waiting[-1].prompt) <= PREFILL_TOKENS):
                    row = waiting.pop()
                    used += len(row.prompt)
                    fresh.append(row)
                first = self._prefill(fresh, len(active), store, prefix, prompts, decoding)
                active += fresh
                last += first
                finished = self._record(active, last, len(active) - len(fresh), decoding, on_token)
                new = len(fresh)
            else:
                last = self._decode(active, last, store, prefix, decoding)
                finished = self._record(active, last, 0, decoding, on_token)
                new = len(active)
            self._retire(active, last, finished, store)
            if progress:
                progress(new, len(finished))
        del self.seen
        return answers

    def _forward(self, plan: Any, ids: Sequence[int]) -> torch.Tensor:
        """(T, h) final states of packed tokens under a plan."""
        with use_plan(plan):
            tokens = torch.tensor(ids, dtype=torch.long, device=self.device)[None]
            out = self.body.core(input_ids=tokens, position_ids=plan.positions(), use_cache=False)
        return out.last_hidden_state[0]

    def _next(self, states: torch.Tensor, rows: list[_Row], begin: int, decoding: Decoding) -> list[int]:
        logits = torch.nn.functional.linear(states * self.body.logit_scale, self.body.head, self.body.bias).float()
        if self.body.softcap is not None:
            logits = torch.tanh(logits / self.body.softcap) * self.body.softcap
        draws = torch.tensor([r.draws[len(r.answer.ids)] for r in rows], dtype=torch.float32, device=self.device)
        chosen = choose(logits, self.seen[begin : begin + len(rows)], draws, decoding)
        self.seen[torch.arange(begin, begin + len(rows), device=self.device), chosen] = True
        return chosen.tolist()

    def _prefill(
        self,
        fresh: list[_Row],
        begin: int,
        store: Store,
        prefix: int,
        prompts: list[list[int]],
        decoding: Decoding,
    ) -> list[int]:
        lengths = [len(row.prompt) for row in fresh]
        slots = list(range(begin, begin + len(fresh)))
        plan = PrefillPlan(lengths, slots, store, prefix, self.device)
        states = self._forward(plan, [token for row in fresh for token in row.prompt])
        ends = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        for slot, row in zip(slots, fresh, strict=True):
            self.seen[slot] = False
            self.seen[slot, torch.tensor(prompts[row.number], device=self.device)] = True
        return self._next(states[ends], fresh, begin, decoding)

    def _decode(self, active: list[_Row], last: list[int], store: Store, prefix: int, decoding: Decoding) -> list[int]:
        lengths = torch.tensor([len(r.prompt) + len(r.answer.ids) - 1 for r in active], device=self.device)
        states = self._forward(DecodePlan(lengths, store, prefix), last)
        return self._next(states, active, 0, decoding)

    @staticmethod
    def _record(
        active: list[_Row],
        last: list[int],
        begin: int,
        decoding: Decoding,
        on_token: Callable[[int, int], None] | None,
    ) -> list[int]:
        """Append the tokens just drawn; the positions of rows that are finished."""
        finished = []
        for at in range(begin, len(active)):
            row, token = active[at], last[at]
            if token in decoding.stop_ids:
                row.answer.finish = "stop"
                finished.append(at)
                continue
            row.answer.ids.append(token)
            if on_token:
                on_token(row.number, token)
            if len(row.answer.ids) >= row.limit:
                finished.append(at)
        return finished

    def _retire(self, active: list[_Row], last: list[int], finished: list[int], store: Store) -> None:
        """Take finished rows out; the last slots move into the holes."""
        for at in sorted(finished, reverse=True):
            end = len(active) - 1
            if at != end:
                row = active[end]
                store.move(end, at, len(row.prompt) + len(row.answer.ids))
                self.seen[at] = self.seen[end]
                active[at], last[at] = active[end], last[end]
            active.pop()
            last.pop()
