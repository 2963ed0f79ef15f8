"""Which columns hold what: detect a file's layout and turn its records into conversations."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tell.data.example import Message, Role
from tell.errors import TellError

# In order of preference; names are compared without case.
_CONVERSATIONS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("query", "response"),
    ("query", "answer"),
    ("query", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "output"),
    ("input", "output"),
    ("input", "response"),
    ("input", "answer"),
    ("text", "label"),
    ("prompt", "label"),
    ("input", "label"),
    ("sentence", "label"),
)
_INPUTS = {"instruction": ("input", "context"), "prompt": ("context",), "query": ("context",), "question": ("context",)}
_SYSTEMS = ("system", "system_prompt")
_KEYS = ("messages", "prompt", "answer", "input", "system", "history")
_ALIASES = {
    "conversations": "messages",
    "instruction": "prompt",
    "question": "prompt",
    "query": "prompt",
    "text": "prompt",
    "completion": "answer",
    "response": "answer",
    "output": "answer",
    "label": "answer",
    "context": "input",
}
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}


class RowFault(Exception):
    """One row cannot become an example; ``str()`` says why, the caller knows where."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the columns of a file mean.

    Attributes:
        name: for people, e.g. ``"prompt/completion"``.
        columns: part to column; parts are ``messages``, or ``prompt`` and ``answer``, with ``input``,
            ``system`` and ``history`` where there are such columns.
    """

    name: str
    columns: dict[str, str]

    @property
    def required(self) -> tuple[str, ...]:
        """The columns no row may lack."""
        return tuple(self.columns[part] for part in ("messages", "prompt", "answer") if part in self.columns)


def detect_layout(
    records: Sequence[Mapping[str, Any]], *, columns: str | None = None, where: str | None = None
) -> Layout:
    """Layout of a file from its column names.

    Row 1 decides what prompt and answer are; columns that only add to them (input, system, history) may
    begin in any row.

    Args:
        records: all records of the file, at least one.
        columns: names given by hand, ``"prompt=q,answer=a[,input=c][,system=s][,history=h]"`` or
            ``"messages=dialog"``; parts not named are detected.
        where: file name for messages.

    Raises:
        TellError: no known layout, or ``columns`` names a part or column that does not exist.
    """
    seen = dict.fromkeys(records[0])
    first = records[0].keys()
    for record in records:
        if record.keys() != first:
            seen.update(dict.fromkeys(record))
    given = _parse_columns(columns, list(seen), where) if columns else {}
    found: dict[str, str] | None = {}
    if not {"messages", "prompt", "answer"} & given.keys():
        found = _detect(first, seen) or _detect(seen, seen)  # the first row itself may lack its answer
    if found is None:
        names = list(seen)
        hint = "Give it a column of prompts and a column of answers."
        if len(names) > 1:
            hint = f"Name them, e.g. --columns {_quoted(f'prompt={names[0]},answer={names[1]}')}."
        raise TellError(
            f"has the columns {', '.join(map(repr, names)) or '(none)'}, and no known layout fits them",
            where=where,
            remedy=hint,
        )
    merged = {**found, **given}
    if "messages" in merged:
        merged = {part: merged[part] for part in ("messages", "system") if part in merged}
    for part in ("prompt", "answer"):
        if "messages" not in merged and part not in merged:
            raise TellError(
                f"{columns!r} names no {part} column", where="--columns", remedy=f"Add {part}=COLUMN to it."
            )
    shown = [merged[part] for part in ("system", "history", "messages", "prompt", "input", "answer") if part in merged]
    name = "/".join(shown)
    if merged.get("messages", "").lower().startswith("conversation"):
        name = f"ShareGPT {name}"
    elif merged.get("prompt", "").lower() == "instruction":
        name = f"Alpaca {name}"
    return Layout(name, merged)


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text


def _detect(first: Iterable[str], seen: Iterable[str]) -> dict[str, str] | None:
    """Parts to columns, or None where nothing fits."""
    names = {name.lower(): name for name in reversed(list(first)) if name}
    for name in _CONVERSATIONS:
        if name in names:
            found = {"messages": names[name]}
            break
    else:
        for prompt, answer in _PAIRS:
            if prompt in names and answer in names:
                found = {"prompt": names[prompt], "answer": names[answer]}
                break
        else:
            return None
    more = {name.lower(): name for name in reversed(list(seen)) if name}
    options = [("system", _SYSTEMS)]
    if "prompt" in found:
        options += [("input", _INPUTS.get(found["prompt"].lower(), ())), ("history", ("history",))]
    for part, candidates in options:
        column = next((more[name] for name in candidates if name in more), None)
        if column is not None:
            found[part] = column
    return found


def _parse_columns(text: str, names: list[str], where: str | None) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in text.split(","):
        part, equals, column = (piece.strip() for piece in item.partition("="))
        if not equals or not part or not column:
            raise TellError(
                f"{item.strip()!r} is not of the form part=column",
                where="--columns",
                remedy="Write e.g. --columns prompt=q,answer=a.",
            )
        key = _ALIASES.get(part, part)
        if key not in _KEYS:
            close = difflib.get_close_matches(part, [*_KEYS, *_ALIASES], n=1)
            raise TellError(
                f"unknown part {part!r}{f'; did you mean {close[0]}?' if close else ''}",
                where="--columns",
                remedy=f"The parts are {', '.join(_KEYS)}.",
            )
        if key in given:
            raise TellError(f"{key} is named twice in {text!r}", where="--columns", remedy="Name it once.")
        if column not in names:
            close = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TellError(
                f"there is no column {column!r} in {where or 'the data'}{hint}",
                where="--columns",
                remedy=f"The columns are {', '.join(names)}.",
            )
        given[key] = column
    if "messages" in given and {"prompt", "answer"} & given.keys():
        raise TellError(
            f"{text!r} names messages and also prompt or answer", where="--columns", remedy="Name one or the other."
        )
    return given


def check_columns(number: int, record: Mapping[str, Any], layout: Layout, first: tuple[int, Mapping[str, Any]]) -> str:
    """Why a record that lacks a required column does so: ``""`` when it has them all or only lacks its answer.

    Args:
        number: line or row of ``record``.
        first: number and record of the file's first row, to compare with.
    """
    missing = [column for column in layout.required if column not in record]
    if not missing or (missing == [layout.columns.get("answer")] and _detect(record, record) is None):
        return ""
    return (
        f"has the columns {', '.join(record) or '(none)'}, but line {first[0]} has {', '.join(first[1])}: "
        "two layouts are mixed"
    )


def to_messages(record: Mapping[str, Any], layout: Layout) -> list[Message]:
    """The conversation of one record; it ends with the assistant's answer.

    Answers that are not strings become compact JSON. ``input`` follows the prompt on a line of its own, as
    ms-swift (the paper's framework) and LLaMA-Factory join Alpaca's columns.

    Raises:
        RowFault: no prompt, no answer, a bad role, or a conversation that does not end with an answer.
    """
    columns = layout.columns
    if "messages" in columns:
        turns = _turns(record.get(columns["messages"]), columns["messages"])
    else:
        turns = _pair(record, columns)
    if "system" in columns and turns[0].role != "system":
        system = _as_text(record.get(columns["system"]))
        if system and not system.isspace():
            turns.insert(0, Message("system", system))
    _check_turns(turns)
    return turns


def _pair(record: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    answer = record.get(columns["answer"])
    if type(answer) is not str:
        if _is_messages(answer):
            answers = _turns(answer, columns["answer"])
        else:
            answers = [Message("assistant", _as_text(answer))]
    else:
        answers = [Message("assistant", answer)]
    if len(answers) == 1 and (not answers[0].content or answers[0].content.isspace()):
        state = "is empty" if columns["answer"] in record else "is missing"
        raise RowFault(f"has no answer (column {columns['answer']!r} {state})")
    prompt = record.get(columns["prompt"])
    if type(prompt) is not str and _is_messages(prompt):
        turns = _turns(prompt, columns["prompt"])
    else:
        text = prompt if type(prompt) is str else _as_text(prompt)
        if "input" in columns:
            extra = _as_text(record.get(columns["input"]))
            if extra and not extra.isspace():
                text = f"{text}\n{extra}" if text else extra
        if not text or text.isspace():
            raise RowFault(f"has no prompt (column {columns['prompt']!r} is empty)")
        turns = [Message("user", text)]
    if "history" in columns:
        turns = [*_history(record.get(columns["history"]), columns["history"]), *turns]
    return turns + answers


def _as_text(value: Any) -> str:
    if type(value) is str:
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
            for turn in value
        )
    )


def _turns(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):  # a CSV cell, or a column that was serialised
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowFault(f"holds no list of turns in column {column!r}") from error
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise RowFault(f"holds no list of turns in column {column!r}")
    turns: list[Message] = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise RowFault(f"turn {number} is no object with role and content")
        name = turn.get("role", turn.get("from"))
        role = _ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise RowFault(f"turn {number} has the role {name!r}; known are system, user (human), assistant (gpt)")
        content = turn.get("content", turn.get("value"))
        turns.append(Message(role, _content(content, number)))
    return turns


def _content(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    if content is None:
        return ""
    if isinstance(content, list) and any(isinstance(part, dict) and "type" in part for part in content):
        raise RowFault(f"turn {number} holds parts that are not text")
    return _as_text(content)


def _history(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError as error:
            raise RowFault(f"holds no list of [question, answer] pairs in column {column!r}") from error
    turns: list[Message] = []
    for pair in value or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowFault(f"holds no list of [question, answer] pairs in column {column!r}")
        turns += [Message("user", _as_text(pair[0])), Message("assistant", _as_text(pair[1]))]
    return turns


def _check_turns(turns: list[Message]) -> None:
    last = turns[-1]
    if last.role != "assistant":
        raise RowFault(f"ends with a {last.role} turn, so there is no answer")
    asked = False
    for number, turn in enumerate(turns, 1):
        content = turn.content
        if turn.role == "user":
            asked = True
        elif turn.role == "system" and number > 1:
            raise RowFault(f"turn {number} is a system turn; only the first may be")
        if not content or content.isspace():
            raise RowFault("has no answer (the last turn is empty)" if turn is last else f"turn {number} is empty")
        if not content.isascii():
            try:
                content.encode()
            except UnicodeEncodeError as error:
                raise RowFault(
                    f"turn {number} holds half of a surrogate pair (\\u{ord(content[error.start]):x})"
                ) from error
    if not asked:
        raise RowFault("has no user turn before the answer")
