"""Which columns of a file hold what."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    ("text", "label_text"),  # before label, which is its number
    ("text", "label"),
    ("text", "labels"),
    ("prompt", "label"),
    ("input", "label"),
    ("sentence", "label"),
)
_INPUTS = {"instruction": ("input", "context"), "prompt": ("context",), "query": ("context",), "question": ("context",)}
_SYSTEMS = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_KEYS = ("messages", "prompt", "answer", "input", "system", "history", "tools")
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
LABELS = ("label", "labels", "label_text", "accept")
"""Answer columns in which annotation tools write a list of labels."""
# A column that says which rows are good examples, by its values: KTO's (TRL, ms-swift; LLaMA-Factory) and Prodigy's.
_VERDICTS = {
    "label": {"true", "false"},
    "kto_tag": {"true", "false"},
    "answer": {"accept", "reject", "ignore"},
}
REJECTED = frozenset({"false", "0", "0.0", "reject", "ignore"})
"""Values of a verdict column, as texts in lower case, that mark a bad example."""
# Columns that belong to the prompt: a row without them asks something else.
_PROMPTS = {"instruction", "prompt", "query", "question", "input", "text", "sentence"}
_MATERIAL = re.compile(
    r"passage|context|article|documents?|paragraph|story|background|premise|hypothesis|choices|options|candidates"
    r"|(sentence|text|question|choice|option|passage|document)[_ ]?[1-9a-e]|opa|opb|opc|opd|[a-e]",
    re.IGNORECASE,
)
_FIRST = ("passage", "context", "article", "document", "paragraph", "story", "background")  # read before the question
_ANSWERS = (
    "accept",
    "answer",
    "answerkey",
    "answer_key",
    "answers",
    "label",
    "label_text",
    "labels",
    "output",
    "completion",
    "response",
    "target",
    "class",
)
_IDS = re.compile(
    r"_.*|unnamed.*|(.*[_ ])?(id|ids|idx|index|uid|uuid|guid|key|hash|nr|no|number)|.*[a-z]I[dD]s?", re.ASCII
)
REPEATS = 0.9  # share of cells that hold the prompt, from which on a column repeats it
SHOWN = 8  # names in one message


@dataclass(frozen=True, slots=True)
class Layout:
    """What the columns of a file mean.

    Attributes:
        name: for people, e.g. ``"prompt/completion"``.
        columns: part to column; parts are ``messages``, or ``prompt`` and ``answer``, with ``input``,
            ``system``, ``history`` and ``tools`` where there are such columns.
        unused: the other columns, without ids and empty ones.
        verdict: the column that marks bad examples, None where there is none.
    """

    name: str
    columns: dict[str, str]
    unused: tuple[str, ...] = ()
    verdict: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """The columns no row may lack."""
        return tuple(self.columns[part] for part in ("messages", "prompt", "answer") if part in self.columns)


def detect_layout(
    records: Sequence[Mapping[str, Any]],
    *,
    columns: str | None = None,
    where: str | None = None,
    flag: str = "--columns",
) -> Layout:
    """Layout of a file from its column names.

    Row 1 decides what prompt and answer are; columns that only add to them (input, system, history) may
    begin in any row.

    Args:
        records: all records of the file, at least one.
        columns: names given by hand, ``"prompt=q,answer=a[,input=c][,system=s][,history=h][,tools=t]"`` or
            ``"messages=dialog"``; parts not named are detected.
        where: file name for messages.
        flag: by which ``columns`` are given.

    Raises:
        TellError: no known layout, columns of the prompt that would be left out, or ``columns`` names a part or column
            that does not exist.
    """
    seen = dict.fromkeys(records[0])
    first = records[0].keys()
    for record in records:
        if record.keys() != first:
            seen.update(dict.fromkeys(record))
    given = _parse_columns(columns, list(seen), where, flag) if columns else {}
    found: dict[str, str] | None = {}
    if not {"messages", "prompt", "answer"} & given.keys():
        found = _detect(first, seen) or _detect(seen, seen)  # the first row itself may lack its answer
    if found is None:
        names = list(seen)
        raise TellError(
            f"has the columns {_listed(names)}, and no known layout fits them",
            where=where,
            remedy=_suggestion(records, names, flag),
        )
    merged = {**found, **given}
    if "messages" in merged:
        merged = {part: merged[part] for part in ("messages", "system", "tools") if part in merged}
    for part in ("prompt", "answer"):
        if "messages" not in merged and part not in merged:
            raise TellError(f"{columns!r} names no {part} column", where=flag, remedy=f"Add {part}=COLUMN to it.")
    parts = ("system", "history", "messages", "prompt", "input", "answer", "tools")
    shown = [merged[part] for part in parts if part in merged]
    name = "/".join(shown)
    if merged.get("messages", "").lower().startswith("conversation"):
        name = f"ShareGPT {name}"
    elif merged.get("prompt", "").lower() == "instruction":
        name = f"Alpaca {name}"
    others = [column for column in seen if column not in merged.values()]
    verdict = next((c for c in others if _is_verdict(records, c) or _is_binary_verdict(records, c, merged)), None)
    others = [column for column in others if column != verdict]
    if "prompt" in merged and "prompt" not in given:
        _refuse_lost(records, merged, others, where, flag)
    head = records[:1000]
    unused = [c for c in others if not _is_id(c) and any(r.get(c) not in (None, "", []) for r in head)]
    return Layout(name, merged, tuple(unused), verdict)


def _is_verdict(records: Sequence[Mapping[str, Any]], column: str) -> bool:
    values = _values(records, column) if column in _VERDICTS else set()
    return bool(values) and values <= _VERDICTS[column]


def _is_binary_verdict(records: Sequence[Mapping[str, Any]], column: str, columns: Mapping[str, str]) -> bool:
    """Whether a column ``label`` or ``kto_tag`` of 0 and 1 is a verdict, and not the number of the answer's class."""
    values = _values(records, column) if "true" in _VERDICTS.get(column, ()) else set()
    answer = columns.get("answer", "")
    if not values or not values <= {"0", "1", "0.0", "1.0"} or answer.lower() in LABELS:
        return False
    pairs = {(str(record.get(answer)), str(record.get(column))) for record in records}
    answers = {text for text, _ in pairs}
    return not answer or len(pairs) > len(answers) or 2 * len(answers) > len(records)


