"""Prompts without answers, from any format that task data are read from; answers in the file are ignored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tell.data.cell_text import RowFault, unpacked
from tell.data.columns import Record, detect_layout
from tell.data.example import Example, Message
from tell.data.file_read import FileRead
from tell.data.form import PROMPT, Form
from tell.data.json_text import read_json
from tell.data.layouts import CONVERSATIONS, LAYOUTS, Layout, layout_name
from tell.data.sources import read_source
from tell.data.turns import ROLES, to_messages
from tell.errors import TellError
from tell.shown import NAMES

UNLABELLED = "pseudo"  # source of their examples
_ANSWER = "\0answer"  # a column that no file has
_OPTIONAL = ("input", "system", "history", "tools")


@dataclass(frozen=True)
class Prompts:
    """Prompts of one file.

    Attributes:
        examples: in file order, each with an empty answer.
        path: as given.
        dropped: (origin, reason) of rows without a prompt.
        tested: rows that were left out of ``examples``, being equal or nearly equal to a test row.
        notices: sentences for the user.
    """

    examples: list[Example]
    path: str
    dropped: tuple[tuple[str, str], ...] = ()
    notices: tuple[str, ...] = ()
    tested: int = 0


def load_prompts_of(source: str, columns: Mapping[str, str], form: Form | None = None) -> Prompts:
    """The prompts of a file or hub dataset.

    Args:
        source: as `tell.data.sources.load` takes it.
        columns: part to column of the task's data; they count where the file has the column of prompts.
        form: of the task's data, where prompt and answer are made of columns; the prompt's must be in the file.

    Raises:
        TellError: the file cannot be read, no column holds prompts, or no row has one.
    """
    file = FileRead()
    short, records = read_source(source, file)
    guessed: list[str] = []
    plain = [record for _, record in records]
    if form is not None:
        form = form.asking(plain, source)
        layout = Layout("+".join(form.asked), {"prompt": PROMPT, "answer": _ANSWER})
    else:
        layout = _layout(plain, columns, source)
    whole, answers = "messages" in layout.columns, 0
    examples: list[Example] = []
    dropped: list[tuple[str, str]] = []
    seen: Counter[str] = Counter()
    for number, given in records:
        record: Record = given
        origin = f"{short}:{number}"
        try:
            if form is not None:
                record = {PROMPT: form.render(record)}
                if not record[PROMPT]:
                    raise RowFault(f"has no prompt ({', '.join(form.asked)} empty)")
            if whole:
                record, answered = _asked(record, layout.columns["messages"])
            else:
                answered = False
            turns = to_messages({**record, _ANSWER: "-"}, layout, seen)[:-1]
        except RowFault as fault:
            dropped.append((origin, str(fault)))
            continue
        answers += answered
        turns.append(Message("assistant", ""))
        examples.append(Example.of(turns, source=UNLABELLED, origin=origin))
    if not examples:
        raise TellError(f"no row has a prompt; the first {dropped[0][1]}", where=source, remedy="Fix the rows.")
    names = dict.fromkeys(name for _, record in records for name in record)
    if form is not None:
        used = {*form.asked}
        told = [name for name in form.answer if name in names]
    else:
        used = set(layout.columns.values())
        answer = columns.get("answer") if columns.get("answer") in names else _answer_column(records, source)
        told = [answer] if answer in names and not whole else []
    if answers or told:
        named = "last turns" if answers else f"column {', '.join(map(repr, told))}"
        guessed.append(f"the answers ({named}) are ignored: the file counts as unlabelled")
    if others := [name for name in names if name not in used and name not in told]:
        guessed.append(f"columns not used: {', '.join(others[:NAMES])}{' ...' if len(others) > NAMES else ''}")
    notices = (*file.notices, *(f"{short}: {text}" for text in guessed))
    return Prompts(examples, source, tuple(dropped), notices)


def _layout(records: Sequence[Record], task: Mapping[str, str], where: str) -> Layout:
    """The columns of prompts: those of the task, else known ones, else the only column there is."""
    names = dict.fromkeys(name for record in records for name in record)
    lower = {name.lower(): name for name in reversed(list(names)) if name}
    found: dict[str, str] = {}
    if (main := next((part for part in ("messages", "prompt") if task.get(part) in names), None)) is not None:
        found = {part: task[part] for part in (main, *_OPTIONAL) if task.get(part) in names}
    if not found:
        for known in LAYOUTS:
            if known.prompt in lower:
                extra = next((lower[name] for name in known.inputs if name in lower), None)
                part = "messages" if known.prompt in CONVERSATIONS else "prompt"
                found = {part: lower[known.prompt]} | ({"input": extra} if extra else {})
                break
    if not found and len(names) == 1:
        found = {"prompt": next(iter(names))}
    if not found:
        shown = ", ".join(map(repr, list(names)[:NAMES]))
        name = task.get("prompt") or task.get("messages") or "prompt"
        raise TellError(
            f"has the columns {shown}, and none is known to hold prompts",
            where=where,
            remedy=f"Name its column of prompts {name}, as in the task data.",
        )
    name = layout_name({**found, "answer": _ANSWER} if "prompt" in found else found)
    return Layout(name.replace(f"/{_ANSWER}", ""), {**found, **({} if "messages" in found else {"answer": _ANSWER})})


def _answer_column(records: Sequence[tuple[int, Record]], where: str) -> str | None:
    """The column of answers that a labelled file of this kind would have."""
    try:
        return detect_layout([record for _, record in records], where=where).columns.get("answer")
    except TellError:
        return None


def _asked(record: Record, column: str) -> tuple[Record, bool]:
    """A conversation that ends with an answer to be replaced, and whether the file's own answer was taken out."""
    fault = f"has no list of turns in column {column!r}"
    turns = unpacked(record.get(column), fault, detail=False)
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        raise RowFault(fault)
    last = turns[-1]
    name = last.get("role", last.get("from"))
    answered = isinstance(name, str) and ROLES.get(name.lower()) == "assistant"
    keys = ("from", "value") if "from" in last else ("role", "content")
    asked = [*(turns[:-1] if answered else turns), dict(zip(keys, ("assistant", "-"), strict=True))]
    return {**record, column: read_json(json.dumps(asked, default=str))}, answered
