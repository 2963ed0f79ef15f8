"""The layout of a file: detected from its column names, or from the columns the user names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tell.data.layouts import ALIASES, LABELS, PARTS, PROMPTS, VERDICTS, Layout, find_columns, layout_name
from tell.errors import TellError, did_you_mean
from tell.shown import listed

Record = Mapping[str, object]

# Columns that belong to the prompt although no layout reads them: without them the question changes.
_MATERIAL = re.compile(
    r"passage|context|article|documents?|paragraph|story|background|premise|hypothesis|choices|options|candidates"
    r"|(sentence|text|question|choice|option|passage|document)[_ ]?[1-9a-e]|opa|opb|opc|opd|[a-e]",
    re.IGNORECASE,
)
_FIRST = ("passage", "context", "article", "document", "paragraph", "story", "background")  # read before the question
# Columns that are suggested as the answer, the likeliest first.
_ANSWERS = (
    *("accept", "answer", "answerkey", "answer_key", "answers", "label", "label_text", "labels", "output"),
    *("completion", "response", "target", "class"),
)
_IDS = re.compile(
    r"_.*|unnamed.*|(.*[_ ])?(id|ids|idx|index|uid|uuid|guid|key|hash|nr|no|number)|.*[a-z]I[dD]s?", re.ASCII
)
REPEATS = 0.9  # a column repeats the prompt if at least this share of its cells contain it


def detect_layout(
    records: Sequence[Record],
    *,
    columns: str | None = None,
    where: str | None = None,
    flag: str = "--columns",
    lists: bool = False,
) -> Layout:
    """Layout of a file from its column names.

    Row 1 decides which columns are prompt and answer; columns that only add to them (input, system, history) may
    begin in any row.

    Args:
        records: all records of the file, at least one.
        columns: names given by the user, ``"prompt=q,answer=a[,input=c][,system=s][,history=h][,tools=t]"`` or
            ``"messages=dialog"``; parts that are not named are detected.
        where: file name for messages.
        flag: the option that ``columns`` comes from.
        lists: a column of lists of labels is one even where no row has several.

    Raises:
        TellError: no known layout, columns of the prompt that would be left out, or ``columns`` names a part or column
            that does not exist.
    """
    first = records[0]
    seen = dict.fromkeys(first)
    for record in records:
        if record.keys() != first.keys():
            seen.update(dict.fromkeys(record))
    given = _given_columns(columns, list(seen), where, flag) if columns else {}
    found: dict[str, str] | None = {}
    if not {"messages", "prompt", "answer"} & given.keys():
        found = find_columns(first, seen) or find_columns(seen, seen)  # the first row may lack its answer
    if found is None:
        names = list(seen)
        what = f"has the columns {listed(names)}, and no known layout fits them"
        raise TellError(what, where=where, remedy=_suggestion(records, names, flag))
    merged = {**found, **given}
    if "messages" in merged:
        merged = {part: merged[part] for part in ("messages", "system", "tools") if part in merged}
    elif missing := {"prompt", "answer"} - merged.keys():
        part = max(missing)  # the prompt first
        raise TellError(f"{columns!r} names no {part} column", where=flag, remedy=f"Add {part}=COLUMN to it.")
    others = [column for column in seen if column not in merged.values()]
    verdict = next((c for c in others if _is_verdict(records, c) or _is_binary_verdict(records, c, merged)), None)
    others = [column for column in others if column != verdict]
    if "prompt" in merged and "prompt" not in given:
        _refuse_lost(records, merged, others, where, flag)
    lists = _lists_labels(records, merged.get("answer", ""), lists)
    return Layout(layout_name(merged), merged, unused_columns(records, others), verdict, lists)


def _lists_labels(records: Sequence[Record], answer: str, one_is_enough: bool) -> bool:
    """Whether an answer column of annotation tools lists labels, several in some row (or any, if that is enough)."""
    if answer.lower() not in LABELS:
        return False
    cells = [cell for record in records if isinstance(cell := record.get(answer), list)]
    return any(
        (one_is_enough or len(cell) > 1) and not any(isinstance(item, (list, dict)) for item in cell) for cell in cells
    )


def unused_columns(records: Sequence[Record], names: Sequence[str]) -> tuple[str, ...]:
    """Those of some columns that hold something other than ids."""
    return tuple(n for n in names if not is_id(n) and any(r.get(n) not in (None, "", []) for r in records[:1000]))


def has_known_layout(records: Sequence[Record]) -> bool:
    """Whether the column names alone say what prompt and answer are."""
    seen = dict.fromkeys(name for record in records for name in record)
    return find_columns(records[0], seen) is not None or find_columns(seen, seen) is not None


def check_columns(record: Record, layout: Layout, first: tuple[int, Record]) -> str:
    """Why a record lacks a required column: ``""`` when it has them all or only lacks its answer.

    Args:
        first: number and record of the file's first row, to compare with.
    """
    missing = [column for column in layout.required if column not in record]
    if not missing or (missing == [layout.columns.get("answer")] and find_columns(record, record) is None):
        return ""
    return (
        f"has the columns {', '.join(record) or '(none)'}, but line {first[0]} has {', '.join(first[1])}: "
        "two layouts are mixed"
    )


def _given_columns(text: str, names: list[str], where: str | None, flag: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in text.split(","):
        part, equals, column = (piece.strip() for piece in item.partition("="))
        if not equals or not part or not column:
            remedy = f"Write e.g. {flag} prompt=q,answer=a."
            raise TellError(f"{item.strip()!r} is not of the form part=column", where=flag, remedy=remedy)
        key = ALIASES.get(part)
        if key is None:
            remedy, near = f"The parts are {', '.join(PARTS)}.", did_you_mean(part, ALIASES)
            raise TellError(f"unknown part {part!r}", where=flag, remedy=remedy, nearest=near)
        if key in given:
            raise TellError(f"{key} is named twice in {text!r}", where=flag, remedy="Name it once.")
        if column not in names:
            what, near = f"there is no column {column!r} in {where or 'the data'}", did_you_mean(column, names)
            remedy = f"The columns are {listed(names)}."
            raise TellError(what, where=flag, remedy=remedy, nearest=near and repr(near))
        given[key] = column
    if "messages" in given and {"prompt", "answer"} & given.keys():
        what = f"{text!r} names messages and also prompt or answer"
        raise TellError(what, where=flag, remedy="Name one or the other.")
    return given


def _is_verdict(records: Sequence[Record], column: str) -> bool:
    known = VERDICTS.get(column)
    return bool(known and (values := _values(records, column)) and values <= known)


def _is_binary_verdict(records: Sequence[Record], column: str, columns: Mapping[str, str]) -> bool:
    """Whether a column ``label`` or ``kto_tag`` of 0 and 1 is a verdict, and not the number of the answer's class."""
    values = _values(records, column) if "true" in VERDICTS.get(column, ()) else set()
    answer = columns.get("answer", "")
    if not values or not values <= {"0", "1", "0.0", "1.0"} or answer.lower() in LABELS:
        return False
    pairs = {(str(record.get(answer)), str(record.get(column))) for record in records}
    answers = {text for text, _ in pairs}
    return not answer or len(pairs) > len(answers) or 2 * len(answers) > len(records)


