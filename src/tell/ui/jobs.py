"""Commands of `tell` that the page starts: processes of their own, found again by files after the page's restart."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from tell.child_process import find_process
from tell.errors import TellError
from tell.files import read_facts, write_json
from tell.home import make_folder
from tell.shown import one_line
from tell.ui.ui_root import FULL, UiRoot

TAIL = 1 << 16  # bytes of a log that are looked at
MOST = 4  # questions at once: each reads data and may hold a model's tokenizer


@dataclass(frozen=True)
class Job:
    """One command by its key, e.g. ``tune runs/tickets-1``; a later start of that key replaces it.

    Attributes:
        root: where it runs.
        kind: folder of its files: ``jobs``, or ``questions``, which are removed when they are old.
    """

    root: UiRoot
    key: str
    kind: str = "jobs"

    def file(self, suffix: str) -> Path:
        """Its ``.json``, ``.log``, ``.lock`` or ``.out``, what it prints with ``--json``."""
        return self.root.state / self.kind / (hashlib.sha256(self.key.encode()).hexdigest()[:20] + suffix)

    def record(self) -> dict[str, Any]:
        """``pid``, ``created`` and ``started``, by the clock of files; empty where nothing was started."""
        return read_facts(self.file(".json"))

    @property
    def command(self) -> list[str]:
        """The arguments it was started with; empty where it was not."""
        found = self.record().get("command")
        return [str(argument) for argument in found] if isinstance(found, list) else []

    def process(self) -> psutil.Process | None:
        """The process, while it runs; the number alone may have become another's."""
        return find_process(self.record())

    def start(self, arguments: Sequence[str], *, of: str = "") -> None:
        """Start ``tell ARGUMENTS`` unless it runs (or has run of the same): in a session of its own, no shell.

        Raises:
            TellError: the log cannot be written.
        """
        with self.alone():
            if self.process() is None and not (of and self.record().get("of") == of):
                self._start(list(arguments), of)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other tabs from starting or forgetting it; may be entered again inside.

        Raises:
            TellError: a file cannot be written, or the command cannot be started.
        """
        make_folder(self.file("").parent)
        try:
            with FileLock(self.file(".lock"), is_singleton=True):
                yield
        except (OSError, ValueError) as error:  # ValueError: a character that no argument can have
            what = f"cannot be started ({error})"
            raise TellError(what, where=self.key.partition(" ")[0], remedy=FULL) from error

    def _start(self, arguments: list[str], of: str) -> None:
        command, env = [sys.executable, "-m", "tell", *arguments], {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        started = time.time()
        with self.file(".out").open("wb") as out, self.file(".log").open("wb") as log:
            apart = partial(subprocess.Popen, cwd=self.root.path, env=os.environ | env, start_new_session=True)
            into = out if "--json" in arguments else log
            process = apart(command, stdin=subprocess.DEVNULL, stdout=into, stderr=log)
        created = psutil.Process(process.pid).create_time()  # before anybody has waited for it, so that it is there
        threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie
        facts = {"key": self.key, "command": ["tell", *arguments], "pid": process.pid, "of": of}
        try:
            write_json(self.file(".json"), facts | {"created": created, "started": started})
        except TellError:  # without a record nobody would find it
            process.kill()
            raise

    def stop(self) -> psutil.Process | None:
        """Send SIGTERM to the process; which it was."""
        if (process := self.process()) is not None:
            with suppress(psutil.Error):
                process.terminate()
        return process

    def told(self, arguments: Sequence[str], *, of: str) -> tuple[dict[str, Any], str] | None:
        """What ``tell ARGUMENTS`` prints with ``--json`` of files in one state, and its error; None until it has ended.

        It is started once for each state, and waits while `MOST` others run.
        """
        if self.record().get("of") != of:
            records = map(read_facts, self.file("").parent.glob("*.json"))
            if sum(find_process(found) is not None for found in records) >= MOST:
                return None
            self.start(arguments, of=of)
        if self.process() is not None:
            return None
        facts = read_facts(self.file(".out"))
        return facts, "" if facts and "error" not in facts else self.ended()

    def forget(self) -> None:
        """Let `told` ask again, unless the process runs."""
        with self.alone() if self.record() else nullcontext():
            if self.process() is None:
                self.file(".json").unlink(missing_ok=True)

    def lines(self, most: int = 12) -> list[str]:
        """The last lines of the log, each made safe to show."""
        text = self.log()[-TAIL:].decode("utf-8", "replace")
        return [one_line(line) for line in text.splitlines() if line.strip()][-most:]

    def log(self) -> bytes:
        with suppress(OSError):
            return self.file(".log").read_bytes()
        return b""

    def error(self) -> str:
        """The line that says why the command ended; empty where it runs or has ended well."""
        lines = [] if self.process() is not None else reversed(self.lines())
        return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")

    def ended(self) -> str:
        """How a command ended that was to go on or to leave something; empty where it runs or was not started."""
        if self.process() is not None or not self.record():
            return ""
        last = "".join(self.lines(1))
        return self.error() or (f"it ended; its last line: {last}" if last else "it ended without a word")
