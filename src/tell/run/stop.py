"""SIGINT and SIGTERM: finish the step, leave a resumable folder, say how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tell.errors import Interrupted
from tell.progress import Advance, Display

_listening: list[Stop] = []  # a run within a study listens within it


class Stop:
    """Set by a signal; asked between steps and between decoded tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def check(self) -> None:
        """Raise Interrupted once a signal has come."""
        if self.asked:
            raise self.interrupted("stopped")

    def interrupted(self, what: str) -> Interrupted:
        """The error that says how to go on."""
        return Interrupted(what, where=str(self.folder), remedy=f"Go on with `tell tune --resume --out {self.folder}`.")

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Catch SIGINT and SIGTERM; a second one takes its usual course. Only the main thread can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def caught(number: int, _: FrameType | None) -> None:
            for stop in _listening:  # the study stops too if the run was just over
                stop.asked = True
            signal.signal(number, old[number])

        for number in old:
            signal.signal(number, caught)
        _listening.append(self)
        try:
            yield self
        finally:
            _listening.remove(self)
            for number, handler in old.items():
                signal.signal(number, handler)


class Checked:
    """A display whose bars also ask whether to stop."""

    def __init__(self, display: Display, stop: Stop) -> None:
        self.display, self.stop = display, stop

    def note(self, text: str) -> None:
        self.display.note(text)

    @contextmanager
    def bar(self, title: str, total: float | None, unit: str = "rows") -> Iterator[Advance]:
        with self.display.bar(title, total, unit) as advance:

            def checked(amount: float = 1, info: str = "", left: float | None = None) -> None:
                self.stop.check()
                advance(amount, info, left)

            yield checked
