"""The first answers of an arm while they are decoded, in a small file of the run for whoever watches it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tell.data.example import Example
from tell.errors import TellError
from tell.files import write_json
from tell.rows.template import ChatTokenizer

SHOWN = 3  # test rows
EVERY = 1.0  # seconds between two writes


class Growing:
    """Writes ``answering.json``: ``{"arm", "rows": [{"hash", "prompt", "reference", "answer"}]}``.

    Its absence costs nothing but the view, so that a file that cannot be written is no error.

    Args:
        path: of the file; None: nothing is written.
        test: the rows that are answered, in the order of their prompts.
    """

    def __init__(self, path: Path | None, arm: str, test: Sequence[Example], chat: ChatTokenizer) -> None:
        self._path, self._arm, self._chat, self._last = path, arm, chat, 0.0
        self._rows = [
            {"hash": row.hash, "prompt": row.question, "reference": row.answer} for row in test[: SHOWN if path else 0]
        ]
        self._ids: list[list[int]] = [[] for _ in self._rows]

    def take(self, number: int, token: int) -> None:
        """A token of the answer to a test row, by its number from 0."""
        if number >= len(self._ids):
            return
        self._ids[number].append(token)
        if (now := time.monotonic()) >= self._last + EVERY:
            self._last = now
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        rows = [{**row, "answer": self._chat.answer(ids)} for row, ids in zip(self._rows, self._ids, strict=True)]
        with suppress(TellError, OSError):
            write_json(self._path, {"arm": self._arm, "rows": rows})

    def end(self) -> None:
        """Remove the file: the answers are complete."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
