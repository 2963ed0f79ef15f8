"""The layouts of data files, known by their columns. To add one, add an entry to `LAYOUTS`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownLayout:
    """Columns that identify a layout; names are in lower case and compared without case.

    Attributes:
        prompt: column of prompts, or of whole conversations where there are no ``answers``.
        answers: columns of answers, the preferred one first.
        inputs: columns that add to the prompt, the preferred one first.
        family: common name of the layout.
    """

    prompt: str
    answers: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    family: str = ""

    def find(self, names: Mapping[str, str]) -> dict[str, str] | None:
        """Part to column, where the columns are there.

        Args:
            names: the columns of a file by their names in lower case.
        """
        if self.prompt not in names:
            return None
        if not self.answers:
            return {"messages": names[self.prompt]}
        answer = next((name for name in self.answers if name in names), None)
        return {"prompt": names[self.prompt], "answer": names[answer]} if answer else None


# In order of preference.
LAYOUTS = (
    KnownLayout("messages"),
    KnownLayout("conversations", family="ShareGPT"),
    KnownLayout("conversation", family="ShareGPT"),
    KnownLayout("instruction", ("output", "response", "completion", "answer"), ("input", "context"), family="Alpaca"),
    KnownLayout("prompt", ("completion", "response", "answer", "output"), ("context",)),
    KnownLayout("query", ("response", "answer", "output"), ("context",)),
    KnownLayout("question", ("answer", "response", "output"), ("context",)),
    KnownLayout("input", ("output", "response", "answer")),
    KnownLayout("text", ("label_text", "label", "labels")),  # label may be the number of label_text
    KnownLayout("prompt", ("label",), ("context",)),
    KnownLayout("input", ("label",)),
    KnownLayout("sentence", ("label",)),
)
# Columns that any layout may have as well.
SYSTEMS, TOOLS, HISTORIES = ("system", "system_prompt"), ("tools", "functions"), ("history",)

PROMPTS = frozenset(known.prompt for known in LAYOUTS if known.answers)
CONVERSATIONS = frozenset(known.prompt for known in LAYOUTS if not known.answers)
RAW = "text"
"""The column of raw texts, in general data."""
PARTS = ("messages", "prompt", "answer", "input", "system", "history", "tools")
"""The parts that a column may be."""
ALIASES = {
    **dict.fromkeys(CONVERSATIONS, "messages"),
    **dict.fromkeys(sorted(PROMPTS), "prompt"),
    **{answer: "answer" for known in LAYOUTS for answer in known.answers},
    "context": "input",
    **{part: part for part in PARTS},
}
"""Names of the parts, the parts themselves among them."""
LABELS = ("label", "labels", "label_text", "accept")
"""Answer columns in which annotation tools write a list of labels."""
VERDICTS = {
    "label": frozenset({"true", "false"}),
    "kto_tag": frozenset({"true", "false"}),
    "answer": frozenset({"accept", "reject", "ignore"}),
}
"""Columns whose values mark good and bad examples: KTO's (TRL, ms-swift; LLaMA-Factory), Prodigy's."""
REJECTED = frozenset({"false", "0", "0.0", "reject", "ignore"})
"""Values of a verdict column, as text in lower case, that mark a bad example."""

_pairs = [(known.prompt, answer) for known in LAYOUTS for answer in known.answers or ("",)]
if len(set(_pairs)) < len(_pairs):
    raise ValueError(f"two layouts have the columns {max(_pairs, key=_pairs.count)}")


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a file: the meaning of its columns.

    Attributes:
        name: for display, e.g. ``"prompt/completion"``.
        columns: part to column; ``messages``, or ``prompt`` and ``answer``, with the other `PARTS` found; of raw texts
            ``text`` alone.
        unused: the other columns, without ids and empty ones.
        verdict: the column that marks bad examples, None where there is none.
        lists: the answer column lists labels, several in some rows: then every answer is such a list.
    """

    name: str
    columns: dict[str, str]
    unused: tuple[str, ...] = ()
    verdict: str | None = None
    lists: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return tuple(self.columns[part] for part in ("messages", "prompt", "answer", RAW) if part in self.columns)


def find_columns(first: Mapping[str, object], seen: Mapping[str, object]) -> dict[str, str] | None:
    """Part to column of the first layout that fits, or None.

    Args:
        first: record that decides what prompt and answer are.
        seen: all columns; those that only add to the prompt may begin in any row.
    """
    names = {name.lower(): name for name in reversed(list(first)) if name}
    for known in LAYOUTS:
        if found := known.find(names):
            break
    else:
        return None
    names = {name.lower(): name for name in reversed(list(seen)) if name}
    more: dict[str, tuple[str, ...]] = {"system": SYSTEMS, "tools": TOOLS}
    if known.answers:
        more |= {"input": known.inputs, "history": HISTORIES}
    for part, candidates in more.items():
        if column := next((names[name] for name in candidates if name in names), None):
            found[part] = column
    return found


def raw_layout(names: Iterable[str]) -> Layout | None:
    """The layout of raw texts, where there is a column of that name and nothing that would make it a prompt."""
    found = {name.lower(): name for name in reversed(list(names)) if name}
    if RAW not in found or find_columns(dict.fromkeys(found.values()), dict.fromkeys(found.values())) is not None:
        return None
    return Layout(RAW, {RAW: found[RAW]})


def layout_name(columns: Mapping[str, str]) -> str:
    """``Alpaca instruction/input/output`` and the like."""
    parts = ("system", "history", "messages", "prompt", "input", "answer", "tools")
    name = "/".join(columns[part] for part in parts if part in columns)
    main, whole = columns.get("messages") or columns["prompt"], "messages" in columns
    for known in LAYOUTS:
        fits = main.lower().startswith(known.prompt) if whole else main.lower() == known.prompt
        if fits and whole is not bool(known.answers):
            return f"{known.family} {name}".lstrip()
    return name
