"""``--max-minutes`` during a run: the extent is decided once, corrected after training, and saved for --resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tell.anchor.anchor import NO_ANCHOR
from tell.config_sections import GeneralConfig
from tell.files import write_json, write_text
from tell.rows.row_table import RowTable
from tell.run.arms import lead_arm, trained_arms
from tell.run.general_rows import draw_general
from tell.run.journal import Journal
from tell.run.plan import estimated_general
from tell.run.prepare import Prepared
from tell.run.pseudo_rows import planned_pseudo
from tell.run.record import Planned, split_file
from tell.run.self_written import enough_of, self_file
from tell.run.session import Session
from tell.run.speed import measure_pace
from tell.run.task import Task
from tell.run.time_budget import Extent, fit_minutes, read_extent
from tell.run.train_arms import Trained
from tell.run.written_blocks import Enough, cached_blocks


@dataclass
class InTime:
    """The time limit of a run, and what was given up to meet it.

    Attributes:
        minutes: ``--max-minutes``; None: no limit.
        session: the open model whose pace is measured.
        given_up: notices, one for each thing given up so far.
        measured: whether the pace was measured in this session of the run.
        decided: ``fit`` of plan.json, from `fit` on.
    """

    minutes: float | None
    session: Session
    journal: Journal
    given_up: list[str] = field(default_factory=list)
    measured: bool = False
    decided: dict[str, Any] = field(default_factory=dict)

    def enough(self, task: Task, table: RowTable, engine: str) -> Enough:
        """A function of rows: the share they make up of the general rows that there is predicted to be time for.

        A resumed run takes those that the previous session took.

        Args:
            engine: writes them.
        """
        tokens = int(table.unit.sum())
        if (kept := self._planned("general")) is not None:
            return lambda rows: len(rows) / max(1, kept.rows)
        enough = enough_of(task.config, task.unit, tokens)
        file = self_file(task.config, task.files.fingerprint, task.chat.fingerprint, engine)
        written = cached_blocks(file, enough)
        if not self.minutes or written is not None:
            return enough
        self._measure(task, table)
        general = estimated_general(task, tokens)
        draw = draw_general(task.config, general, tokens)
        estimate = Prepared(task, NO_ANCHOR, table, general, draw, pseudo=planned_pseudo(task, table))
        extent, _ = fit_minutes(estimate, minutes=self.minutes, spent=self.journal.spent)
        shorter = task.config.model_copy(deep=True)
        shorter.general = GeneralConfig(rows=0 if extent.draw is None else len(extent.draw))
        return enough_of(shorter, task.unit, 0)

    def fit(self, prepared: Prepared) -> Prepared:
        """The extent of the run that fits; a resumed run keeps the first decision.

        Raises:
            TellError: not even the smallest extent fits, or no arm is left.
        """
        if (kept := self._planned("fit")) is not None:
            self._give_up(prepared, kept.given_up)
            extent = read_extent(kept.model_dump(), prepared.draw)
        elif not self.minutes:
            extent = Extent.of(prepared)
        else:
            self._measure(prepared.task, prepared.table)
            general = prepared.general
            written = len(general.allowed) if general is not None and general.written else None
            minutes, spent = self.minutes, self.journal.spent
            extent, given_up = fit_minutes(prepared, minutes=minutes, spent=spent, most_general=written)
            self._give_up(prepared, given_up)
        prepared = extent.apply(prepared)
        prepared.check_arms()
        self.decided = self._kept(extent)
        return prepared

    def corrected(self, prepared: Prepared, trained: Trained) -> Prepared:
        """The extent after the leading arm has trained: smaller if that took longer than predicted."""
        if not self.minutes or prepared.lead not in trained.now:
            return prepared
        arms = trained_arms(prepared.task.config.eval.arms)
        lead, spent = lead_arm(arms, dict.fromkeys(arms)), self.journal.spent
        extent, given_up = fit_minutes(prepared, minutes=self.minutes, spent=spent, trained=lead)
        self._give_up(prepared, given_up)
        folder, prepared = self.journal.folder, extent.apply(prepared)
        write_json(folder.plan, {**folder.read(folder.plan), "fit": self._kept(extent)})
        write_text(folder.split, split_file(prepared.task))
        return prepared

    def _kept(self, extent: Extent) -> dict[str, Any]:
        return {**extent.to_dict(), "given_up": self.given_up}

    def _measure(self, task: Task, table: RowTable) -> None:
        if not self.measured:
            self.session.load()
            with self.session.display.bar("measure the pace", None):
                measure_pace(task, table, self.session)
        self.measured = True

    def _give_up(self, prepared: Prepared, what: list[str]) -> None:
        self.given_up += what
        for text in what:
            prepared.task.notices.add(text)

    def _planned(self, key: str) -> Any:
        """The decision in the previous session's plan.json; None in a first session."""
        folder = self.journal.folder
        return getattr(folder.read_as(folder.plan, Planned), key) if folder.plan.exists() else None
