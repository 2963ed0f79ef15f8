"""Rows decoded over a cache that never moves, by steps that a GPU repeats without its host.

What differs between steps (tokens, lengths, draws) is in buffers on the device. A step reads them, writes keys and
values, chooses tokens and updates the buffers, so its shapes depend only on two sizes that are rounded up: rows, and
tokens of the longest row. For each pair of them the first step runs as it is and the second is recorded. Tokens are
fetched while the next step runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tell.decode.batch import PlainBatch
from tell.decode.kv_cache import DecodePlan, PrefillPlan, PrefixPlan
from tell.decode.sampler import Decoding, choose
from tell.decode.static_model import Rope, StaticModel
from tell.decode.step_graphs import Call, Recorder
from tell.train.device import Fetch, send

ROWS = (1, 4, 16, 32, 64)  # rows of a recorded step; above, multiples of the last. Recording costs more than idle rows.
SHORTEST = 128  # tokens of the longest row that a recorded step reads at least
ALIGNED = 8  # lengths of keys are multiples of it, as tensor cores like them

TOKEN, LENGTH, DRAWN = range(3)  # of each place: its newest token, tokens cached, tokens of its answer so far


def rounded_rows(n: int, slots: int) -> int:
    """Rows of the recorded step that takes n rows."""
    most = next((size for size in ROWS if size >= n), -(-n // ROWS[-1]) * ROWS[-1])
    return min(most, slots)


def rounded_length(n: int) -> int:
    """Tokens of each row that the recorded step for rows of up to n tokens reads, if its slots have as many."""
    size = SHORTEST
    while size < n:
        if size < 4 * SHORTEST:
            size *= 2
        else:  # in halves of a doubling
            size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class Step(NamedTuple):
    """What all layers of a step share.

    Attributes:
        rows: (n,) their numbers.
        at: (n,) tokens of each row that are cached before the new one.
        length: tokens of each slot that attention reads.
        hidden: by window: (n, 1, 1, prefix + length) True where a key is masked.
    """

    rows: Tensor
    at: Tensor
    length: int
    hidden: dict[int | None, Tensor]


class StaticBatch(PlainBatch):
    """A model that ``layers.describe`` supports, on any device.

    Args:
        model: its parts.
        slots: rows decoded at once.
        capacity: tokens a row may have after the prefix.
        prefix: token ids that all rows begin with.
        recorder: of the device.

    Attributes:
        chooses: whether steps can choose tokens too: not where top-p alone limits them, for which the sampler may have
            to look at its numbers.
    """

    def __init__(
        self,
        model: StaticModel,
        decoding: Decoding,
        slots: int,
        capacity: int,
        prefix: Sequence[int],
        recorder: Recorder,
    ) -> None:
        d, device = model.description, model.description.embedding.device
        capacity, ahead = (-(-n // ALIGNED) * ALIGNED for n in (capacity, len(prefix)))
        self.model, self.recorder = model, recorder
        self.tables = model.rotary_tables(len(prefix) + capacity)
        super().__init__(model.body, decoding, slots, capacity, prefix, device)
        like = d.embedding
        self.cache = like.new_zeros(len(d.layers), 2, slots, d.kv_heads, capacity, d.width)
        self.ahead = like.new_zeros(len(d.layers), 2, d.kv_heads, ahead, d.width)
        for index, layer in enumerate(d.layers):
            call = (layer.attention, 0)
            self.store.own[call] = self.cache[index, 0], self.cache[index, 1]
            if prefix:
                mine = self.ahead[index, :, :, : len(prefix)]
                mine.copy_(torch.cat(self.store.prefix[call]))
                self.store.prefix[call] = mine[:1], mine[1:]
        self.chooses = decoding.greedy or decoding.top_k > 0 or decoding.top_p >= 1
        self.rule = replace(decoding, banned_ids=())
        self.banned = self._indices(decoding.banned_ids) if decoding.banned_ids else None
        self.rows = torch.arange(slots, device=device)
        at = torch.arange(ahead + capacity, device=device)[None]  # of the keys: the prefix, its padding, then the row
        own = at >= ahead
        self.position = torch.where(own, at - ahead + len(prefix), at)
        self.after = torch.where(own, at - ahead, torch.where(at < len(prefix), -1, capacity))  # rows this long hide it
        self.windows = {rule.window for rule in model.rules}
        self.state = torch.zeros(3, slots, dtype=torch.long, device=device)
        self.live = torch.zeros((), dtype=torch.long, device=device)  # rows that are not empty places
        self._live = 0
        self.draws = torch.zeros(slots, capacity, device=device)
        self.states = like.new_zeros(slots, like.shape[1])
        self.nothing = like.new_zeros(1, 1, 1)
        self.recorded: dict[tuple[int, int, bool], Call] = {}
        self.begun: set[tuple[int, int, bool]] = set()

    def _forward(self, plan: PrefixPlan | PrefillPlan | DecodePlan, ids: Sequence[int]) -> Tensor:  # type: ignore[override]
        layers, rules = self.model.description.layers, self.model.rules

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return plan.attend(layers[index].attention, q, k, v, rules[index])[0].flatten(1)

        return self.model.forward(self._indices(ids), self._rope(plan.positions()[0]), attend)

    def _rope(self, positions: Tensor) -> Rope:
        return {
            name: (cosine.index_select(0, positions), sine.index_select(0, positions))
            for name, (cosine, sine) in self.tables.items()
        }

    def start(self, states: Tensor, begin: int, lengths: Sequence[int], draws: Sequence[np.ndarray]) -> Fetch:
        """The first tokens of rows just prefilled, which have the places from ``begin`` on.

        Args:
            states: (n, h) as `prefill` returns.
            lengths: cached tokens of each row.
            draws: random numbers of each row, one for each of its tokens.
        """
        span = slice(begin, begin + len(lengths))
        table = np.zeros((len(lengths), self.draws.shape[1]), dtype=np.float32)
        for row, numbers in zip(table, draws, strict=True):
            row[: len(numbers)] = numbers
        self.draws[span].copy_(send(torch.from_numpy(table), self.device))
        chosen = self._pick(states, span, self.draws[span, 0])
        self.state[:, span] = torch.stack([chosen, self._indices(lengths), torch.ones_like(chosen)])
        return Fetch(chosen)

    def step(self, n: int, longest: int) -> Fetch:
        """One more token of the first n rows, of which the longest then has ``longest`` cached tokens."""
        self._run(n, longest, chooses=True)
        return Fetch(self.state[TOKEN, :n])

    def decode(self, lengths: Sequence[int], last: Sequence[int]) -> Tensor:
        n = len(last)
        self.state[:DRAWN, :n].copy_(self._indices([last, lengths]))
        self._run(n, max(lengths) + 1, chooses=False)
        return self.states[:n].clone()

    def _run(self, n: int, longest: int, *, chooses: bool) -> None:
        if n != self._live:
            self.live.fill_(n)
            self._live = n
        key = rounded_rows(n, self.store.slots), min(rounded_length(longest), self.store.capacity), chooses
        if key not in self.recorded and key in self.begun:
            found = self.recorder.record(partial(self._step, *key))
            if found is not None:
                self.recorded[key] = found
        if key in self.recorded:
            self.recorded[key]()
        else:
            self.begun.add(key)
            self.recorder.run(partial(self._step, *key))

    def _step(self, n: int, length: int, chooses: bool) -> None:
        """Reads and updates the buffers of the first n places; waits for nothing."""
        rows = self.rows[:n]
        # An empty place begins again at each step: it neither grows nor overwrites more than one token.
        token, at, drawn = state = self.state[:, :n] * (rows < self.live)
        step = Step(rows, at, length, self._hidden(at, length))
        states = self.model.forward(token, self._rope(at + self.prefix), partial(self._attend, step))
        if not chooses:
            self.states[:n].copy_(states)
            return
        chosen = self._pick(states, slice(0, n), self.draws[:n].gather(1, drawn[:, None])[:, 0])
        self.state[:, :n].copy_(torch.cat([chosen[None], state[LENGTH:] + 1]))

    def _hidden(self, at: Tensor, length: int) -> dict[int | None, Tensor]:
        keys, found = self.ahead.shape[3] + length, {}
        after = self.after[:, :keys] > at[:, None]
        for window in self.windows:
            hidden = after
            if window is not None:
                hidden = after | (self.position[:, :keys] <= (at + (self.prefix - window))[:, None])
            found[window] = hidden[:, None, None]
        return found

    def _attend(self, step: Step, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one token a row: all rows' queries over the shared keys, each row's over its own."""
        (n, kv, width), rule, prefix = k.shape, self.model.rules[index], self.ahead.shape[3]
        for cached, new in zip(self.cache[index], (k, v), strict=True):
            cached.transpose(1, 2).index_put_((step.rows, step.at), new)
        keys, values = (x[:n, :, : step.length].flatten(0, 1) for x in self.cache[index])
        q = q.unflatten(1, (kv, -1))
        own = self._scores(q.reshape(n * kv, -1, width), keys, rule.scaling).view(n, kv, -1, step.length)
        if prefix:  # all rows share these keys: one product per head
            shared = q.transpose(0, 1).reshape(kv, -1, width)
            ahead = self._scores(shared, self.ahead[index, 0], rule.scaling).view(kv, n, -1, prefix).transpose(0, 1)
            own = torch.cat([ahead, own], dim=-1)
        if rule.softcap is not None:
            own = own.div_(rule.softcap).tanh_().mul_(rule.softcap)
        probs = own.masked_fill_(step.hidden[rule.window], float("-inf")).softmax(dim=-1)
        out = torch.bmm(probs.flatten(0, 1)[..., prefix:], values).view(n, kv, -1, width)
        if prefix:
            ahead = probs[..., :prefix].transpose(0, 1).reshape(kv, -1, prefix)
            out += torch.bmm(ahead, self.ahead[index, 1]).view(kv, n, -1, width).transpose(0, 1)
        return out.view(n, -1)

    def _scores(self, q: Tensor, k: Tensor, scaling: float) -> Tensor:
        return torch.baddbmm(self.nothing, q, k.transpose(1, 2), beta=0, alpha=scaling)

    def _pick(self, states: Tensor, places: slice, draws: Tensor) -> Tensor:
        """(n,) next tokens of rows, counted for their repetition penalty."""
        logits = self.logits(states)
        if self.banned is not None:
            logits.index_fill_(1, self.banned, float("-inf"))
        chosen = choose(logits, self.seen[places], draws, self.rule)
        if self.rule.repetition_penalty != 1:
            self.seen[places].scatter_(1, chosen[:, None], True)
        return chosen

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        for source, target in zip(sources, targets, strict=True):
            own = self.cache[:, :, :, :, :length]
            own[:, :, target].copy_(own[:, :, source])
            self.state[:, target].copy_(self.state[:, source])
            for x in (self.draws, self.seen):
                x[target].copy_(x[source])
