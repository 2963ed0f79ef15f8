"""Commands of `tell` that the page starts: processes of their own, found again by files after the page's restart."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from tell.errors import TellError
from tell.files import read_json, write_json
from tell.home import make_folder
from tell.shown import one_line
from tell.ui.ui_root import UiRoot

TAIL = 1 << 16  # bytes of a log that are read
SAME = 1.0  # seconds by which the start of one process may differ between two readings


@dataclass(frozen=True)
class Job:
    """One command by its key, e.g. ``tune runs/tickets-1``; a later start of that key replaces it.

    Attributes:
        root: where it runs.
    """

    root: UiRoot
    key: str

    @property
    def _stem(self) -> Path:
        return self.root.state / "jobs" / hashlib.sha256(self.key.encode()).hexdigest()[:20]

    @property
    def log(self) -> Path:
        return self._stem.with_suffix(".log")

    def record(self) -> dict[str, Any]:
        """``command`` (list), ``pid`` and ``created``; empty where nothing was started."""
        try:
            return read_json(self._stem.with_suffix(".json"), remedy="")
        except (FileNotFoundError, TellError):
            return {}

    def process(self) -> psutil.Process | None:
        """The process, while it runs; the number alone may have become another's."""
        found = self.record()
        pid, created = found.get("pid"), found.get("created")
        if not isinstance(pid, int) or not isinstance(created, int | float):
            return None
        try:
            process = psutil.Process(pid)
            same = abs(process.create_time() - created) < SAME and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OverflowError, ValueError):
            return None
        return process if same else None

    def start(self, arguments: Sequence[str]) -> None:
        """Start ``tell ARGUMENTS`` unless it runs: in a session of its own, its output in the log, no shell.

        Raises:
            TellError: the log cannot be written.
        """
        make_folder(self._stem.parent)
        with FileLock(self._stem.with_suffix(".lock")):  # two tabs
            if self.process() is not None:
                return
            try:
                with self.log.open("wb") as out:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "tell", *arguments],
                        cwd=self.root.path,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        env=os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
                    )
            except OSError as error:
                what = f"cannot be started ({error.strerror or error})"
                raise TellError(what, where=f"tell {arguments[0]}", remedy="Free disk space or memory.") from error
            threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie
            created = 0.0
            with suppress(psutil.Error):
                created = psutil.Process(process.pid).create_time()
            write_json(
                self._stem.with_suffix(".json"),
                {"key": self.key, "command": ["tell", *arguments], "pid": process.pid, "created": created},
            )

    def stop(self) -> bool:
        """Send SIGTERM to the process; whether there was one."""
        process = self.process()
        if process is not None:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)
        return process is not None

    def lines(self, most: int = 12) -> list[str]:
        """The last lines of the log, each made safe to show."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                text = file.read(TAIL).decode("utf-8", "replace")
        except OSError:
            return []
        return [one_line(line) for line in text.splitlines() if line.strip()][-most:]

    def error(self) -> str:
        """The line that says why the command ended; empty where it runs or has ended well."""
        if self.process() is not None:
            return ""
        return next((x.removeprefix("error: ") for x in reversed(self.lines()) if x.startswith("error: ")), "")
