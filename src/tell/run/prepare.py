"""A prepared run: everything that is decided before training, as one value made by one call. No torch.

`tell plan`, `tell tune` and `tell study` get their rows here. They differ only in the source of what the model writes:
a plan estimates it, a run has the model write it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from tell.anchor.anchor import Anchor
from tell.arm import CONSTRAINTS
from tell.data.general import is_empty
from tell.errors import TellError
from tell.mix.amount import Draw
from tell.mix.mixture import GENERAL, Mixture
from tell.names import ARMS
from tell.rows.row_table import RowTable
from tell.run.answers import check_prompts
from tell.run.arms import (
    REPEAT,
    Chosen,
    Ingredients,
    Tables,
    arm_config,
    arm_mixtures,
    lead_arm,
    mixed_configs,
    same_runs,
    trained_arms,
    twins,
    wanted_arms,
)
from tell.run.exemplars import Exemplars
from tell.run.general_rows import General, draw_general, trained_on
from tell.run.known_ranking import with_known_ranking
from tell.run.pseudo_rows import Pseudo, planned_pseudo, students, usable_prompts
from tell.run.recast_rows import with_recast
from tell.run.task import Task, limit_task, task_table

Writer = Callable[[Task, RowTable], General | None]
"""Supplies general rows that no file has, given the task and its rows; None where there are none."""


@dataclass(frozen=True)
class Prepared:
    """A run before training.

    Attributes:
        task: with the rows of its budget.
        table: its rows, tokenised with the anchor.
        general: the general rows; None where there are none.
        draw: those that are mixed in.
        chosen: settings that a search chose.
        share: of the rows requested that are mixed in; below 1 where ``--max-minutes`` leaves out the others.
        made: rows with exemplars that were made so far; a copy of another extent shares them.
        pseudo: pseudo-labelled rows by teacher, estimated until it has answered.
    """

    task: Task
    anchor: Anchor
    table: RowTable
    general: General | None
    draw: Draw | None
    chosen: Chosen = field(default_factory=dict)
    share: float = 1.0
    made: dict = field(default_factory=dict, repr=False, compare=False)
    pseudo: Mapping[str, Pseudo] = field(default_factory=dict)

    def task_of(self, arm: str) -> Task:
        """The task as the arm is trained on it: the run's, with the settings of the arm."""
        config = arm_config(self.task.config, arm, self.chosen)
        return self.task if config is self.task.config else replace(self.task, config=config)

    def ingredients_of(self, arm: str) -> Ingredients:
        """What the arm's mixture is made of: the run's own rows, except where the arm's settings are about rows."""
        task, table, general, draw = self.task_of(arm), self.table, self.general, self.draw
        if task.rules != self.task.rules:
            table = task_table(task, self.anchor)
        if general is not None and task.rules.loss_on != self.task.rules.loss_on:
            general = replace(general, table=trained_on(general.table, task.rules.loss_on))
        if self.general is not None and task.config.general != self.task.config.general:
            draw = draw_general(task.config, self.general, int(table.unit.sum()))
            draw = draw.first(round(self.share * len(draw)))
        shown = Exemplars(task, self.anchor, table, self.made) if task.config.mix.exemplars else None
        searched, pseudo = REPEAT in self.chosen.get(arm, {}), self.pseudo.get(ARMS[arm].teacher or "")
        return Ingredients(task.config, table, general, draw, searched, shown, pseudo)

    @cached_property
    def mixtures(self) -> dict[str, tuple[Tables, Mixture]]:
        """Tables and mixture of every requested arm that can be trained, and of `tell`."""
        return arm_mixtures(trained_arms(wanted_arms(self.task.config)), self.ingredients_of)

    @cached_property
    def same(self) -> dict[str, str]:
        """Requested arms that equal another arm's run, mapped to that arm."""
        return same_runs(wanted_arms(self.task.config), self.mixtures, lambda arm, mix: self.task_of(arm).training(mix))

    @property
    def arms(self) -> list[str]:
        """The arms that are scored, in the order of the tables; each trained at most once."""
        wanted = wanted_arms(self.task.config)
        lost = {arm for arm in trained_arms(wanted) if arm not in self.mixtures} | {*self.same}
        return [arm for arm in wanted if ARMS[arm].adapter not in lost and arm not in self.undecided]

    @property
    def undecided(self) -> dict[str, str]:
        """Requested arms that answer as another one does, since the task has nothing to decide, or to constrain."""
        config, kind = self.task.config, self.task.kind.name
        apart = kind in CONSTRAINTS and config.generate.constrain == "off"
        return twins(wanted_arms(config), decides=self.task.decides, constrains=apart)

    @property
    def trained(self) -> list[str]:
        """The arms to train, the leading one first, since its adapter is the one users wait for; teachers before the
        arms with pseudo-labelled rows."""
        arms = dict.fromkeys(self.same.get(arm, arm) for arm in trained_arms(self.arms))
        return sorted(arms, key=lambda arm: (ARMS[arm].teacher is not None, arm != self.lead))

    @property
    def untaught(self) -> list[str]:
        """Those of `trained` that need the answers of no other one."""
        return [arm for arm in self.trained if ARMS[arm].teacher is None]

    @property
    def taught(self) -> list[str]:
        """Those of `trained` that need the answers of another one."""
        return [arm for arm in self.trained if ARMS[arm].teacher is not None]

    @property
    def pseudo_facts(self) -> dict[str, dict]:
        """``pseudo`` of plan.json and metrics.json: teacher, prompts and mixture of each arm of `taught`."""
        facts = {}
        for arm in self.taught:
            teacher = ARMS[arm].teacher or ""
            named = {"teacher": self.same.get(teacher, teacher)}
            facts[arm] = {**named, **self.pseudo[teacher].facts, "mixture": self.mixtures[arm][1].counts()}
        return facts

    @property
    def lead(self) -> str | None:
        """See `tell.run.arms.lead_arm`."""
        return lead_arm(self.arms, self.mixtures)

    @cached_property
    def recast(self) -> dict[str, int]:
        """Recast general rows in the mixture of each arm to train that has any, repetitions included."""
        general = self.general
        if general is None or general.recast is None:
            return {}
        counts = {}
        for arm in self.trained:
            counts[arm] = int((self._general_rows(arm) >= general.source_rows).sum())
        return {arm: count for arm, count in counts.items() if count}

    def _general_rows(self, arm: str) -> np.ndarray:
        """Rows of the general table in an arm's mixture, in order, repetitions included."""
        mixture = self.mixtures[arm][1]
        return mixture.row[(np.array(mixture.sources) == GENERAL)[mixture.source]]

    @property
    def general_facts(self) -> dict | None:
        """``general`` of plan.json and findings.json."""
        if self.general is None:
            return None
        return {**self.general.facts, **({"recast": self.recast} if self.recast else {})}

    @property
    def dropped_rows(self) -> list[dict]:
        """Origin and reason of every row left out, of all sources."""
        dropped = [{"origin": d.origin, "reason": d.reason} for d in self.table.dropped]
        prompts = self.task.unlabelled.dropped if self.task.unlabelled else ()
        dropped += [{"origin": origin, "reason": reason} for origin, reason in prompts]
        return [*self.task.facts.dropped_rows, *dropped, *(self.general.dropped if self.general else [])]

    def check_arms(self) -> None:
        """Add notices for arms without rows, and for those that are one run with another.

        Raises:
            TellError: no arm is left.
        """
        notices = self.task.notices
        wanted = wanted_arms(self.task.config)
        lost = [arm for arm in trained_arms(wanted) if arm not in self.mixtures]
        if lost and not self.arms:
            raise TellError(
                "no general row is drawn, and no other arm is requested",
                where="general",
                remedy="Set a larger amount of general data: it is less than half a row.",
            )
        for arm in lost:
            notices.add(f"the arm {arm} is left out: no general row is drawn")
        for arm, other in self.same.items():
            notices.add(f"the arms {other} and {arm} are one run: they are trained on the same rows in the same order")
        for arm in wanted:
            if ARMS[arm].in_context and (adapter := ARMS[arm].adapter) in self.same:
                notices.add(f"the arm {arm} is left out: its adapter is that of {self.same[adapter]}")
        generate = self.task.config.generate
        if left := [arm for arm in self.undecided if not ARMS[arm].constrained]:
            why = "generate.closed is off" if generate.closed == "off" else "no field is closed"
            notices.add(f"left out, since {why}: {', '.join(left)}")
        if left := [arm for arm in self.undecided if ARMS[arm].constrained]:
            why = f"answers of kind {self.task.kind.name} have no schema or labels"
            why = why if generate.constrain == "off" else "generate.constrain holds for all arms"
            notices.add(f"left out, since {why}: {', '.join(left)}")

    @property
    def mixture_notices(self) -> list[str]:
        """The notices of the leading arm's mixture, and what those of other requested arms say besides."""
        lead = self.lead or "tell"
        known = list(self.mixtures[lead][1].notices)
        others = [arm for arm in trained_arms(wanted_arms(self.task.config)) if arm in self.mixtures and arm != lead]
        said = [(arm, text) for arm in others for text in self.mixtures[arm][1].notices]
        for arm, count in self.recast.items():
            rows = len(self._general_rows(arm))
            said.append((arm, f"{count:,} of {rows:,} general rows are recast into the form of the task"))
        return known + [f"{arm}: {text}" for arm, text in said if text not in known]


