"""The first answers of an arm while they are decoded, in a small file of the run for whoever watches it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tell.data.example import Example
from tell.errors import TellError
from tell.files import write_json
from tell.run.session import Session

SHOWN = 3  # test rows
EVERY = 1.0  # seconds between two writes


@contextmanager
def growing(path: Path, arm: str, test: Sequence[Example], session: Session) -> Iterator[None]:
    """Inside, what the session answers is written to a file: ``{"arm", "rows": [{"hash", "prompt", ..., "answer"}]}``.

    Without the file a run is the same, so that one that cannot be written is no error.

    Args:
        test: the rows that are answered, in the order of their prompts.
    """
    rows = [{"hash": row.hash, "prompt": row.question, "reference": row.answer} for row in test[:SHOWN]]
    ids: list[list[int]] = [[] for _ in rows]
    last = 0.0

    def take(number: int, token: int) -> None:
        nonlocal last
        if number >= len(ids):
            return
        ids[number].append(token)
        if (now := time.monotonic()) >= last + EVERY:
            last = now
            shown = [row | {"answer": session.chat.answer(own)} for row, own in zip(rows, ids, strict=True)]
            with suppress(TellError, OSError):
                write_json(path, {"arm": arm, "rows": shown})

    before, session.watch = session.watch, take
    try:
        yield
    finally:
        session.watch = before
        with suppress(OSError):
            path.unlink(missing_ok=True)
