"""Pseudo-labelled rows of a run: unlabelled prompts of the task, answered by a trained arm and the readout. No torch.

Pseudo-labels: Lee 2013, *Pseudo-Label*; here each row's loss has the readout's probability as its weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tell.anchor.anchor import Anchor
from tell.config import Config
from tell.data.example import Example, Message
from tell.data.overlap import find_overlap
from tell.errors import TellError
from tell.mix.mixture import PSEUDO
from tell.names import ARMS
from tell.rows.row_table import RowTable
from tell.rows.tokenize import tokenize
from tell.run.arms import arm_config, trained_arms, wanted_arms
from tell.run.task import Task
from tell.seeds import permutation

LEAST_WEIGHT = 1e-6  # of six digits in files


@dataclass(frozen=True)
class Pseudo:
    """Rows that one trained arm, the teacher, has answered.

    Attributes:
        table: of rows whose answer is valid, with their weights.
        wanted: prompts to answer.
        prompts: those of the user's file; None: the model writes them.
        facts: ``pseudo`` of metrics.json and plan.json.
        estimated: they have yet to be answered; ``table`` has lengths alone.
    """

    table: RowTable
    wanted: int
    prompts: Sequence[Example] | None = None
    facts: dict = field(default_factory=dict)
    estimated: bool = False


def students(config: Config) -> dict[str, list[str]]:
    """The arms of a run with pseudo-labelled rows, by their teacher."""
    found: dict[str, list[str]] = {}
    for arm in trained_arms(wanted_arms(config)):
        if (teacher := ARMS[arm].teacher) is not None and arm_config(config, arm).mix.pseudo:
            found.setdefault(teacher, []).append(arm)
    return found


def usable_prompts(task: Task) -> list[Example] | None:
    """The prompts of the user's file in a seeded order, without copies; None where no file is given.

    Args:
        task: with the rows of its budget.

    Raises:
        TellError: none is left.
    """
    given = task.unlabelled
    if given is None:
        return None
    examples = given.examples
    known = find_overlap(examples, [*task.train, *task.validation]).indices
    seen: set[tuple[str, ...]] = set()
    kept: list[Example] = []
    for i, example in enumerate(examples):
        key = tuple(turn.content for turn in example.prompt)
        if i not in known and key not in seen:
            kept.append(example)
            seen.add(key)
    copies = {
        "equal or nearly equal a test row": given.tested,
        "equal or nearly equal a training or validation row": len(known),
        "occur before": len(examples) - len(known) - len(kept),
    }
    why = ", ".join(f"{count:,} {reason}" for reason, count in copies.items() if count)
    total = len(examples) + given.tested
    if not kept:
        raise TellError(
            f"none of the {total:,} unlabelled prompts can be used: {why}",
            where=given.path,
            remedy="Give prompts that are neither test nor training rows, or none: the model then writes some.",
        )
    if why:
        task.notices.add(f"{given.path}: of {total:,} unlabelled prompts are left out: {why}")
    return [kept[int(i)] for i in permutation(len(kept), task.config.seed, PSEUDO)]


def planned_pseudo(task: Task, table: RowTable) -> dict[str, Pseudo]:
    """Estimates of the pseudo-labelled rows of a run, by teacher, and notices about their number.

    Args:
        task: with the rows of its budget.
        table: its rows.

    Raises:
        TellError: no prompt of the user's file can be used.
    """
    config, taught = task.config, students(task.config)
    if not taught:
        if task.unlabelled is not None or config.mix.pseudo:
            key = "task.unlabelled" if task.unlabelled is not None else "mix.pseudo"
            named = ", ".join(arm for arm in ARMS if ARMS[arm].teacher)
            task.notices.add(f"{key} is not used: no arm with pseudo-labelled rows is requested ({named})")
        return {}
    prompts, found = usable_prompts(task), {}
    for teacher, arms in taught.items():
        amount = max(arm_config(config, arm).mix.pseudo for arm in arms)
        wanted = max(1, round(amount * len(table)))
        if prompts is not None and len(prompts) < wanted:
            task.notices.add(
                f"{len(prompts):,} unlabelled prompts can be used, fewer than the {wanted:,} requested "
                f"({amount:g} per task row)"
            )
            wanted = len(prompts)
        source = "written by the model" if task.unlabelled is None else task.unlabelled.path
        facts = {"source": source, "prompts": wanted, "estimated": True}
        chosen = None if prompts is None else prompts[:wanted]
        found[teacher] = Pseudo(_estimated(table, wanted, teacher), wanted, chosen, facts, estimated=True)
    return found


def _estimated(table: RowTable, rows: int, teacher: str) -> RowTable:
    """So many rows of the lengths of the task's, without tokens."""
    like = np.arange(rows) % len(table)
    return RowTable(
        source=PSEUDO,
        hashes=np.array([f"{teacher[:4]}{i:012x}" for i in range(rows)], dtype="U16"),
        origins=np.array(["unlabelled"] * rows, dtype=str),
        tokens=np.asarray(table.tokens)[like],
        trained=np.asarray(table.trained)[like],
        unit=np.asarray(table.unit)[like],
        ids=np.zeros(0, np.int32),
        mask=np.zeros(0, bool),
        starts=np.zeros(rows + 1, np.int64),
    )


def labelled(task: Task, anchor: Anchor, rows: Sequence[Mapping], planned: Pseudo) -> Pseudo:
    """The rows of ``pseudo/<teacher>.jsonl`` as they are trained on.

    Args:
        rows: as `tell.run.teach` writes them.
        planned: what they were estimated to be.
    """
    examples, weights = [], {}
    for row in rows:
        if row["why"] is None:
            example = Example.of(
                (*(Message(**turn) for turn in row["prompt"]), Message("assistant", row["answer"])),
                source=PSEUDO,
                origin=row["origin"],
            )
            examples.append(example)
            weights[example.hash] = max(LEAST_WEIGHT, float(row["weight"]))
    rules = replace(task.rules, too_long="drop", nothing_to_train="drop", misfit="drop")
    table = tokenize(examples, task.chat, source=PSEUDO, anchor=anchor, rules=rules, unit=task.unit)
    table.weights = np.array([weights[str(key)] for key in table.hashes])
    lost = Counter(row["why"].partition(":")[0] for row in rows if row["why"] is not None)
    lost.update(dropped.reason for dropped in table.dropped)
    facts = {
        "source": planned.facts["source"],
        "prompts": len(rows),
        "kept": len(table),
        "left_out": dict(lost.most_common()),
        "weight": round(float(table.weights.mean()), 6) if len(table) else None,
        "weighed_by": dict(Counter(row["by"] for row in rows if row["why"] is None)),
    }
    return replace(planned, table=table, facts=facts, estimated=False)
