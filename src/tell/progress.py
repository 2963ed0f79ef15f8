"""The interface of progress displays: the verbs draw bars with rich, notebooks and tests stay silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[..., None]  # advance(amount: float, info: str = "", left: float | None = None)


class Display(Protocol):
    """Notes and progress for the waiting user."""

    def note(self, text: str) -> None:
        """One line worth keeping on the screen."""
        ...

    def bar(self, title: str, total: float | None, unit: str = "rows") -> AbstractContextManager[Advance]:
        """A context manager that yields ``advance(amount, info="", left=None)``; ``total`` None: of unknown length.

        ``left`` is the remaining seconds, where the caller can estimate better than by the pace so far.
        """
        ...


class Silent:
    """Shows nothing, remembers the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def bar(self, title: str, total: float | None, unit: str = "rows") -> Iterator[Advance]:
        yield lambda amount=1, info="", left=None: None
