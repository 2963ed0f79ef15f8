"""Progress on stderr: bars on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from tell.progress import Advance
from tell.shown import LONGEST_LINE, clean, shorten

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.progress import Progress

BRIEF_SECONDS = 1.0  # work shorter than this leaves no line on the screen
EVERY = 5.0  # seconds between lines of a log file


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints untrusted text literally: no markup, no terminal control sequences."""
    from rich.console import Console
    from rich.segment import Segment

    class Clean(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(clean(segment.text), segment.style)

    return Clean(stderr=stderr, highlight=False, markup=False, emoji=False)


def make_display() -> TerminalDisplay | PlainDisplay:
    """The display for stderr: bars on a terminal, lines elsewhere."""
    console = make_console(stderr=True)
    return TerminalDisplay(console) if console.is_terminal and not console.is_dumb_terminal else PlainDisplay()


def short(amount: float) -> str:
    """``950``, ``12.3k``, ``4.56M``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(amount) >= limit:
            return f"{amount / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{amount:,.0f}" if abs(amount) >= 10 or amount == int(amount) else f"{amount:.1f}"


def clock(seconds: float) -> str:
    """``0:42``, ``12:05``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bounded(text: str) -> str:
    """A note, formatted for display."""
    return shorten(clean(text), LONGEST_LINE)


class _Count:
    """The progress of one piece of work."""

    def __init__(self, title: str, total: float | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.info, self.began = 0.0, "", time.monotonic()
        self.end: float | None = None  # on the same clock, if known
        self.told = False  # set by the caller, not estimated from the pace

    def advance(self, amount: float, info: str, left: float | None) -> None:
        now = time.monotonic()
        self.done = round(self.done + amount, 6)  # fractions of a row add up to whole ones
        self.info = info or self.info
        if left is not None:
            self.end, self.told = now + left, True
        elif amount and self.total and self.done and not self.told:
            self.end = now + max(0.0, self.total - self.done) * (now - self.began) / self.done

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def rate(self) -> str:
        if not self.done or not self.seconds or self.told:  # the pieces differ in size
            return ""
        return f"{short(self.done / self.seconds)} {self.unit}/s"

    @property
    def left(self) -> str:
        """Falls from one amount to the next too; until one can tell, how long it has taken."""
        if self.end is None:
            return clock(self.seconds)
        return f"{clock(max(0.0, self.end - time.monotonic()))} left"

    @property
    def amount(self) -> str:
        if not self.total and not self.done:
            return ""
        of = f"/{short(self.total)}" if self.total else ""
        return f"{short(self.done)}{of} {self.unit}"

    def line(self, *, finished: bool = False) -> str:
        took = f"in {clock(self.seconds)}" if finished else self.left
        return f"{self.title}: " + ", ".join(filter(None, (self.amount, self.rate, took, self.info)))


class PlainDisplay:
    """A line when work ends, and one every ``every`` seconds before, even if the work reports nothing."""

    def __init__(self, stream: TextIO | None = None, *, every: float = EVERY) -> None:
        self.stream, self.every = stream, every
        self._open: list[_Count] = []  # the innermost last; only it is shown
        self._said = 0.0
        self._ended: threading.Event | None = None  # of the thread that reports where the work does not
        self._lock = threading.RLock()

    def note(self, text: str) -> None:
        print(_bounded(text), file=self.stream or sys.stderr, flush=True)

    @contextmanager
    def bar(self, title: str, total: float | None, unit: str = "rows") -> Iterator[Advance]:
        state = _Count(title, total, unit)

        def advance(amount: float = 1, info: str = "", left: float | None = None) -> None:
            with self._lock:
                state.advance(amount, info, left)
                self.tick()

        self._enter(state)
        try:
            yield advance
        finally:
            self._leave(state)
        if state.seconds >= BRIEF_SECONDS or not self.every:
            self.note(state.line(finished=True))

    def tick(self) -> None:
        """Print the progress of the innermost work when a line is due."""
        with self._lock:
            now = time.monotonic()
            if self._open and now - max(self._said, self._open[-1].began) >= self.every:
                self._said = now
                self.note(self._open[-1].line())

    def _enter(self, state: _Count) -> None:
        with self._lock:
            self._open.append(state)
            if self._ended is None and self.every:
                self._ended = threading.Event()
                threading.Thread(target=self._speak, args=(self._ended,), name="progress", daemon=True).start()

    def _leave(self, state: _Count) -> None:
        with self._lock:
            self._open.remove(state)
            if not self._open and self._ended is not None:
                self._ended.set()
                self._ended = None

    def _speak(self, ended: threading.Event) -> None:
        while not ended.wait(self.every / 4):
            self.tick()


class TerminalDisplay:
    """Bars with amount, speed, time left and, below, what else is known (the loss of each source)."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._open = 0

    def note(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text(_bounded(text)))

    @contextmanager
    def bar(self, title: str, total: float | None, unit: str = "rows") -> Iterator[Advance]:
        state = _Count(title, total, unit)
        if self._progress is None:
            self._progress = _make_progress(self.console)
            self._progress.start()
        progress = self._progress
        task = progress.add_task(title, total=total, state=state)
        self._open += 1

        def advance(amount: float = 1, info: str = "", left: float | None = None) -> None:
            state.advance(amount, info, left)
            progress.update(task, completed=state.done)

        try:
            yield advance
        finally:  # an interrupted bar must restore the cursor
            progress.remove_task(task)
            self._open -= 1
            if not self._open:
                progress.stop()
                self._progress = None
        if state.seconds >= BRIEF_SECONDS:
            self.note(f"✓ {state.line(finished=True)}")


def _make_progress(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task
    from rich.text import Text

    class Words(ProgressColumn):
        max_refresh = 0.2

        def __init__(self, attribute: str, style: str = "") -> None:
            super().__init__()
            self.attribute, self.style = attribute, style

        def render(self, task: Task) -> RenderableType:
            return Text(getattr(task.fields["state"], self.attribute), style=self.style, no_wrap=True)

    class Bars(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                if info := task.fields["state"].info:
                    yield Text(f"  {info}", style="dim", no_wrap=True, overflow="ellipsis")

    return Bars(
        Words("title"),
        BarColumn(bar_width=16),
        Words("amount"),
        Words("rate", "cyan"),
        Words("left", "green"),
        console=console,
        transient=True,
        redirect_stdout=False,
        refresh_per_second=5,
    )
