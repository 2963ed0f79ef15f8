"""``--max-minutes``: what a run gives up to end in time, and in which order. No torch.

First the optional arms, then test rows, then general tokens and repetitions together. The method itself is never given
up: where even its smallest extent takes longer, the run is refused with the minutes that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tell.errors import TellError
from tell.mix.amount import Draw
from tell.names import ARMS
from tell.presets import repeat_for
from tell.rows.row_table import RowTable
from tell.run.arms import REPEAT, lead_arm, trained_arms
from tell.run.general_rows import General
from tell.run.plan import describe_plan
from tell.run.prepare import Prepared
from tell.seeds import below

OPTIONAL_ARMS = sorted((arm for arm in ARMS if ARMS[arm].optional is not None), key=lambda arm: ARMS[arm].optional or 0)
LEAST_TEST_ROWS = 60  # the interval of a share of one half is then 25 points wide
LEAST_REPEAT = 4  # but at least a quarter of the requested repetitions
HALVINGS = 7  # tolerance of the search, as a share of the way from the smallest to the requested extent


@dataclass(frozen=True)
class Extent:
    """The extent of a run: its arms, rows and repetitions.

    Attributes:
        arms: trained and scored.
        test_rows: scored.
        repeat: times each task row occurs.
        draw: the general rows; None without general data.
    """

    arms: tuple[str, ...]
    test_rows: int
    repeat: int
    draw: Draw | None

    @classmethod
    def of(cls, prepared: Prepared) -> Extent:
        """The extent that the configuration requests."""
        task = prepared.task
        arms = tuple(dict.fromkeys(task.config.eval.arms))
        return cls(arms, len(task.test), _usual_repeat(prepared), prepared.draw)

    def apply(self, prepared: Prepared) -> Prepared:
        """The run cut to this extent.

        Test rows are drawn by the run's seed and their content, so that a smaller draw is always a subset of a larger
        one, even of a draw from a draw.
        """
        task = prepared.task
        config = task.config.model_copy(deep=True)
        config.eval.arms, config.mix.repeat = self.arms, self.repeat
        keys = [below(1 << 60, config.seed, "test rows", example.hash) for example in task.test]
        kept = sorted(range(len(keys)), key=keys.__getitem__)[: self.test_rows]
        task = replace(task, config=config, test=[task.test[i] for i in sorted(kept)])
        left = min(1.0, self.repeat / _usual_repeat(prepared))  # what a search chose shrinks as the usual number does
        chosen = {arm: dict(keys) for arm, keys in prepared.chosen.items()}
        for found in chosen.values():
            if REPEAT in found:
                found[REPEAT] = max(1, round(left * int(str(found[REPEAT]))))
        whole = prepared.draw
        share = 1.0 if self.draw is None or not whole else len(self.draw) / len(whole)
        return replace(prepared, task=task, draw=self.draw, chosen=chosen, share=prepared.share * share)

    def to_dict(self) -> dict[str, Any]:
        """``fit`` of plan.json."""
        rows = 0 if self.draw is None else len(self.draw)
        return {"arms": list(self.arms), "test_rows": self.test_rows, "repeat": self.repeat, "general_rows": rows}


def _usual_repeat(prepared: Prepared) -> int:
    """Times each task row occurs without a search."""
    return prepared.task.config.mix.repeat or repeat_for(len(prepared.table))


def read_extent(data: Mapping[str, Any], draw: Draw | None) -> Extent:
    """The extent recorded in plan.json, with the draw made again."""
    short = None if draw is None else draw.first(data["general_rows"])
    return Extent(tuple(data["arms"]), data["test_rows"], data["repeat"], short)


def fit_minutes(
    prepared: Prepared, *, minutes: float, spent: float, trained: str | None = None, most_general: int | None = None
) -> tuple[Extent, list[str]]:
    """The largest extent of a run that is predicted to fit the time limit, and notices of what was given up for it.

    Args:
        minutes: ``--max-minutes``.
        spent: seconds already used.
        trained: an arm that is already trained; its time is not counted, and mixtures are no longer changed.
        most_general: most general rows, where the model wrote only as many as there was time for.

    Returns:
        The extent, and a notice for each thing given up.

    Raises:
        TellError: not even the smallest extent fits; it names the minutes that would.
    """
    room = minutes * 60 - spent
    whole = extent = Extent.of(prepared)
    if extent.draw is not None and most_general is not None:
        extent = replace(extent, draw=extent.draw.first(most_general))
    lead = lead_arm(whole.arms, dict.fromkeys(trained_arms(whole.arms)))

    def cost(of: Extent) -> float:
        return _seconds(of.apply(prepared), trained)

    for arm in OPTIONAL_ARMS:
        fewer = tuple(a for a in extent.arms if a != arm)
        # the cost last: every mixture is made for it
        if arm in extent.arms and fewer and lead in (None, *trained_arms(fewer)) and cost(extent) > room:
            extent = replace(extent, arms=fewer)
    shrinks = (_fewer_test_rows, *(() if trained else (_smaller_mixture(prepared.table, prepared.general),)))
    for shrink in shrinks:
        if cost(extent) > room:
            extent = _largest(extent, shrink, lambda of: cost(of) <= room)
    given_up = _given_up(whole, extent, minutes)
    if (least := cost(extent)) > room:
        needed = math.ceil((least * 1.1 + spent) / 60)  # predictions are right within some 10 %
        if trained is None:
            raise TellError(
                f"is too short: with the fewest test rows, general rows and repetitions the run takes {needed} minutes",
                where=f"--max-minutes {minutes:g}",
                remedy=f"Use --max-minutes {needed}, or leave it out.",
            )
        given_up.append(f"--max-minutes {minutes:g}: training was slower than predicted; {needed} minutes are likely")
    return extent, given_up


def _seconds(prepared: Prepared, trained: str | None) -> float:
    plan = describe_plan(prepared)
    return float(plan["predicted"]["seconds"] - plan["arms"].get(trained, {"seconds": 0.0})["seconds"])


def _largest(extent: Extent, shrink: Callable[[Extent, float], Extent], fits: Callable[[Extent], bool]) -> Extent:
    """The largest extent that fits, between the smallest (share 0) and the whole (1); else the smallest."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if fits(shrink(extent, middle)):
            low = middle
        else:
            high = middle
    return shrink(extent, low)


