"""Constrained answers of a run: the constraint of its task, checked before training, and the grammar. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tell.arm import CONSTRAINTS
from tell.config import Config
from tell.data.constraint import Constraint, check_choice
from tell.data.example import Example
from tell.data.kind import Kind
from tell.errors import TellError
from tell.folder import RunFolder
from tell.names import ARMS
from tell.shown import brief

if TYPE_CHECKING:
    from tell.decode.grammar import Grammar, Mask
    from tell.run.session import Session
    from tell.run.task import Task

REFUSED_SHOWN = 3


def constrains(config: Config, arm: str) -> bool:
    """Whether the answers of an arm are constrained, where the task has anything to constrain them to."""
    return ARMS[arm].constrained or config.generate.constrain != "off"


def any_constrained(config: Config, kind: str, arms: Iterable[str]) -> bool:
    """Whether some arm's answers to a task of that kind are constrained."""
    return kind in CONSTRAINTS and any(constrains(config, arm) for arm in arms)


def own_alone(config: Config, task: Task) -> bool:
    """Whether only our own engine can answer: closed fields are decided, or answers constrained."""
    return task.decides or any_constrained(config, task.kind.name, config.eval.arms)


def task_constraint(task: Task) -> Constraint | None:
    """The constraint of the task's answers; None where no arm of the run is constrained.

    Raises:
        TellError: the answers have no one order of keys, or ``generate.constrain`` is for another kind of task.
    """
    check_choice(task.config.generate.constrain, task.kind.name)
    if not any_constrained(task.config, task.kind.name, task.config.eval.arms):
        return None
    found = Constraint.of(task.kind, task.train)
    if found is None:
        return None
    constraint, notices = found
    for text in notices:
        task.notices.add(text)
    return constraint


def check_constraint(task: Task) -> None:
    """Refuse a schema that a grammar cannot follow, and name the references that the grammar refuses.

    Raises:
        TellError: it cannot, or refuses all training references.
    """
    constraint = task_constraint(task)
    if constraint is None:
        return
    grammar = compiled(task, constraint)
    for what, rows in (("training", task.train), ("test", task.test)):
        faults = [(row.origin, fault) for row in rows if (fault := grammar.fault(row.answer.strip()))]
        if not faults:
            continue
        listed = "; ".join(f"{origin}: {fault}" for origin, fault in faults[:REFUSED_SHOWN])
        more = f"; and {len(faults) - REFUSED_SHOWN:,} more" if len(faults) > REFUSED_SHOWN else ""
        text = f"{len(faults):,} of {len(rows):,} {what} references cannot be constrained answers: {listed}{more}"
        if what == "training" and len(faults) == len(rows):
            raise TellError(text, where="generate.constrain", remedy="Write the answers as the schema has them.")
        task.notices.add(text)
    penalty = task.config.generate.repetition_penalty
    if penalty != 1:
        task.notices.add(f"constrained answers are decoded without the repetition penalty of {penalty:g}")


def compiled(task: Task, constraint: Constraint) -> Grammar:
    """The grammar of a constraint for the task's tokenizer."""
    from tell.decode.grammar import Grammars

    return Grammars(task.chat).compile(constraint)


def session_grammar(session: Session, constraint: Constraint | None) -> Grammar | None:
    """The grammar of a constraint; the session's vocabulary is read once while its model is loaded."""
    from tell.decode.grammar import Grammars
    from tell.run.memo import once

    if constraint is None:
        return None
    chat = session.chat
    grammars: Grammars = once(session.model, ("grammars", chat.fingerprint), lambda: Grammars(chat))
    return grammars.compile(constraint)


def kept_constraint(folder: RunFolder, kind: Kind) -> Constraint:
    """The constraint of a finished run; by its schema or labels alone where no arm of the run was constrained.

    Raises:
        TellError: the task is of a kind without a constraint, or the file is damaged.
    """
    if folder.constraint.exists():
        return folder.read_as(folder.constraint, Constraint)
    none: list[Example] = []  # the run kept the schema, not how its references are written
    found = Constraint.of(kind, none)
    if found is None:
        what = f"answers of kind {kind.name} have no schema or labels that they could be constrained to"
        raise TellError(what, where=str(folder.root), remedy="Leave out the constraint.")
    constraint = found[0]
    return constraint if constraint.json_schema is None else Constraint.of_schema(constraint.json_schema)


def check_masks(masks: Sequence[Mask], origins: Sequence[str]) -> None:
    """Refuse answers whose grammar grew too complex while they were decoded.

    Args:
        origins: of the rows of the masks.

    Raises:
        TellError: the first such row.
    """
    for mask, origin in zip(masks, origins, strict=True):
        if mask.failed:
            what = f"the grammar gives up on the answer ({brief(mask.failed, 120)})"
            raise TellError(what, where=origin, remedy="Simplify the schema, or use generate.constrain=off.")