def _values(records: Sequence[Mapping[str, Any]], column: str) -> set[str]:
    cells = (record.get(column) for record in records)
    return {str(cell).strip().lower() for cell in cells if cell is not None and cell == cell}  # neither null nor NaN


def _is_id(column: str) -> bool:
    return not column or bool(_IDS.fullmatch(column) or _IDS.fullmatch(column.lower()))


def _refuse_lost(
    records: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    others: Sequence[str],
    where: str | None,
    flag: str,
) -> None:
    """Refuse to leave out columns that belong to the prompt, unless they repeat it, as Alpaca's ``text`` does."""
    prompt, answer = columns["prompt"], columns["answer"]
    lost = [c for c in others if c.lower() in _PROMPTS or _MATERIAL.fullmatch(c)]
    whole = [record for record in records if prompt in record and answer in record]  # others are another layout's
    lost = [c for c in lost if _adds([(record.get(c), record[prompt]) for record in whole])]
    if len(lost) == 1 and len(lost[0]) == 1:
        lost = []  # one letter alone may be anything
    if not lost:
        return
    plain = _quoted(f"prompt={prompt},answer={answer}")
    joined = f"Write {'it' if len(lost) == 1 else 'them'} into the column of prompts"
    if len(lost) == 1 and "input" not in columns and not isinstance(records[0].get(lost[0]), (list, dict)):
        first, second = (prompt, lost[0]) if lost[0].lower() not in _FIRST else (lost[0], prompt)
        joined = f"Give {flag} {_quoted(f'prompt={first},input={second},answer={answer}')} to join them"
    raise TellError(
        f"has {_listed(lost)} beside the prompt {prompt!r}, which would be left out",
        where=where,
        remedy=f"{joined}, or give {flag} {plain} to leave {'it' if len(lost) == 1 else 'them'} out.",
    )


def _adds(cells: Sequence[tuple[Any, Any]]) -> bool:
    """Whether a column, in pairs with the prompt, says more than the prompt in other clothes."""
    full = [(v, p) for v, p in cells if v not in (None, "") and not isinstance(v, bool) and str(v).strip()]
    repeats = sum(isinstance(v, str) and isinstance(p, str) and p.strip() in v for v, p in full)
    return repeats < REPEATS * len(full)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(map(repr, names[:SHOWN])) or '(none)'}{more}"


def _suggestion(records: Sequence[Mapping[str, Any]], names: Sequence[str], flag: str) -> str:
    """The remedy for unknown columns: which of them might be prompt and answer, ids and empty ones left out."""
    head = records[:100]
    usable = [
        n
        for n in names
        if (n.lower() in _ANSWERS or not _is_id(n))
        and not _is_verdict(records, n)
        and any(record.get(n) not in (None, "") for record in head)
    ]
    if len(usable) < 2:
        return "Give it a column of prompts and a column of answers."
    answer = next((n for known in _ANSWERS for n in usable if n.lower() == known), None)
    others = [n for n in usable if n != answer]
    asked = [n for n in others if n == others[0] or n.lower() in _PROMPTS or _MATERIAL.fullmatch(n)]
    if len(asked) > 2:
        return f"Write {_listed(asked)} into one column named prompt, and the answer into one named completion."
    asked.sort(key=lambda n: n.lower() not in _FIRST)
    answer = answer or next(n for n in usable if n != asked[0])
    second = f"input={asked[1]}," if len(asked) == 2 and asked[1] != answer else ""
    return f"Name them, e.g. {flag} {_quoted(f'prompt={asked[0]},{second}answer={answer}')}."


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
    options = [("system", _SYSTEMS), ("tools", _TOOLS)]
    if "prompt" in found:
        options += [("input", _INPUTS.get(found["prompt"].lower(), ())), ("history", ("history",))]
    for part, candidates in options:
        column = next((more[name] for name in candidates if name in more), None)
        if column is not None:
            found[part] = column
    return found


def _parse_columns(text: str, names: list[str], where: str | None, flag: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in text.split(","):
        part, equals, column = (piece.strip() for piece in item.partition("="))
        if not equals or not part or not column:
            raise TellError(
                f"{item.strip()!r} is not of the form part=column",
                where=flag,
                remedy=f"Write e.g. {flag} prompt=q,answer=a.",
            )
        key = _ALIASES.get(part, part)
        if key not in _KEYS:
            close = difflib.get_close_matches(part, [*_KEYS, *_ALIASES], n=1)
            raise TellError(
                f"unknown part {part!r}{f'; did you mean {close[0]}?' if close else ''}",
                where=flag,
                remedy=f"The parts are {', '.join(_KEYS)}.",
            )
        if key in given:
            raise TellError(f"{key} is named twice in {text!r}", where=flag, remedy="Name it once.")
        if column not in names:
            close = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TellError(
                f"there is no column {column!r} in {where or 'the data'}{hint}",
                where=flag,
                remedy=f"The columns are {_listed(names)}.",
            )
        given[key] = column
    if "messages" in given and {"prompt", "answer"} & given.keys():
        raise TellError(
            f"{text!r} names messages and also prompt or answer", where=flag, remedy="Name one or the other."
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