def _fewer_test_rows(extent: Extent, share: float) -> Extent:
    least = min(LEAST_TEST_ROWS, extent.test_rows)
    return replace(extent, test_rows=least + int(share * (extent.test_rows - least)))


def _smaller_mixture(table: RowTable, general: General | None) -> Callable[[Extent, float], Extent]:
    """Shrink general rows and repetitions together; the minimum is `least_general` and `LEAST_REPEAT`."""

    def shrink(extent: Extent, share: float) -> Extent:
        repeat = min(extent.repeat, max(LEAST_REPEAT, math.ceil(extent.repeat / 4)))
        repeat += round(share * (extent.repeat - repeat))
        if extent.draw is None or general is None:
            return replace(extent, repeat=repeat)
        least = least_general(table, general, extent.draw)
        rows = least + int(share * (len(extent.draw) - least))
        return replace(extent, repeat=repeat, draw=extent.draw.first(rows))

    return shrink


def least_general(table: RowTable, general: General, draw: Draw) -> int:
    """The fewest general rows that `tell` is trained with: as many tokens as the task rows, counted once."""
    reached = np.cumsum(np.asarray(general.table.unit)[draw.indices], dtype=np.int64)
    return min(len(draw), int(np.searchsorted(reached, int(table.unit.sum()))) + 1)


def _given_up(whole: Extent, extent: Extent, minutes: float) -> list[str]:
    flag = f"--max-minutes {minutes:g}"
    notices = []
    if lost := [arm for arm in whole.arms if arm not in extent.arms]:
        notices.append(f"{flag}: without the arms {', '.join(lost)}")
    if extent.test_rows < whole.test_rows:
        notices.append(f"{flag}: {extent.test_rows:,} of {whole.test_rows:,} test rows are scored")
    if whole.draw is not None and extent.draw is not None and len(extent.draw) < len(whole.draw):
        notices.append(f"{flag}: {len(extent.draw):,} of {len(whole.draw):,} general rows are mixed in")
    if extent.repeat < whole.repeat:
        notices.append(f"{flag}: task rows occur {extent.repeat} times instead of {whole.repeat}")
    return notices
