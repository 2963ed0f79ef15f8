"""One training or test example: a conversation whose last turn is the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        trained: the turn carries loss; only an assistant's turn does. False for examples inside a prompt, for
            ``weight: 0`` and for tool calls.
        extra: JSON object with more that a chat template may show: ``tool_calls``, ``tool_call_id``, ``name``.
        tools: JSON list of the tools of the conversation; on its first user turn alone.
    """

    role: Role
    content: str
    trained: bool = True
    extra: str = ""
    tools: str = ""

    @property
    def is_plain(self) -> bool:
        """A turn with role and content only, with loss if it is the assistant's."""
        return self.trained and not self.extra and not self.tools

    def to_dict(self) -> dict[str, object]:
        """The turn as a chat template gets it; tools are passed separately (`tools_of`)."""
        turn: dict[str, object] = {"role": self.role, "content": self.content}
        return {**turn, **json.loads(self.extra)} if self.extra else turn

    def with_content(self, content: str) -> Message:
        return replace(self, content=content)


def tools_of(messages: Iterable[Message]) -> list[dict] | None:
    """The tools of all the conversations whose turns these are, each once; None where there are none."""
    found = {json.dumps(tool): tool for m in messages if m.tools for tool in json.loads(m.tools)}
    return list(found.values()) or None


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with the assistant's answer; or a raw text, which is one turn without a prompt.

    Attributes:
        messages: the turns; the last one is the assistant's. Without the anchor, which is put on when a row is
            rendered.
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
        text = _encode(
            [
                [m.role, m.content, m.trained, m.extra, m.tools]
                if not m.trained or m.extra or m.tools
                else [m.role, m.content]  # hash plain turns as before `extra` existed, so that hashes stay
                for m in turns
            ]
        )
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
    def asked(self) -> tuple[Message, ...]:
        """The prompt; of a raw text the text as a user's turn, by which it is compared with prompts."""
        return (Message("user", self.answer),) if self.is_raw else self.prompt

    @property
    def is_raw(self) -> bool:
        """A text without a prompt, all of which is trained and which no chat template surrounds: a general row."""
        return len(self.messages) == 1

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
