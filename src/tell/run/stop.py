"""SIGINT and SIGTERM: finish the step, leave a resumable folder, say how to resume."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tell.errors import Interrupted

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


class Stop:
    """Set by a signal; polled between steps and between decoded tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def check(self) -> None:
        """Raise Interrupted once a signal was received."""
        if self.asked:
            raise self.interrupted("stopped")

    @contextmanager
    def after(self, seconds: float | None) -> Iterator[None]:
        """Stop when this time is up, as a signal would; None: never. Within `listening`."""
        timer = threading.Timer(seconds or 0.0, self._end)
        timer.daemon = True
        if seconds is not None:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if seconds is not None:
                timer.join()  # the signal that it may be about to send is caught only within `listening`

    def _end(self) -> None:
        self.asked = True
        if isinstance(signal.getsignal(signal.SIGTERM), _Caught):  # reaches the `Stop` of the run that is on
            os.kill(os.getpid(), signal.SIGTERM)

    def interrupted(self, what: str) -> Interrupted:
        """The error that says how to resume."""
        return Interrupted(what, where=str(self.folder), remedy=f"Go on with `tell tune --resume --out {self.folder}`.")

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Catch SIGINT and SIGTERM; a second one takes its usual course. Only the main thread can listen.

        A run within a study listens too, and a signal stops both, since the run may be about to finish.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        old = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            signal.signal(number, _Caught(self, old[number]))
        try:
            yield self
        finally:
            for number in numbers:
                signal.signal(number, old[number])


class _Caught:
    """A signal handler that sets a `Stop` and those of the handlers it replaced; the next signal ends the process."""

    def __init__(self, stop: Stop, before: Handler) -> None:
        self.stop, self.before = stop, before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        handler: Handler = self
        while isinstance(handler, _Caught):
            handler.stop.asked = True
            handler = handler.before
        signal.signal(number, handler)
