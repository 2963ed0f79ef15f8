"""``--max-minutes`` over a run: what is done is decided once, corrected after training, and kept for --resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tell.config import GeneralConfig
from tell.files import write_json, write_text
from tell.folder import RunFolder
from tell.mix.amount import Draw
from tell.progress import Display
from tell.rows.row_table import RowTable
from tell.run.arms import lead_arm, trained_arms
from tell.run.general_rows import General, draw_general, general_source
from tell.run.plan import estimated_general
from tell.run.prepare import Task, split_file
from tell.run.record import Planned
from tell.run.self_written import Enough, cached_self_file, enough_of
from tell.run.time_budget import Extent, fit_minutes, read_extent

Measure = Callable[[RowTable], None]  # measures the pace of training and decoding, with the task's rows


@dataclass
class InTime:
    """The minutes of a run.

    Attributes:
        minutes: ``--max-minutes``; None: all that is asked for is done.
        begin: on the monotonic clock, when this session began.
        given_up: what was given up so far, a notice each.
        measured: whether the pace was measured in this session.
    """

    minutes: float | None
    begin: float
    folder: RunFolder
    display: Display
    given_up: list[str] = field(default_factory=list)
    measured: bool = False

    def enough(self, task: Task, table: RowTable, measure: Measure) -> Enough:
        """When the model has written enough general rows: as many as there is predicted to be time for.

        A resumed run takes those that the session before took.
        """
        tokens = int(table.unit.sum())
        if (kept := self._planned("general")) is not None:
            return lambda rows: len(rows) / max(1, kept.rows)
        enough = enough_of(task.config, task.unit, tokens)
        written = cached_self_file(task.config, task.files.fingerprint, task.chat.fingerprint, enough)
        if not self.minutes or written is not None:
            return enough
        self._measure_once(measure, table)
        general = estimated_general(task.config, task, tokens)
        draw = draw_general(task.config, general, tokens)
        extent, _ = fit_minutes(task, table, general, draw, minutes=self.minutes, spent=self._spent)
        shorter = task.config.model_copy(deep=True)
        shorter.general = GeneralConfig(rows=0 if extent.draw is None else len(extent.draw))
        return enough_of(shorter, task.unit, 0)

    def extent(
        self, task: Task, table: RowTable, general: General | None, draw: Draw | None, measure: Measure
    ) -> Extent:
        """As much of the run as fits; when resumed, as was decided the first time.

        Raises:
            TellError: not even the least of it fits.
        """
        if (kept := self._planned("fit")) is not None:
            self._give_up(task, kept.given_up)
            return read_extent(kept.model_dump(), draw)
        if not self.minutes:
            return Extent.of(task, table, draw)
        self._measure_once(measure, table)
        written = len(general.allowed) if general is not None and general_source(task) == "self" else None
        limits: dict[str, Any] = {"minutes": self.minutes, "spent": self._spent, "most_general": written}
        extent, given_up = fit_minutes(task, table, general, draw, **limits)
        self._give_up(task, given_up)
        return extent

    def corrected(self, task: Task, table: RowTable, general: General | None, draw: Draw | None) -> Extent:
        """The extent once the leading arm is trained: less if that took longer than predicted."""
        if not self.minutes:
            return Extent.of(task, table, draw)
        arms = trained_arms(task.config.eval.arms)
        lead = lead_arm(arms, dict.fromkeys(arms))
        extent, given_up = fit_minutes(
            task, table, general, draw, minutes=self.minutes, spent=self._spent, trained=lead
        )
        self._give_up(task, given_up)
        plan = self.folder.read(self.folder.plan)
        write_json(self.folder.plan, {**plan, "fit": self.fit(extent)})
        write_text(self.folder.split, split_file(extent.apply(task)))
        return extent

    def fit(self, extent: Extent) -> dict[str, Any]:
        """``fit`` of plan.json, which a resumed run goes by."""
        return {**extent.to_dict(), "given_up": self.given_up}

    def _measure_once(self, measure: Measure, table: RowTable) -> None:
        if not self.measured:
            measure(table)
        self.measured = True

    @property
    def _spent(self) -> float:
        return time.monotonic() - self.begin

    def _give_up(self, task: Task, what: list[str]) -> None:
        self.given_up += what
        for text in what:
            task.notice(text, self.display)

    def _planned(self, key: str) -> Any:
        """What plan.json of the session before says; None in a first session."""
        return getattr(self.folder.read_as(self.folder.plan, Planned), key) if self.folder.plan.exists() else None
