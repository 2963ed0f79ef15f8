"""Grammars: which tokens an answer may go on with, computed by llguidance while it is decoded. No torch.

Compiling a schema takes milliseconds and a mask some 20 to 100 microseconds. Tokens that are the only way to go on are
known without a forward pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from tell.data.constraint import OFF, Constraint, WhiteSpace
from tell.data.schema import NAMED, VALUES
from tell.errors import TellError, first_line, is_panic
from tell.rows.template import ChatTokenizer
from tell.shown import brief

MOST_SCHEMA = 500_000
"""Characters of a schema: 5,000 properties of one object take 0.4 MB and 2 seconds to compile."""
_OPTIONS: dict[WhiteSpace, dict[str, Any]] = {
    "compact": {"item_separator": ",", "key_separator": ":"},
    "spaced": {"item_separator": ", ", "key_separator": ": "},
    "either": {"item_separator": ", ?", "key_separator": ": ?"},
    # Bounded: a weak model goes on with white space for ever where it may.
    "free": {"whitespace_pattern": r"[ \t\r\n]{0,80}"},
}
_UNSUPPORTED = re.compile(r"Unimplemented keys: (\[.*?\])")
_MESSAGE = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")
_SHOWN = 8  # faults of a schema in one error


class Grammars:
    """Compiles constraints for one tokenizer; made once, since it reads the whole vocabulary (0.4 s for 49,000 tokens).

    Raises:
        TellError: llguidance cannot read the tokenizer.
    """

    def __init__(self, chat: ChatTokenizer) -> None:
        try:
            self.tokenizer = LLTokenizer(chat.backend.to_str(), eos_token=list(chat.stop_ids))
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            what = f"answers cannot be constrained with this tokenizer ({first_line(error)})"
            raise TellError(what, where=str(chat.folder), remedy=f"To do without, {OFF}.") from error
        self.lead: list[int] = []
        blanks = len(chat.lead)
        if chat.lead.strip():  # tokens that the template writes before every answer: an empty thought
            self.lead, blanks = chat.encode(chat.lead), 0
        # A SentencePiece tokenizer begins a text with a space that decoding takes off again.
        first = chat.encode("{")[:1]
        self.blanks = blanks + self.tokenizer.decode_bytes(first).startswith(b" ")

    def compile(self, constraint: Constraint) -> Grammar:
        """The grammar of a constraint.

        Raises:
            TellError: the schema is too large, or has keywords that a grammar cannot follow; all are named.
        """
        if constraint.json_schema is None:
            body = "(" + " | ".join(json.dumps(label, ensure_ascii=False) for label in constraint.labels) + ")"
            try:
                return self._grammar(body)
            except _Refused as refused:
                what = f"the labels cannot be a grammar ({first_line(refused)})"
                raise TellError(what, where="generate.constrain", remedy=f"Rename them, or {OFF}.") from refused
        options = {
            "item_separator": ",",
            "key_separator": ":",
            "whitespace_flexible": False,
            **_OPTIONS[constraint.white_space],
            "json_allow_general_unicode_escapes": constraint.escapes,
            "lenient": False,  # a schema must not switch its own check off
            "coerce_one_of": False,
        }
        schema = constraint.json_schema
        _check_size(schema)
        try:
            return self._grammar(_as_json(schema, options))
        except _Refused as refused:
            faults = _faults(schema, str(refused), lambda part: self._fault(_as_json(part, options)))
            found = list(islice(faults, _SHOWN + 1))  # each costs a compilation
            listed = "; ".join(found[:_SHOWN]) + ("; and more" if len(found) > _SHOWN else "")
            what = f"a grammar cannot follow {listed}"
            remedy = f"Remove that from the schema, which answers are then checked against without it, or {OFF}."
            raise TellError(what, where="the schema", remedy=remedy) from refused

    def _fault(self, body: str) -> str:
        try:
            self._grammar(body)
        except _Refused as refused:
            return str(refused)
        return ""

    def _grammar(self, body: str) -> Grammar:
        lead = f"start: BLANK? answer\nBLANK: /[ \\t\\n]{{1,{self.blanks}}}/\nanswer: " if self.blanks else "start: "
        matcher = LLMatcher(self.tokenizer, lead + body, log_level=0)
        if matcher.is_error():
            raise _Refused(matcher.get_error())
        return Grammar(self, matcher)


def check_schema(schema: object) -> None:
    """Refuse a JSON Schema that llguidance inside llama.cpp would not follow: llama.cpp then decodes without it.

    Raises:
        TellError: it is no JSON Schema, refers to another place, loops, is too large, or has such keywords.
    """
    followed = Constraint.of_schema(schema).json_schema or {}
    _check_size(followed)
    error = LLMatcher.validate_grammar("start: " + _as_json(followed, {"lenient": False}))
    if error:
        raise TellError(f"a grammar cannot follow it ({reason(error)})", where="the schema", remedy="Simplify it.")


def _check_size(schema: dict[str, Any]) -> None:
    if (size := len(json.dumps(schema))) > MOST_SCHEMA:
        what = f"has {size:,} characters; for a constraint it may have {MOST_SCHEMA:,}"
        raise TellError(what, where="the schema", remedy=f"Shorten it, or {OFF}.")


class _Refused(Exception):
    """llguidance's own error."""


