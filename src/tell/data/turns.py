"""One record of a file to the turns of a conversation: texts, roles, tool calls, and what carries loss."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tell.data.example import Message, Role
from tell.data.json_text import half_surrogate, read_json
from tell.data.layout import LABELS, REJECTED, Layout
from tell.data.parquet import BadCell

MOST_CHARACTERS = 10_000_000  # of one turn; no model reads so much, and tokenizers abort at some more

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
    "function_call": "assistant",  # LLaMA-Factory; its content is the call
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_LOSS = ("weight", "loss", "train", "training")  # OpenAI, ms-swift, axolotl
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_SHOWN = ("name", "tool_call_id")  # of a tool's turn; templates show them
_READ = {"role", "from", "content", "value", "tool_calls", "function_call", *_LOSS, *THOUGHTS, *_SHOWN}


class RowFault(Exception):
    """One row cannot become an example; ``str()`` says why, the caller knows where."""

    def __init__(self, why: str, remedy: str = "Fill in that row, or remove it.") -> None:
        self.remedy = remedy
        super().__init__(why)


class Rejected(RowFault):
    """A row that its author marked as a bad example."""


def to_messages(record: Mapping[str, Any], layout: Layout, seen: Counter[str] | None = None) -> list[Message]:
    """The conversation of one record; it ends with the assistant's answer.

    Answers that are not strings become compact JSON. ``input`` follows the prompt on a line of its own, as
    ms-swift (the paper's framework) and LLaMA-Factory join Alpaca's columns. Answers inside a prompt carry no loss, nor
    do turns of weight 0 and tool calls; a conversation ends with its last answer that carries loss.

    Args:
        seen: counts what is left out of turns, by name.

    Raises:
        RowFault: no prompt, no answer, a bad role, or a conversation that does not end with an answer.
        Rejected: the row is marked as a bad example.
    """
    columns, seen = layout.columns, Counter() if seen is None else seen
    if layout.verdict:
        _check_verdict(record.get(layout.verdict), layout.verdict)
    if "messages" in columns:
        turns = _turns(record.get(columns["messages"]), columns["messages"], seen)
        turns = turns[: _end(turns)]
    else:
        turns = _pair(record, columns, seen)
    if "system" in columns and turns[0].role != "system":
        system = as_text(record.get(columns["system"]))
        if system and not system.isspace():
            turns.insert(0, Message("system", system))
    if "tools" in columns:
        _declare(turns, record.get(columns["tools"]), columns["tools"])
    _check_turns(turns)
    return turns


def _check_verdict(value: Any, column: str) -> None:
    shown = str(value).strip().lower()
    if shown in REJECTED:
        raise Rejected(f"{column} is {shown}")


def _end(turns: list[Message]) -> int:
    """Turns up to the last answer with loss: those behind it change nothing about training."""
    if turns[-1].role != "assistant" or turns[-1].trained:
        return len(turns)
    return max((n for n, turn in enumerate(turns, 1) if turn.role == "assistant" and turn.trained), default=len(turns))


def _pair(record: Mapping[str, Any], columns: Mapping[str, str], seen: Counter[str]) -> list[Message]:
    column = columns["answer"]
    answer = record.get(column)
    if column.lower() in LABELS and isinstance(answer, list):
        answer = _one_label(answer, column)
    if type(answer) is not str and _is_messages(answer):
        answers = _turns(answer, column, seen)
    else:
        answers = [Message("assistant", as_text(answer))]
    if len(answers) == 1 and not answers[0].extra and (not answers[0].content or answers[0].content.isspace()):
        raise RowFault(f"has no answer (column {column!r} {'is empty' if column in record else 'is missing'})")
    prompt = record.get(columns["prompt"])
    if type(prompt) is not str and _is_messages(prompt):
        turns = [
            Message(t.role, t.content, t.role != "assistant", t.extra) for t in _turns(prompt, columns["prompt"], seen)
        ]
    else:
        text = as_text(prompt)
        if "input" in columns:
            extra = as_text(record.get(columns["input"]))
            if extra and not extra.isspace():
                text = f"{text}\n{extra}" if text else extra
        if not text or text.isspace():
            raise RowFault(f"has no prompt (column {columns['prompt']!r} is empty)")
        turns = [Message("user", text)]
    if "history" in columns:
        turns = [*_history(record.get(columns["history"]), columns["history"]), *turns]
    return turns + answers


def _one_label(labels: list[Any], column: str) -> Any:
    """The label in a list of annotation tools; None for an empty list."""
    if not labels:
        return None
    if len(labels) > 1 or isinstance(labels[0], (list, dict)):
        several = f"holds {len(labels)} labels" if len(labels) > 1 else "holds a span, not a label"
        raise RowFault(
            f"{several} (column {column!r})",
            "Write them as one text, the way the model should answer: billing, urgent.",
        )
    return labels[0]


def as_text(value: Any) -> str:
    """A cell as text: empty for null and NaN, dates by ISO 8601, other values than strings as compact JSON.

    Raises:
        RowFault: the cell cannot be read, or is bytes that are not UTF-8, or infinite.
    """
    if type(value) is str:
        return value
    if value is None or (isinstance(value, float) and value != value):
        return ""
    plain = _plain(value) if isinstance(value, _PLAIN) else value
    if isinstance(plain, str):
        return plain
    try:
        return json.dumps(value, ensure_ascii=False, default=_nested, allow_nan=False)
    except ValueError as error:
        raise RowFault("holds a number that is not finite") from error
    except RecursionError as error:
        raise RowFault("is nested too deeply") from error


_PLAIN = (bytes, datetime.date, datetime.time, Decimal, BadCell)


def _plain(value: Any) -> str:
    if isinstance(value, BadCell):
        raise RowFault(f"holds a cell that {value.why}")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise RowFault(f"holds bytes that are not UTF-8 (0x{value[error.start]:02x})") from error
    return format(value, "f") if isinstance(value, Decimal) else value.isoformat()


def _nested(value: Any) -> Any:
    """What JSON has no type for, inside an object or list."""
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    return _plain(value) if isinstance(value, _PLAIN) else str(value)


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
            for turn in value
        )
    )


def _turns(value: Any, column: str, seen: Counter[str]) -> list[Message]:
    if isinstance(value, str):  # a CSV cell, or a column that was serialised
        try:
            value = read_json(value)
        except ValueError as error:
            raise RowFault(f"holds no list of turns in column {column!r}") from error
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise RowFault(f"holds no list of turns in column {column!r}")
    found: set[str] = set()
    turns = [_turn(turn, number, found) for number, turn in enumerate(value, 1)]
    seen.update(found)
    return turns


def _turn(turn: Any, number: int, found: set[str]) -> Message:
    if not isinstance(turn, dict):
        raise RowFault(f"turn {number} is no object with role and content")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowFault(
            f"turn {number} has the role {name!r}; known are system, user (human), assistant (gpt), tool",
            "Rename the role, or remove the row.",
        )
    content = _content(turn.get("content", turn.get("value")), number)
    if len(turn) == 2 and ("content" in turn or "value" in turn):
        return _called(content, number) if name == "function_call" else Message(role, content)
    found.update(key for key, value in turn.items() if key not in _READ and value is not None)
    found.update(key for key in THOUGHTS if turn.get(key))
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if calls and role == "assistant":
        return Message(role, content, False, json.dumps({"tool_calls": _calls(calls, number)}, ensure_ascii=False))
    shown = {key: turn[key] for key in _SHOWN if isinstance(turn.get(key), str)} if role == "tool" else {}
    extra = json.dumps(shown, ensure_ascii=False) if shown else ""
    return Message(role, content, role != "assistant" or _has_loss(turn, number), extra)


def _has_loss(turn: Mapping[str, Any], number: int) -> bool:
    for key in _LOSS:
        value = turn.get(key)
        if key == "weight" and value is not None and value not in (0, 1):
            raise RowFault(f"turn {number} has the weight {value!r}; known are 0 and 1", "Write 0 or 1.")
        if value == 0:
            return False
    return True


def _called(content: str, number: int) -> Message:
    try:
        calls = read_json(content)
    except ValueError as error:
        raise RowFault(f"turn {number} is a function_call that is not JSON ({error})") from error
    found = _calls(calls if isinstance(calls, list) else [calls], number)
    return Message("assistant", "", False, json.dumps({"tool_calls": found}, ensure_ascii=False))


def _calls(calls: Any, number: int) -> list[dict]:
    """Tool calls as chat templates read them: arguments as an object, not as JSON text."""
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault(
                f"turn {number} has a tool call without a function's name",
                'Write {"function": {"name": ..., "arguments": {...}}}.',
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = read_json(arguments) if arguments.strip() else {}
            except ValueError as error:
                raise RowFault(f"turn {number} calls a tool with arguments that are not JSON ({error})") from error
        about = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append({**about, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}})
    return made


def _declare(turns: list[Message], value: Any, column: str) -> None:
    """Put a row's tools on its first user turn, where a chat template finds them."""
    if isinstance(value, str):
        try:
            value = read_json(value) if value.strip() else None
        except ValueError as error:
            raise RowFault(f"holds no list of tools in column {column!r} ({error})") from error
    if not value:
        return
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowFault(f"holds no list of tools in column {column!r}")
    for i, turn in enumerate(turns):
        if turn.role == "user":
            tools = json.dumps(value, ensure_ascii=False, default=_nested)
            turns[i] = Message(turn.role, turn.content, turn.trained, turn.extra, tools)
            return


def _content(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    if isinstance(content, list) and any(isinstance(part, dict) and "type" in part for part in content):
        raise RowFault(f"turn {number} holds parts that are not text")
    return as_text(content)


def _history(value: Any, column: str) -> list[Message]:
    fault = f"holds no list of [question, answer] pairs in column {column!r}"
    if isinstance(value, str):
        try:
            value = read_json(value) if value.strip() else []
        except ValueError as error:
            raise RowFault(fault) from error
    if value is not None and not isinstance(value, list | tuple):
        raise RowFault(fault)
    turns: list[Message] = []
    for pair in value or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowFault(fault)
        turns += [Message("user", as_text(pair[0])), Message("assistant", as_text(pair[1]))]
    return turns


def _check_turns(turns: list[Message]) -> None:
    last = turns[-1]
    if last.role != "assistant":
        raise RowFault(f"ends with a {last.role} turn, so there is no answer")
    if last.extra:
        raise RowFault(
            "ends with a tool call, which is not trained",
            "Write the call into content, as the model should write it, or let the row end with an answer in text.",
        )
    if not last.trained:
        raise RowFault("has no answer that carries loss (weight 0)", "Give an answer weight 1, or remove the row.")
    asked = False
    before: Message | None = None
    for number, turn in enumerate(turns, 1):
        content = turn.content
        if turn.role == "user":
            asked = True
        elif turn.role == "system" and number > 1:
            raise RowFault(f"turn {number} is a system turn; only the first may be")
        elif turn.role == "tool" and not (before and (before.role == "tool" or before.extra)):
            raise RowFault(
                f"turn {number} is a tool's, and no tool was called before it", "Add the call, or remove it."
            )
        before = turn
        if (not content or content.isspace()) and not turn.extra and turn.role != "tool":
            raise RowFault("has no answer (the last turn is empty)" if turn is last else f"turn {number} is empty")
        if (size := len(content) + len(turn.extra) + len(turn.tools)) > MOST_CHARACTERS:
            raise RowFault(f"turn {number} has {size:,} characters, more than {MOST_CHARACTERS:,}", "Cut it.")
        if not content.isascii():
            try:
                content.encode()
            except UnicodeEncodeError as error:
                raise RowFault(
                    f"turn {number} holds half of a surrogate pair (\\u{ord(content[error.start]):x})"
                ) from error
    if not asked:
        raise RowFault("has no user turn before the answer")
    _check_json(last.content)


def _check_json(answer: str) -> None:
    """Refuse an answer in JSON that escapes half of a surrogate pair, which no model can write as text."""
    if "\\u" not in answer:
        return
    try:
        half = half_surrogate(answer)
    except (ValueError, RecursionError):  # not JSON
        return
    if half:
        raise RowFault(f"has an answer in JSON with half of a surrogate pair ({half})")
