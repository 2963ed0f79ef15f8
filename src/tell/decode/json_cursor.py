"""Follows a growing answer, JSON or a list with separators. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from tell.data.closed import ITEM


class ListCursor:
    """Where a growing list with separators stands: always in an item. Attributes are as of `JsonCursor`.

    Args:
        separator: between two items, one character between blanks.
    """

    place: tuple[str, ...] | None = (ITEM,)
    ended = False  # what ends it is the end of the answer

    def __init__(self, separator: str) -> None:
        self.text, self.done = "", list[str]()
        self._separator = separator.strip()

    def feed(self, text: str) -> None:
        """Go on by ``text``."""
        *done, self.text = (self.text + text).split(self._separator)
        self.done += [part.strip() for part in done]


class JsonCursor:
    """Where a growing JSON text stands.

    Attributes:
        place: keys that lead to the value being written, `ITEM` for an item of a list; None in and before keys, and
            after lists and objects.
        text: that value so far, as written, white space included.
    """

    def __init__(self) -> None:
        self.place: tuple[str, ...] | None = ()
        self.text = ""
        self._open: list[_Level] = []
        self._in_string = self._escaped = False

    @property
    def ended(self) -> bool:
        """Whether the list or object that the text is has been closed."""
        return self.place is None and not self._open

    @property
    def done(self) -> list[str]:
        """Items that the innermost list already has, as written, without white space around; "" for nested ones."""
        return self._open[-1].done if self._open else []

    def feed(self, text: str) -> None:
        """Go on by ``text``."""
        for character in text:
            self._step(character)

    def _step(self, c: str) -> None:
        level = self._open[-1] if self._open else None
        if self._in_string:
            self.text += c
            self._in_string = c != '"' or self._escaped
            self._escaped = c == "\\" and not self._escaped
        elif c in "{[":
            above = () if level is None else (*level.path, level.key)
            self._open.append(_Level(c == "[", above, ITEM))
            self._begin()
        elif c == ":" and level is not None and not level.is_list:
            level.key = _unquoted(self.text.strip())
            self.place, self.text = (*level.path, level.key), ""
        elif c == "," and level is not None:
            if level.is_list:
                level.done.append(self.text.strip())
            self._begin()
        elif c in "}]":
            self._open = self._open[:-1]
            self.place, self.text = None, ""
        else:
            self.text += c
            self._in_string = c == '"'

    def _begin(self) -> None:
        """A key or an item begins."""
        level = self._open[-1]
        self.place, self.text = (*level.path, ITEM) if level.is_list else None, ""


@dataclass(slots=True)
class _Level:
    """An open list or object: the path of keys to it, its current key, and the items of a list so far."""

    is_list: bool
    path: tuple[str, ...]
    key: str
    done: list[str] = field(default_factory=list)


def _unquoted(key: str) -> str:
    try:
        return str(json.loads(key, strict=False))
    except ValueError:
        return key
