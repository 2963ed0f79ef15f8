"""One training or test example: a conversation whose last turn is the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def to_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with the assistant's answer.

    Attributes:
        messages: the turns; the last one is the assistant's. No anchor in here: it is put on when a
            row is rendered, so the same example can be rendered with and without it.
        source: ``"task"``, ``"general"`` or another source name.
        origin: where it was read, ``"tickets.jsonl:12"``; for error messages and tables.
        hash: content hash, 16 hexadecimal digits; equal conversations have equal hashes.
    """

    messages: tuple[Message, ...]
    source: str
    origin: str
    hash: str

    @classmethod
    def of(cls, messages: Iterable[Message], *, source: str, origin: str) -> Example:
        turns = tuple(messages)
        text = json.dumps([[m.role, m.content] for m in turns], ensure_ascii=False)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return cls(turns, source, origin, digest)

    @classmethod
    def pair(cls, prompt: str, answer: str, *, source: str = "task", origin: str = "") -> Example:
        turns = (Message("user", prompt), Message("assistant", answer))
        return cls.of(turns, source=source, origin=origin)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """Content of the last turn, the reference at test time."""
        return self.messages[-1].content

    @property
    def question(self) -> str:
        """Content of the last user turn, for tables."""
        for message in reversed(self.prompt):
            if message.role == "user":
                return message.content
        return ""
