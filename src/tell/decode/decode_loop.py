"""The loop of the decoding engine: prefills rows that wait, goes on with those that run, ends those that are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from tell.decode.batch import Batch, only
from tell.decode.engine_rows import Arrivals, Request, Row, longest_last, waiting_rows
from tell.decode.sampler import Decoding
from tell.decode.static_batch import StaticBatch
from tell.train.device import Fetch, send

PREFILL_TOKENS = 4096  # most tokens of one prefill pass

Progress = Callable[[int, float], None]


class Flight(NamedTuple):
    """A token of each of some rows, on its way from the device."""

    rows: list[Row]
    fetch: Fetch


@dataclass(slots=True, eq=False)
class Loop:
    """Answers of rows that share a batch.

    Attributes:
        prefix: token ids that all prompts begin with.
        slots, capacity: of the batch.
        waiting: rows, taken from the end.
        done: rows that have ended already.
        progress, arrivals: as of ``Engine.generate`` and ``Engine.serve``.
    """

    batch: Batch
    decoding: Decoding
    prefix: list[int]
    slots: int
    capacity: int
    waiting: list[Row]
    done: int = 0
    progress: Progress | None = None
    arrivals: Arrivals | None = None
    active: list[Row] = field(default_factory=list)
    flight: Flight | None = None
    _before: float = 0.0

    def run(self) -> None:
        """Returns when all rows have ended."""
        batch = self.batch
        late = isinstance(batch, StaticBatch) and batch.chooses and not any(map(_is_steered, self.waiting))
        while self.waiting or self.active or self.flight:
            self._join(steered=not late)
            if late and isinstance(batch, StaticBatch):
                self._fly(batch)
            else:
                self._step()

    def _join(self, *, steered: bool) -> None:
        """Let requests join that have arrived; ``steered``: also those whose tokens the host decides."""
        room = self.slots - len(self.active) - len(self.waiting)
        if self.arrivals is None or room <= 0:
            return

        def fits(request: Request) -> bool:
            own = len(request.prompt) - len(self.prefix)
            if not steered and (request.guide is not None or request.mask is not None):
                return False
            return 0 < own <= self.capacity - request.limit and list(request.prompt[: len(self.prefix)]) == self.prefix

        joined = waiting_rows([Row.of(request) for request in self.arrivals(room, fits)], self.prefix)
        self.waiting = longest_last([*self.waiting[::-1], *joined[::-1]]) if joined else self.waiting

    def _prefill(self) -> tuple[list[Row], torch.Tensor | None]:
        """Rows that now begin, with the states at their last tokens; none while too few places are free."""
        free = self.slots - len(self.active)
        if not self.waiting or (self.active and free < max(1, self.slots // 4)):
            return [], None
        fresh: list[Row] = []
        used = 0
        while (
            self.waiting and len(fresh) < free and (not fresh or used + len(self.waiting[-1].whole) <= PREFILL_TOKENS)
        ):
            row = self.waiting.pop()
            used += len(row.whole)
            fresh.append(row)
        begin = len(self.active)
        states = self.batch.prefill([row.whole for row in fresh], begin)
        self.batch.see(begin, [self.prefix + row.prompt for row in fresh])
        self.active += fresh
        return fresh, states

    def _step(self) -> None:
        """One token more of each running row, or the first of fresh ones; the host sees it before the next step."""
        fresh, states = self._prefill()
        active, batch = self.active, self.batch
        begin = len(active) - len(fresh) if fresh else 0
        if states is None:
            new, lengths = [row.fresh for row in active], [row.cached for row in active]
            several = any(len(tokens) > 1 for tokens in new)
            states = batch.extend(lengths, new) if several else batch.decode(lengths, [t for (t,) in new])
        known = sum(len(row.answer.ids) for row in active)
        for row in active[begin:]:
            row.cached = len(row.whole)
        tokens = _next_tokens(batch, states, begin, active[begin:], self.decoding)
        finished = record(active, tokens, begin, self.decoding)
        # A token a row, be it the end; with masks those that follow it too.
        written = max(len(tokens), sum(len(row.answer.ids) for row in active) - known)
        for row in (active[at] for at in finished):
            row.end()
        retire(active, finished, batch)
        self.done += len(finished)
        if self.progress:
            now = self.done + sum(len(row.answer.ids) / row.limit for row in active)
            self.progress(written, now - self._before)
            self._before = now

    def _fly(self, batch: StaticBatch) -> None:
        """As `_step`, but the device goes on by itself: the tokens of the step before are looked at meanwhile."""
        fresh, states = self._prefill()
        active, launched = self.active, None
        if states is not None:
            begin, lengths = len(active) - len(fresh), [len(row.prompt) for row in fresh]
            launched = Flight(fresh, batch.start(states, begin, lengths, [row.draws for row in fresh]))
        elif active:
            launched = Flight(list(active), batch.step(len(active), max(row.size for row in active)))
        for row in launched.rows if launched else ():
            row.flying += 1
        self._vacate()  # what is under way completes some answers
        landed, self.flight = self.flight, launched
        if landed is not None:
            self._land(landed)

    def _land(self, flight: Flight) -> None:
        """Take over the tokens of a step; a row that had ended before it drops its token."""
        written, further = 0, 0.0
        for row, token in zip(flight.rows, flight.fetch.array().tolist(), strict=True):
            row.flying -= 1
            if row.ended:
                continue
            written += 1
            before = len(row.answer.ids) / row.limit
            if token in self.decoding.stop_ids:
                row.answer.finish = "stop"
                row.end()
            elif row.append([token]):
                row.end()
            further += (1.0 if row.ended else len(row.answer.ids) / row.limit) - before
        self._vacate()
        if self.progress and written:
            self.progress(written, further)

    def _vacate(self) -> None:
        """Free the places of rows that have ended, or will with the tokens that are under way."""
        rows = enumerate(self.active)
        gone = [at for at, row in rows if row.ended or len(row.answer.ids) + row.flying >= row.limit]
        retire(self.active, gone, self.batch)


def _is_steered(row: Row) -> bool:
    return row.guide is not None or row.mask is not None


def record(active: list[Row], tokens: list[int], begin: int, decoding: Decoding) -> list[int]:
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


def retire(active: list[Row], finished: list[int], batch: Batch) -> None:
    """Remove finished rows; the last rows move into the gaps."""
    left = len(active) - len(finished)
    targets = [at for at in finished if at < left]
    sources = sorted(set(range(left, len(active))) - set(finished), reverse=True)
    if targets:
        batch.move(sources, targets, max(active[s].size for s in sources))
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
