"""How long work shows its progress: the verbs draw bars with rich, a notebook or test stays silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[..., None]  # advance(amount: float, info: str = "", left: float | None = None)


class Display(Protocol):
    """What the pipeline tells the person who waits."""

    def note(self, text: str) -> None:
        """One line worth keeping on the screen."""
        ...

    def bar(self, title: str, total: float | None, unit: str = "rows") -> AbstractContextManager[Advance]:
        """A context manager that yields ``advance(amount, info="", left=None)``; ``total`` None: of unknown length.

        ``left`` is how many seconds it still takes, where the caller knows better than the pace so far.
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
