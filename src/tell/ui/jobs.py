"""Commands of `tell` that the page starts: processes of their own, found again by files after the page's restart."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from tell.errors import TellError
from tell.files import read_facts, write_json
from tell.home import make_folder
from tell.shown import one_line
from tell.ui.ui_root import UiRoot

TAIL = 1 << 16  # bytes of a log that are looked at
SAME = 1.0  # seconds by which the start of one process may differ between two readings


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
        """``pid`` and ``created``; empty where nothing was started."""
        return read_facts(self.file(".json"))

    @property
    def command(self) -> list[str]:
        """The arguments it was started with; empty where it was not."""
        found = self.record().get("command")
        return [str(argument) for argument in found] if isinstance(found, list) else []

    def process(self) -> psutil.Process | None:
        """The process, while it runs; the number alone may have become another's."""
        found = self.record()
        try:
            process = psutil.Process(int(found["pid"]))
            same = abs(process.create_time() - float(found["created"])) < SAME
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, LookupError, TypeError, ValueError, OverflowError):
            return None

    def start(self, arguments: Sequence[str], *, once: bool = False) -> None:
        """Start ``tell ARGUMENTS`` unless it runs (or has run): in a session of its own, no shell.

        Raises:
            TellError: the log cannot be written.
        """
        make_folder(self.file("").parent)
        try:
            with FileLock(self.file(".lock")):  # two tabs
                if self.process() is None and not (once and self.record()):
                    self._start(list(arguments))
        except (OSError, ValueError) as error:  # ValueError: a character that no argument can have
            what = f"cannot be started ({error})"
            raise TellError(what, where=f"tell {arguments[0]}", remedy="Free disk space or memory.") from error

    def _start(self, arguments: list[str]) -> None:
        command, env = [sys.executable, "-m", "tell", *arguments], {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        with self.file(".out").open("wb") as out, self.file(".log").open("wb") as log:
            apart = partial(subprocess.Popen, cwd=self.root.path, env=os.environ | env, start_new_session=True)
            into = out if "--json" in arguments else log
            process = apart(command, stdin=subprocess.DEVNULL, stdout=into, stderr=log)
        created = psutil.Process(process.pid).create_time()  # before anybody has waited for it, so that it is there
        threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie
        facts = {"key": self.key, "command": ["tell", *arguments], "pid": process.pid, "created": created}
        try:
            write_json(self.file(".json"), facts)
        except TellError:  # without a record nobody would find it
            process.kill()
            raise

    def stop(self) -> psutil.Process | None:
        """Send SIGTERM to the process; which it was."""
        if (process := self.process()) is not None:
            with suppress(psutil.Error):
                process.terminate()
        return process

    def told(self, arguments: Sequence[str]) -> tuple[dict[str, Any], str] | None:
        """What ``tell ARGUMENTS``, started once, prints with ``--json``, and its error; None while it runs."""
        self.start(arguments, once=True)
        if self.process() is not None:
            return None
        facts, last = read_facts(self.file(".out")), "".join(self.lines(1)) or "it ended without an answer"
        return facts, "" if facts and "error" not in facts else self.error() or last

    def forget(self) -> None:
        """Let `told` ask again, unless the process runs."""
        if self.process() is None:
            self.file(".json").unlink(missing_ok=True)

    def lines(self, most: int = 12) -> list[str]:
        """The last lines of the log, each made safe to show."""
        text = b""
        with suppress(OSError):
            text = self.file(".log").read_bytes()[-TAIL:]
        return [one_line(line) for line in text.decode("utf-8", "replace").splitlines() if line.strip()][-most:]

    def error(self) -> str:
        """The line that says why the command ended; empty where it runs or has ended well."""
        lines = [] if self.process() is not None else reversed(self.lines())
        return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
