"""Turns of a conversation from one record of a file: roles, tool calls, and which turns carry loss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from tell.data.cell_text import Rejected, RowFault, as_json, as_text, is_blank, unpacked
from tell.data.example import Message, Role
from tell.data.json_text import half_surrogate
from tell.data.layouts import LABELS, RAW, REJECTED, Layout

Record = Mapping[str, object]

MOST_CHARACTERS = 10_000_000  # of one turn; beyond any model's context, and tokenizers crash on longer texts

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    "function_call": "assistant",  # LLaMA-Factory; its content is the call
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""Roles of published formats."""
_LOSS = ("weight", "loss", "train", "training")  # OpenAI, ms-swift, axolotl
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_SHOWN = ("name", "tool_call_id")  # keys of a tool's turn that templates show
SPANS = 'Write the labels alone: ["billing", "urgent"].'
_READ = {"role", "from", "content", "value", "tool_calls", "function_call", *_LOSS, *THOUGHTS, *_SHOWN}


def to_messages(record: Record, layout: Layout, seen: Counter[str] | None = None) -> list[Message]:
    """The conversation of one record; it ends with the assistant's answer. A raw text is one assistant's turn.

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
    if layout.verdict and (shown := str(record.get(layout.verdict)).strip().lower()) in REJECTED:
        raise Rejected(f"{layout.verdict} is {shown}")
    if RAW in columns:
        turns = [Message("assistant", as_text(record.get(columns[RAW])))]
        if is_blank(turns[0].content):
            raise RowFault(f"has no text (column {columns[RAW]!r} is empty)")
        _check_text(turns[0], 1)
        return turns
    if "messages" in columns:
        turns = _turns(record.get(columns["messages"]), columns["messages"], seen)
        turns = turns[: _end(turns)]
    else:
        turns = _pair(record, columns, seen, layout.lists)
    if "system" in columns and turns[0].role != "system":
        system = as_text(record.get(columns["system"]))
        if not is_blank(system):
            turns.insert(0, Message("system", system))
    if "tools" in columns:
        _declare(turns, record.get(columns["tools"]), columns["tools"])
    _check_turns(turns)
    return turns


def _end(turns: list[Message]) -> int:
    """Turns up to the last answer with loss, since later ones do not affect training."""
    if turns[-1].role != "assistant" or turns[-1].trained:
        return len(turns)
    return max((n for n, turn in enumerate(turns, 1) if turn.role == "assistant" and turn.trained), default=len(turns))


def _pair(record: Record, columns: Mapping[str, str], seen: Counter[str], lists: bool) -> list[Message]:
    column = columns["answer"]
    answer = record.get(column)
    if lists and answer is not None:
        answer = _labels(answer, column)
    elif column.lower() in LABELS and isinstance(answer, list):
        answer = _one_label(answer, column)
    answers = _turns(answer, column, seen) if _is_messages(answer) else [Message("assistant", as_text(answer))]
    if len(answers) == 1 and not answers[0].extra and is_blank(answers[0].content):
        raise RowFault(f"has no answer (column {column!r} {'is empty' if column in record else 'is missing'})")
    prompt = record.get(columns["prompt"])
    if _is_messages(prompt):
        asked = _turns(prompt, columns["prompt"], seen)
        turns = [Message(t.role, t.content, t.role != "assistant", t.extra) for t in asked]
    else:
        text = as_text(prompt)
        if "input" in columns:
            extra = as_text(record.get(columns["input"]))
            if not is_blank(extra):
                text = f"{text}\n{extra}" if text else extra
        if is_blank(text):
            raise RowFault(f"has no prompt (column {columns['prompt']!r} is empty)")
        turns = [Message("user", text)]
    if "history" in columns:
        turns = [*_history(record.get(columns["history"]), columns["history"]), *turns]
    return turns + answers


def _labels(answer: object, column: str) -> object:
    """The labels of a row as a list, in a file of such lists; texts that are empty stay no answer."""
    labels = answer if isinstance(answer, list) else [answer] if as_text(answer).strip() else None
    if labels and any(isinstance(label, (list, dict)) for label in labels):
        raise RowFault(f"has spans, not labels (column {column!r})", SPANS)
    return labels


def _one_label(labels: list[object], column: str) -> object:
    """The label in a list of annotation tools, in a file whose rows have one each; None for an empty list."""
    if any(isinstance(label, (list, dict)) for label in labels):
        raise RowFault(f"has a span, not a label (column {column!r})", SPANS)
    return labels[0] if labels else None


def _is_messages(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return False
    return all({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys() for turn in value)


def _turns(value: object, column: str, seen: Counter[str]) -> list[Message]:
    fault = f"has no list of turns in column {column!r}"
    value = unpacked(value, fault, detail=False)
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise RowFault(fault)
    found: set[str] = set()
    turns = [_turn(turn, number, found) for number, turn in enumerate(value, 1)]
    seen.update(found)
    return turns


def _turn(turn: object, number: int, found: set[str]) -> Message:
    """One turn; unused keys are added to ``found``."""
    if not isinstance(turn, dict):
        raise RowFault(f"turn {number} is not an object with role and content")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        what = f"turn {number} has the role {name!r}; known are system, user (human), assistant (gpt), tool"
        raise RowFault(what, "Rename the role, or remove the row.")
    content = _content(turn.get("content", turn.get("value")), number)
    if len(turn) == 2 and ("content" in turn or "value" in turn):
        if name != "function_call":
            return Message(role, content)
        call = unpacked(content, f"turn {number} is a function_call that is not JSON")
        return Message(role, "", False, _calls(call, number))
    found.update(key for key, value in turn.items() if key not in _READ and value is not None)
    found.update(key for key in THOUGHTS if turn.get(key))
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if calls and role == "assistant":
        return Message(role, content, False, _calls(calls, number))
    shown = {key: turn[key] for key in _SHOWN if isinstance(turn.get(key), str)} if role == "tool" else {}
    extra = json.dumps(shown, ensure_ascii=False) if shown else ""
    return Message(role, content, role != "assistant" or _has_loss(turn, number), extra)


def _has_loss(turn: Record, number: int) -> bool:
    for key in _LOSS:
        value = turn.get(key)
        if key == "weight" and value is not None and value not in (0, 1):
            raise RowFault(f"turn {number} has the weight {value!r}; known are 0 and 1", "Write 0 or 1.")
        if value == 0:
            return False
    return True


def _calls(calls: object, number: int) -> str:
    """Tool calls as chat templates read them, in JSON: arguments as an object, not as text."""
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        named = call if isinstance(call, dict) else {}
        function = named.get("function") or named
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            remedy = 'Write {"function": {"name": ..., "arguments": {...}}}.'
            raise RowFault(f"turn {number} has a tool call without a function's name", remedy)
        fault = f"turn {number} calls a tool with arguments that are not JSON"
        arguments = unpacked(function.get("arguments"), fault) or {}
        about = {"id": named["id"]} if isinstance(named.get("id"), str) else {}
        made.append({**about, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return json.dumps({"tool_calls": made}, ensure_ascii=False)


def _declare(turns: list[Message], value: object, column: str) -> None:
    """Put a row's tools on its first user turn, where a chat template finds them."""
    fault = f"has no list of tools in column {column!r}"
    value = unpacked(value, fault)
    if not value:
        return
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowFault(fault)
    for i, turn in enumerate(turns):
        if turn.role == "user":
            tools = json.dumps(value, ensure_ascii=False, default=as_json)
            turns[i] = Message(turn.role, turn.content, turn.trained, turn.extra, tools)
            return


