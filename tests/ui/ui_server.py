"""`tell ui` as a command, for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
PATIENCE = 120  # seconds until a test gives up; nothing is timed


def until(ready: Callable[[], object]) -> object:
    """The first true value of a call."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


class UiServer:
    """A page server of a root, as a process of its own.

    Attributes:
        address: with the token; ``base`` is without it.
    """

    def __init__(self, root: Path, home: Path, *, port: int = 0) -> None:
        self.said = Path(tempfile.mkdtemp()) / "said"
        env = os.environ | {"PYTHONPATH": str(SOURCE), "TELL_HOME": str(home), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tell", "ui", str(root), f"--port={port}"]
        with self.said.open("w") as out:
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        found = until(lambda: re.search(r"http://\S+", self.said.read_text()) or self.process.poll())
        assert isinstance(found, re.Match), self.said.read_text()
        self.address = found[0]
        self.base = self.address.partition("/?")[0]
        self.port = int(self.base.rpartition(":")[2])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
