"""The anchor prompt: one fixed instruction text on every task row (paper, section 3)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from tell.data.example import Message
from tell.errors import TellError
from tell.files import DAMAGED, read_json

Place = Literal["system", "user"]
Origin = Literal["hand", "self", "derived", "none"]


@dataclass(frozen=True, slots=True)
class Anchor:
    """The instruction text that marks task rows; it travels with the adapter.

    Attributes:
        text: the instruction; empty for no anchor.
        place: ``"system"`` puts it in the system message, ``"user"`` at the head of the first user turn.
        origin: ``"hand"``, ``"self"`` (the model wrote it), ``"derived"`` (composed from the detected
            schema or labels) or ``"none"``.
    """

    text: str
    place: Place = "user"
    origin: Origin = "hand"

    @property
    def hash(self) -> str:
        """16 hexadecimal digits over place and text."""
        data = f"{self.place}\x00{self.text}".encode()
        return hashlib.blake2b(data, digest_size=8).hexdigest()

    def __bool__(self) -> bool:
        return bool(self.text)

    def apply(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Messages with the anchor in place, exactly once; unchanged for an empty anchor.

        A text that already heads the first user turn (data published with its instruction) is not
        repeated.
        """
        turns = list(messages)
        if not self.text:
            return tuple(turns)
        if self.place == "system":
            if turns and turns[0].role == "system":
                rest = turns[0].content
                if not _heads(self.text, rest):
                    turns[0] = turns[0].with_content(f"{self.text}\n\n{rest}")
            else:
                turns.insert(0, Message("system", self.text))
            return tuple(turns)
        for i, turn in enumerate(turns):
            if turn.role == "user":
                if not _heads(self.text, turn.content):
                    turns[i] = turn.with_content(f"{self.text}\n\n{turn.content}")
                return tuple(turns)
        return (Message("user", self.text), *turns)

    def remove(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Messages without the anchor that data was published with; unchanged where it heads no turn."""
        turns = list(messages)
        for i, turn in enumerate(turns):
            if self.text and turn.role == self.place:
                if _heads(self.text, turn.content):
                    turns[i] = turn.with_content(turn.content[len(self.text) :].lstrip())
                break
        return tuple(turns)

    def to_dict(self) -> dict[str, str]:
        return {**asdict(self), "hash": self.hash}

    @classmethod
    def from_dict(cls, data: dict) -> Anchor:
        return cls(data["text"], data["place"], data["origin"])

    @classmethod
    def load(cls, path: str | Path) -> Anchor:
        """The anchor in ``anchor.json`` of a run folder.

        Raises:
            TellError: it is not one that tell wrote.
        """
        data = read_json(Path(path), remedy=DAMAGED)
        known = {"text": (), "place": get_args(Place), "origin": get_args(Origin)}
        for key, values in known.items():
            if not isinstance(data.get(key), str) or (values and data[key] not in values):
                raise TellError(f"is damaged ({key} is {data.get(key)!r})", where=str(path), remedy=DAMAGED)
        return cls.from_dict(data)


def _heads(anchor: str, text: str) -> bool:
    """Whether ``text`` begins with the anchor as whole words: ``Answer`` does not head ``Answers wanted``."""
    return text.startswith(anchor) and not (text[len(anchor) :][:1].isalnum() and anchor[-1:].isalnum())


NO_ANCHOR = Anchor("", "user", "none")
