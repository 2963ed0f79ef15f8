"""Servers on 127.0.0.1 for tests: in a thread of this process, or as the command `tell serve`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
from tell.serve.run_server import OwnAnswerer, bind, make_server

PATIENCE = 120  # seconds until a test gives up; nothing is timed


class Running:
    """A server in a thread.

    Attributes:
        replies: what it answers, in the order of the requests.
    """

    def __init__(self, answerer, *, host: str = "127.0.0.1", token: str | None = None) -> None:
        self.answerer, self.replies = answerer, []
        answer = answerer.answer

        async def kept(request):
            reply = await answer(request)
            self.replies.append(reply)
            return reply

        answerer.answer = kept
        listening = bind(host, 0)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = make_server(answerer, listening, token)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.answerer.close(self.server.stop)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@contextmanager
def running_answers(answerer, **options) -> Iterator[Running]:
    server = Running(answerer, **options)
    try:
        yield server
    finally:
        server.stop()
        answerer.free()


@contextmanager
def running(models, **options) -> Iterator[Running]:
    with running_answers(OwnAnswerer(models), **options) as server:
        yield server


def until(true) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@contextmanager
def command(*argv: str) -> Iterator[tuple[BaseProcess, str]]:
    """`tell serve` as a process: (process, address)."""
    receiving, sending = os.pipe()
    with open(receiving, encoding="utf-8") as said, open(sending, "w", encoding="utf-8") as stderr:
        process = forked.start(("serve", *argv, "--port", "0"), os.environ, stdout=stderr, stderr=stderr)
        stderr.close()
        lines: list[str] = []
        try:
            for line in said:
                lines.append(line.strip())
                if line.startswith("serving at "):
                    break
            assert lines and lines[-1].startswith("serving at "), lines
            yield process, lines[-1].split()[2].removesuffix("/v1")
        finally:
            process.kill()
            process.join(PATIENCE)


def copied(run: Path, folder: Path) -> Path:
    import shutil

    shutil.copytree(run, folder)
    return folder
