"""Rows assembled from a template's constant parts and contents encoded once: the fast path of `tokenize`.

A chat template writes the same text around every conversation of the same roles. Where that text ends with special
tokens, at which every tokenizer splits first, a row's ids are those of its parts. Where this cannot be shown (templates
that look into contents, tokenizers without word borders, contents with white space at their ends), there is no frame,
and the row is rendered and encoded whole.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tell.data.example import Message, Role
from tell.errors import TellError
from tell.rows.render import earlier_answers
from tell.rows.template import ChatTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LEFT, RIGHT = 'a1.)"é中', 'aZ1"(#-é中'  # characters of each kind that word patterns distinguish
SPLITTERS = {"ByteLevel", "Digits", "Split", "Sequence"}  # they look at a word's surroundings, not at its position
Roles = tuple[Role, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """The constant parts that a template writes around n contents.

    Attributes:
        closings: n + 1 lists of ids, before each content and after the last; each but the first begins, each but
            the last ends with a special token.
        headers: n texts between a closing and its content, e.g. ``"assistant\\n"``; they are encoded with the content.
        header_ids: n lists, the ids of each header encoded alone.
        answers: n, True where the content is trained, with the one token after it.
    """

    closings: list[list[int]]
    headers: list[str]
    header_ids: list[list[int]]
    answers: list[bool]


class Frames:
    """The frames of one model's template, found at the first conversation of each list of roles."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self.chat = chat
        self._frames: dict[Roles, Frame | None] = {}
        self._joins: dict[str, int] = {}
        self._specials = {
            str(token.content)
            for token in chat.backend.get_added_tokens_decoder().values()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }
        self._usable = _splits_by_words(chat.backend) and all(
            self._cuts(f"{left}\n", right) for left in LEFT for right in RIGHT
        )
        self._marks = _literals(chat) if self._usable else ()

    def of(self, messages: Sequence[Message]) -> Frame | None:
        """The frame of a conversation; None where it has to be rendered."""
        if not self._usable:
            return None
        for message in messages:
            text = message.content
            if not text or text[0].isspace() or text[-1].isspace():
                return None  # templates trim, and white space joins with the template's own
            for mark in self._marks:
                if mark in text:
                    return None
        roles = tuple(message.role for message in messages)
        if roles not in self._frames:
            self._frames[roles] = self._find(roles)
        return self._frames[roles]

    def join_tokens(self, left: str) -> int | None:
        """Tokens that a line break adds between ``left`` and a text without space in front; None if unknown."""
        start = len(left) - 1
        while start > 0 and not left[start].isalnum():
            if not left[start].isspace() and unicodedata.category(left[start])[0] not in "PS":
                return None  # marks and the like may belong to the word before them
            start -= 1
        end = left[start:]
        if len(end) > 40:
            return None
        if end not in self._joins:
            count = self._count
            self._joins[end] = count(f"{end}\nx") - count(end) - count("x")
        return self._joins[end]

    def _count(self, text: str) -> int:
        return len(self.chat.encode(text))

    def _cuts(self, left: str, right: str) -> bool:
        """Whether a word begins where ``right`` does."""
        pieces = self.chat.backend.pre_tokenizer.pre_tokenize_str(left + right)
        return any(start == len(left) for _, (start, _) in pieces)

    def _find(self, roles: Roles) -> Frame | None:
        try:
            parts = self._constants(roles, "\ue000{}\ue001")
            if parts is None or parts != self._constants(roles, "Probe {} probe."):
                return None
        except TellError:
            return None
        turn = self.chat.end_of_turn
        closings, headers = [], []
        for i, part in enumerate(parts):
            closing, header = (part, "") if i == len(roles) else self._cut_header(part)
            opened = i == 0 or any(closing.startswith(special) for special in self._specials)
            if not opened or (i > 0 and roles[i - 1] == "assistant" and not part.startswith(turn)):
                return None
            closings.append(closing)
            headers.append(header)
        if turn not in self._specials:
            return None
        if any(header and not self._cuts(header, right) for header in headers for right in RIGHT):
            return None
        encode = self.chat.encode
        return Frame(
            [encode(text) for text in closings],
            headers[:-1],
            [encode(text) for text in headers[:-1]],
            [role == "assistant" for role in roles],
        )

    def _cut_header(self, part: str) -> tuple[str, str]:
        end = max((part.rfind(special) + len(special) for special in self._specials if special in part), default=0)
        return part[:end], part[end:]

    def _constants(self, roles: Roles, form: str) -> list[str] | None:
        """n + 1 texts around contents of that form; None where an answer is not where decoding begins."""
        contents = [form.format(i) for i in range(len(roles))]
        messages = [Message(role, content) for role, content in zip(roles, contents, strict=True)]
        earlier_answers(messages)  # it refuses too many answers
        rest, parts, place = self.chat.render(messages), [], 0
        full = rest
        for i, content in enumerate(contents):
            before, found, rest = rest.partition(content)
            if not found:
                return None
            parts.append(before)
            place += len(before)
            if roles[i] == "assistant" and self.chat.render(messages[:i], add_generation_prompt=True) != full[:place]:
                return None
            place += len(content)
        return [*parts, rest]


def _splits_by_words(backend: Tokenizer) -> bool:
    """Whether words are encoded separately, at any position, and no character is changed or dropped."""
    if backend.pre_tokenizer is None or type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return False
    if backend.normalizer is not None and type(backend.normalizer).__name__ != "NFC":
        return False
    waiting, found = [json.loads(backend.pre_tokenizer.__getstate__())], set()
    while waiting:
        step = waiting.pop()
        found.add(step["type"])
        if step["type"] not in SPLITTERS or step.get("add_prefix_space"):
            return False
        waiting += step.get("pretokenizers", [])
    return "ByteLevel" in found


def _literals(chat: ChatTokenizer) -> tuple[str, ...]:
    """The texts that the template may look for in contents: ``</think>``, ``<tool_response>``."""
    from jinja2 import nodes

    values = (node.value for node in chat.parsed.find_all(nodes.Const))
    found = {value.strip() for value in values if isinstance(value, str)}
    return tuple(sorted(text for text in found if len(text) > 1 and not text.isidentifier()))