class Grammar:
    """A compiled constraint."""

    def __init__(self, made_by: Grammars, matcher: LLMatcher) -> None:
        self.grammars, self._matcher = made_by, matcher

    def mask(self) -> Mask:
        """What one answer may be, from its beginning."""
        return Mask(self._matcher.deep_copy(), self.grammars.lead)

    def fault(self, answer: str) -> str | None:
        """Where an answer leaves the grammar: the text before, or that it ends too early; None where it is accepted."""
        matcher, ids = self._matcher.deep_copy(), self.grammars.tokenizer.tokenize_str(answer)
        taken = matcher.try_consume_tokens(ids)
        if taken == len(ids) and matcher.is_accepting():
            return None
        kept = self.grammars.tokenizer.decode_str(ids[:taken])
        if taken == len(ids):
            return "it ends too early"
        return f"after {brief(kept[-40:])} it goes on with {brief(answer[len(kept) : len(kept) + 20])}"


class Mask:
    """Follows one answer: the tokens it may go on with, and those it must.

    Attributes:
        forced: tokens so far that were the only way to go on.
    """

    def __init__(self, matcher: LLMatcher, lead: Sequence[int]) -> None:
        self._matcher, self._lead = matcher, list(lead)
        self._stuck, self.forced = False, 0

    @property
    def failed(self) -> str:
        """Why no mask can be computed any more; empty as long as it can. The answer then ends."""
        return self._matcher.get_error() or ("no token of the model can follow" if self._stuck else "")

    @property
    def ended(self) -> bool:
        """Whether nothing but the end of the answer may follow."""
        return self._matcher.is_stopped() and not self.failed

    def start(self) -> list[int]:
        """The tokens that every answer begins with, taken; called once, before any token."""
        return [*self._lead, *self._further()]

    def take(self, token: int) -> list[int]:
        """Go on by a token that `allowed` has; the tokens that must follow, taken too."""
        return self._further() if self._matcher.consume_token(token) else []

    def _further(self) -> list[int]:
        tokens = [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()
        if not tokens or not self._matcher.consume_tokens(tokens):
            return []
        self.forced += len(tokens)
        return tokens

    def allowed(self, size: int) -> np.ndarray:
        """(size,) bool, the tokens of the model's vocabulary that may follow; a stop token where the answer may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        out = np.zeros(size, dtype=bool)
        found = np.unpackbits(bits, bitorder="little")[:size]
        out[: len(found)] = found
        self._stuck = not out.any()
        return out


def _as_json(schema: dict[str, Any], options: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def _faults(schema: dict[str, Any], error: str, fault_of: Callable[[dict], str]) -> Iterator[str]:
    """Everything of a schema that llguidance refuses, each with its path; it reports one fault alone.

    Args:
        error: its error about the whole schema.
        fault_of: its error about another schema; empty where it accepts it.
    """
    unknown: dict[str, bool] = {}  # keywords that it does not implement

    def implements(name: str, value: object) -> bool:
        if name not in unknown:
            found = _UNSUPPORTED.search(fault_of({name: value}))
            unknown[name] = found is not None and name in json.loads(found.group(1))
        return not unknown[name]

    known = False
    for node, path in _nodes(schema, "$"):
        faults = [name for name, value in node.items() if not implements(name, value)]
        for name in ("pattern", "format"):  # a string alone has the same fault
            if name in node and fault_of({"type": "string", name: node[name]}):
                faults.append(f"{name} {brief(node[name])}")
        if "oneOf" in node and "oneOf" in error:
            faults.append("oneOf (use anyOf)")
        for fault in faults:
            known = True
            yield f"{fault} at {path}"
    if not known:
        yield f"it ({reason(error)})"


def reason(error: str) -> str:
    """The first line of llguidance's error about a schema."""
    return brief(_MESSAGE.sub("", error).splitlines()[0], 120)


def _nodes(node: object, path: str) -> Iterator[tuple[dict, str]]:
    """Every subschema with its path."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from _nodes(item, f"{path}[{i}]")
    elif isinstance(node, dict):
        yield node, path
        for key, value in node.items():
            if key in NAMED and isinstance(value, dict):
                for name, part in value.items():
                    yield from _nodes(part, f"{path}.{key}.{name}")
            elif key not in VALUES:
                yield from _nodes(value, f"{path}.{key}")