def _values(records: Sequence[Record], column: str) -> set[str]:
    cells = (record.get(column) for record in records)
    return {str(cell).strip().lower() for cell in cells if cell is not None and cell == cell}  # neither null nor NaN


def is_id(column: str) -> bool:
    """Whether a column's name is that of an id, or empty."""
    return not column or bool(_IDS.fullmatch(column) or _IDS.fullmatch(column.lower()))


def _is_material(column: str) -> bool:
    return column.lower() in PROMPTS or bool(_MATERIAL.fullmatch(column))


def _refuse_lost(
    records: Sequence[Record], columns: Mapping[str, str], others: Sequence[str], where: str | None, flag: str
) -> None:
    """Refuse to leave out columns that belong to the prompt, unless they repeat it, as Alpaca's ``text`` does."""
    prompt, answer = columns["prompt"], columns["answer"]
    whole = [record for record in records if prompt in record and answer in record]  # others are another layout's
    lost = [c for c in others if _is_material(c) and _adds([(record.get(c), record[prompt]) for record in whole])]
    if not lost or (len(lost) == 1 and len(lost[0]) == 1):  # a single letter may mean anything
        return
    them = "it" if len(lost) == 1 else "them"
    joined = f"Write {them} into the column of prompts"
    if len(lost) == 1 and "input" not in columns and not isinstance(records[0].get(lost[0]), (list, dict)):
        first, second = (prompt, lost[0]) if lost[0].lower() not in _FIRST else (lost[0], prompt)
        joined = f"Pass {flag} {_quoted(f'prompt={first},input={second},answer={answer}')} to join them"
    plain = _quoted(f"prompt={prompt},answer={answer}")
    what = f"has {listed(lost)} next to the prompt {prompt!r}, which would be left out"
    raise TellError(what, where=where, remedy=f"{joined}, or pass {flag} {plain} to leave {them} out.")


def _adds(cells: Sequence[tuple[object, object]]) -> bool:
    """Whether a column adds to the prompt, given pairs of both, rather than rephrasing it."""
    full = [(v, p) for v, p in cells if v not in (None, "") and not isinstance(v, bool) and str(v).strip()]
    repeats = sum(isinstance(v, str) and isinstance(p, str) and p.strip() in v for v, p in full)
    return repeats < REPEATS * len(full)


def _suggestion(records: Sequence[Record], names: Sequence[str], flag: str) -> str:
    """The remedy for unknown columns: which of them might be prompt and answer, ids and empty ones left out."""
    usable = [
        n
        for n in names
        if (n.lower() in _ANSWERS or not is_id(n))
        and not _is_verdict(records, n)
        and any(record.get(n) not in (None, "") for record in records[:100])
    ]
    if len(usable) < 2:
        return "Give it a column of prompts and a column of answers."
    answer = next((n for known in _ANSWERS for n in usable if n.lower() == known), None)
    others = [n for n in usable if n != answer]
    asked = [n for n in others if n == others[0] or _is_material(n)]
    if len(asked) > 2:
        return f"Write {listed(asked)} into one column named prompt, and the answer into one named completion."
    asked.sort(key=lambda n: n.lower() not in _FIRST)
    answer = answer or next(n for n in usable if n != asked[0])
    second = f"input={asked[1]}," if len(asked) == 2 and asked[1] != answer else ""
    return f"Name them, e.g. {flag} {_quoted(f'prompt={asked[0]},{second}answer={answer}')}."


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text