def prepare(task: Task, anchor: Anchor, general: General | Writer | None) -> Prepared:
    """The rows of a run within its budgets, ready to be mixed.

    Args:
        task: as from `load_task`.
        general: the rows, or a function that supplies them.

    Raises:
        TellError: no row is left to train on, or too few for ``task.shots``.
    """
    task = limit_task(task, anchor)
    table = task_table(task, anchor)
    if callable(general):
        general = general(task, table)
    if general is None or is_empty(task.config.general):
        if any(config.general.select == "similar" or config.general.recast for config in mixed_configs(task.config)):
            task.notices.add("general.select and general.recast change nothing: there are no general rows")
    else:
        general = with_known_ranking(task, table, with_recast(task, general))
    draw = None if general is None else draw_general(task.config, general, int(table.unit.sum()))
    return Prepared(task, anchor, table, general, draw, pseudo=planned_pseudo(task, table))


def check_rows(task: Task, anchor: Anchor) -> None:
    """Refuse rows too long to train on and prompts without room for an answer; the anchor is of about final length.

    Raises:
        TellError: the first such row, or no unlabelled prompt can be used.
    """
    limited = limit_task(task, anchor)
    task_table(limited, anchor)
    if students(task.config):
        usable_prompts(limited)
    check_tests(task, anchor)


def check_tests(task: Task, anchor: Anchor) -> None:
    """Refuse test rows whose prompts leave no room for an answer.

    Raises:
        TellError: the first such row.
    """
    arch = task.files.architecture
    check_prompts(task.chat, anchor, task.test, arch.max_positions, task.shots, arch.vocab)
