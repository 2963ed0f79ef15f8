"""Exemplars: task rows whose prompts show other task rows (in-context tuning, MetaICL, arXiv 2110.15943). No torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tell.anchor.anchor import Anchor
from tell.data.example import Example, Message
from tell.mix.mixture import TASK, Mixture
from tell.rows.row_table import RowTable, joined
from tell.rows.tokenize import RowRules
from tell.run.answers import shown_turns
from tell.run.task import Task, anchored_table
from tell.seeds import permutation

EXEMPLARS = "exemplars"


@dataclass(frozen=True)
class _Shown:
    """A task row with the rows that its prompt shows, in their order."""

    row: Example
    exemplars: list[Example]

    def conversation(self) -> Example:
        """The turns of a test prompt after its examples, and the row's answer; only the row's own answers are trained.

        An answer with which the row itself begins is context, as it is where the row stands alone.
        """
        messages = self.row.messages
        first = next((i for i, m in enumerate(messages) if m.role == "user"), 0)
        own = replace(self.row, messages=(*_untrained(messages[:first]), *messages[first:]))
        shown = [replace(e, messages=_untrained(e.messages)) for e in self.exemplars]
        turns = [*shown_turns(own, shown), own.messages[-1]]
        return Example.of(turns, source=EXEMPLARS, origin=self.row.origin)

    def without_longest(self, lengths: Mapping[str, int]) -> _Shown:
        """The same without its longest exemplar, by content hash; of equally long ones the last."""
        longest = max(range(len(self.exemplars)), key=lambda i: (lengths[self.exemplars[i].hash], i))
        return _Shown(self.row, [*self.exemplars[:longest], *self.exemplars[longest + 1 :]])


def _untrained(turns: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(replace(m, trained=False) if m.role == "assistant" else m for m in turns)


@dataclass(frozen=True)
class _Epoch:
    """All task rows with exemplars, as one repetition shows them.

    Attributes:
        table: the rows that fit with one exemplar at least.
        at: (n,) index of each task row in `table`; -1: it has no exemplars.
        drawn, shown: (n,) exemplars before and after it is known how many fit.
        reason: why the first row does not fit with all; empty where every row does.
    """

    table: RowTable
    at: np.ndarray
    drawn: np.ndarray
    shown: np.ndarray
    reason: str


@dataclass(frozen=True)
class Exemplars:
    """Puts exemplars before the task rows of a mixture.

    Attributes:
        task: with the settings of the arm; ``mix.exemplars`` are wanted.
        table: the tokenised task rows; rows that are not trained on are not shown either.
        made: what was made before with this anchor and these rows, since a plan tries many amounts.
    """

    task: Task
    anchor: Anchor
    table: RowTable
    made: dict[Hashable, _Epoch] = field(default_factory=dict)

    def into(self, mixture: Mixture) -> Mixture:
        """The mixture with exemplars in the prompts of every second repetition of its task rows.

        Repetitions count from 0, and the odd ones have exemplars. Which rows are shown depends on seed, row and
        repetition alone, so that more repetitions extend fewer. Never shown are the row itself and rows with its
        prompt. A prompt has as many exemplars as fit into ``train.max_length``; where none does, the row stays as it
        is.
        """
        if TASK not in mixture.sources:
            return mixture
        of_task = mixture.source == mixture.sources.index(TASK)
        places = np.flatnonzero(of_task & (mixture.repetition % 2 == 1))
        if not len(places):
            return replace(mixture, notices=(*mixture.notices, "no row shows exemplars: no task row is repeated"))
        epochs = [self._epoch(r) for r in range(1, int(mixture.repetition[places].max()) + 1, 2)]
        starts = np.cumsum([0, *(len(epoch.table) for epoch in epochs)])
        which, row = mixture.repetition[places] // 2, mixture.row[places]
        at, drawn, shown = (
            np.stack([getattr(e, name) for e in epochs])[which, row] for name in ("at", "drawn", "shown")
        )
        table, here = joined([epoch.table for epoch in epochs]), at >= 0
        reason = next((epoch.reason for epoch in epochs if epoch.reason), "")
        notices = [*self._notices(drawn, shown, reason), *table.notices]
        return mixture.replaced(places[here], starts[which[here]] + at[here], table, notices)

    def _epoch(self, repetition: int) -> _Epoch:
        """The rows of one repetition, made once."""
        key = (self.task.config.mix.exemplars, self._rules, repetition, tuple(self.table.hashes.tolist()))
        if key not in self.made:
            self.made[key] = self._fitted(self._draw(repetition))
        return self.made[key]

    def _draw(self, repetition: int) -> list[_Shown]:
        """Every task row with its exemplars, before it is known how many fit."""
        by_hash = {example.hash: example for example in self.task.train}
        rows = [by_hash[str(key)] for key in self.table.hashes]
        prompts = [[(m.role, m.content) for m in row.prompt] for row in rows]
        seed, count = self.task.config.seed, self.task.config.mix.exemplars
        drawn = []
        for row, prompt in zip(rows, prompts, strict=True):
            order = permutation(len(rows), seed, EXEMPLARS, row.hash, repetition).tolist()
            drawn.append(_Shown(row, [rows[i] for i in order if prompts[i] != prompt][:count]))
        return drawn

    def _fitted(self, drawn: Sequence[_Shown]) -> _Epoch:
        """The rows with as many of their exemplars as fit; the longest are left out first."""
        lengths = dict(zip(self.table.hashes.tolist(), self.table.tokens.tolist(), strict=True))
        fits: dict[int, _Shown] = {}
        left = {i: entry for i, entry in enumerate(drawn) if entry.exemplars}
        reason = ""
        while left:
            conversations = {i: entry.conversation() for i, entry in left.items()}
            table = anchored_table(self.task, self.anchor, list(conversations.values()), EXEMPLARS, self._rules)
            if table.dropped and not reason:
                reason = f"{table.dropped[0].origin}: {table.dropped[0].reason}"
            kept = set(table.hashes.tolist())
            fits |= {i: left[i] for i, row in conversations.items() if row.hash in kept}
            shorter = {i: entry.without_longest(lengths) for i, entry in left.items() if i not in fits}
            left = {i: entry for i, entry in shorter.items() if entry.exemplars}
        at = np.full(len(drawn), -1)
        at[sorted(fits)] = np.arange(len(fits))
        shown = [len(fits[i].exemplars) if i in fits else 0 for i in range(len(drawn))]
        rows = [fits[i].conversation() for i in sorted(fits)]
        whole = anchored_table(self.task, self.anchor, rows, EXEMPLARS, self._rules)
        return _Epoch(whole, at, np.array([len(entry.exemplars) for entry in drawn]), np.array(shown), reason)

    @property
    def _rules(self) -> RowRules:
        """A row that does not fit with exemplars is no error; they are not trained, whatever ``train.loss_on`` says."""
        policies = {"too_long": "drop", "nothing_to_train": "drop", "misfit": "drop", "loss_on": "answer"}
        return replace(self.task.rules, **policies)  # type: ignore[arg-type]

    def _notices(self, drawn: np.ndarray, shown: np.ndarray, reason: str) -> list[str]:
        """What the rows lack, by their exemplars before and after it was known how many fit."""
        count, notices = self.task.config.mix.exemplars, []
        if alone := int((drawn == 0).sum()):
            notices.append(f"{alone:,} of {len(drawn):,} rows show no exemplars: there is no other task row to show")
        if ((drawn > 0) & (drawn < count)).any():
            notices.append(f"rows show at most {drawn.max()} exemplars, not {count}: there are no more other task rows")
        if (fewer := int(((shown < drawn) & (shown > 0)).sum())) + (none := int(((shown == 0) & (drawn > 0)).sum())):
            rows = (
                f"of {int((drawn > 0).sum()):,} rows with exemplars {fewer:,} show fewer than drawn and {none:,} none"
            )
            notices.append(f"{rows}, since they do not fit; the first, {reason}")
        if self.task.config.train.loss_on == "all":
            notices.append("rows with exemplars are trained on their answer alone, not as train.loss_on says")
        return notices
