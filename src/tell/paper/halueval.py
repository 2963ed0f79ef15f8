"""HaluEval rows and the paper's prompt around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from tell.data.formats import read_records
from tell.errors import TellError

Label = Literal["yes", "no"]

# The instruction of Halu-CoT-JSON, word for word, mistakes of grammar included: Zeng et al., "Token-Efficient
# Leverage Learning in Large Language Models", arXiv 2404.00914, published with its data under Apache-2.0
# (github.com/LinesHogan/Token-Efficient-Leverage-Learning). It is the paper's anchor prompt for this task.
ANCHOR = """\
Role and Goal: You are an advanced AI designed to analyze queries, responses, and additional information provided in \
a 'relative' field to identify hallucinations. Hallucinations are defined as any deviation from the expected accuracy \
and reliability of AI responses. Your analysis culminates in the creation of a 'thought' field, which details your \
findings, and a final 'hallucination' label indicating whether a hallucination is present.

Constraints: You must strictly adhere to JSONL format, focusing your analysis in the 'thought' field and concluding \
with a 'hallucination' label, formatted as {"thought": "xxx", "hallucination": "yes" or "no"}. Refrain from outputting \
any fields other than 'thought' and 'hallucination'.

Guidelines: You are expected to meticulously review the query, response, and 'relative' field for accuracy and \
consistency. Errors must be explained in the 'thought' field as hallucinations, using a factual and analytical tone.

Personalization: The final 'hallucination' label is crucial, as it reflects expert validation and must be accurate. \
You are tasked with analyzing the 'response' field for hallucinations and justifying your determination of the \
hallucination label at the end of your analysis. Your focus is on pinpointing and elucidating errors as \
hallucinations, upholding the high standards expected of AGI, and presenting your analysis clearly and concisely in \
JSONL format."""

SCHEMA: dict[str, object] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {"thought": {"type": "string"}, "hallucination": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["thought", "hallucination"],
    "additionalProperties": False,
}

_SOURCES = "Use HaluEval's general_data.json or the paper's train_inputs.jsonl."
_QUERY = "Consider the following task:\n'relatives' : \n'user_query' : "
_RESPONSE = "\n'chatgpt_response' : "


@dataclass(frozen=True, slots=True)
class HaluRow:
    """One judged answer of HaluEval.

    Attributes:
        id: HaluEval's ID; not unique (one ID occurs twice upstream).
        query: what a user asked ChatGPT.
        response: what ChatGPT answered.
        label: whether the annotators found a hallucination in it.
        spans: the passages they marked, or their remark; empty for ``no`` and for a few ``yes``.
        origin: ``file:line``.
    """

    id: str
    query: str
    response: str
    label: Label
    spans: tuple[str, ...]
    origin: str

    @property
    def prompt(self) -> str:
        """The row's part of the published prompt: ``ANCHOR + "\\n\\n" + prompt`` is the whole."""
        return f"{_QUERY}{self.query}{_RESPONSE}{self.response}"


def read_rows(path: str | Path) -> tuple[list[HaluRow], bool]:
    """Rows in file order, and whether they are HaluEval's own (rather than the paper's prompts).

    Reads HaluEval's ``general_data.json`` (``user_query``, ``chatgpt_response``, ``hallucination``,
    ``hallucination_spans``), the paper's training inputs (``prompt``, ``label``, ``spans``) and its test set
    (``prompt``, ``response``: the label).

    Raises:
        TellError: an unreadable file, a column missing, a label other than yes and no, a prompt that is not
            the paper's.
    """
    rows: list[HaluRow] = []
    upstream = False
    for line, record in read_records(path):
        origin = f"{path}:{line}"
        if "user_query" in record:
            upstream = True
            names = ("user_query", "chatgpt_response", "hallucination", "hallucination_spans")
            query, response = _text(record, names[0], origin), _text(record, names[1], origin)
        else:
            names = ("prompt", "", "label" if "label" in record else "response", "spans")
            query, response = _split(_text(record, "prompt", origin), origin)
        label = _text(record, names[2], origin).strip().lower()
        if label not in get_args(Label):
            raise TellError(f"{names[2]} is {label!r}", where=origin, remedy="Make it yes or no.")
        spans = record.get(names[3]) or []
        if not isinstance(spans, list) or not all(isinstance(span, str) for span in spans):
            raise TellError(f"{names[3]} is not a list of texts", where=origin, remedy="Give a list, empty for none.")
        marked = tuple(span for span in spans if span.strip())
        rows.append(HaluRow(str(record.get("ID", line)), query, response, cast(Label, label), marked, origin))
    return rows, upstream


def _split(prompt: str, origin: str) -> tuple[str, str]:
    """Query and response from a published prompt."""
    own = prompt.removeprefix(ANCHOR).lstrip("\n")
    query, separator, response = own.removeprefix(_QUERY).partition(_RESPONSE)
    if not own.startswith(_QUERY) or not separator:
        raise TellError("prompt is not one of Halu-CoT-JSON", where=origin, remedy=_SOURCES)
    return query, response


def _text(record: Mapping[str, object], name: str, origin: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        what = "is missing" if value is None else f"is {type(value).__name__}, not text"
        what = f"column {name} {what} (found: {', '.join(map(str, record))})"
        raise TellError(what, where=origin, remedy=_SOURCES)
    return value