def _content(content: object, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    if isinstance(content, list) and any(isinstance(part, dict) and "type" in part for part in content):
        raise RowFault(f"turn {number} has parts that are not text")
    return as_text(content)


def _history(value: object, column: str) -> list[Message]:
    fault = f"has no list of [question, answer] pairs in column {column!r}"
    value = unpacked(value, fault, detail=False)
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
        remedy = "Write the call into content, as the model should write it, or let the row end with an answer in text."
        raise RowFault("ends with a tool call, which is not trained", remedy)
    if not last.trained:
        raise RowFault("has no answer that carries loss (weight 0)", "Give an answer weight 1, or remove the row.")
    asked, before = False, None
    for number, turn in enumerate(turns, 1):
        asked |= turn.role == "user"
        if turn.role == "system" and number > 1:
            raise RowFault(f"turn {number} is a system turn; only the first may be")
        if turn.role == "tool" and not (before and (before.role == "tool" or before.extra)):
            what = f"turn {number} is a tool's, and no tool was called before it"
            raise RowFault(what, "Add the call, or remove it.")
        before = turn
        if is_blank(turn.content) and not turn.extra and turn.role != "tool":
            raise RowFault("has no answer (the last turn is empty)" if turn is last else f"turn {number} is empty")
        _check_text(turn, number)
    if not asked:
        raise RowFault("has no user turn before the answer")
    _check_json(last.content)


def _check_text(turn: Message, number: int) -> None:
    if (size := len(turn.content) + len(turn.extra) + len(turn.tools)) > MOST_CHARACTERS:
        raise RowFault(f"turn {number} has {size:,} characters, more than {MOST_CHARACTERS:,}", "Cut it.")
    if not turn.content.isascii():
        try:
            turn.content.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(turn.content[error.start]):x}"
            raise RowFault(f"turn {number} contains half of a surrogate pair ({half})") from error


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
