"""Errors a user can mend: each says what is wrong, where, and the remedy."""

from __future__ import annotations

from tell.shown import shorten

LONGEST = {"what": 1000, "where": 400, "remedy": 500}  # characters of each part: what they quote may be a whole file


def first_line(error: BaseException) -> str:
    """What an error says, as far as one line goes; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up (tokenizers, safetensors): its error is no Exception."""
    return type(error).__name__ == "PanicException"


class TellError(Exception):
    """Bad input. The command line prints it as one line and exits with code 2.

    Args:
        what: what is wrong, with the offending value.
        where: file, row, key or argument, e.g. ``"tickets.jsonl:12"`` or ``"--model"``.
        remedy: what to do about it, as an imperative sentence.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        what = shorten(what, LONGEST["what"])
        where, remedy = where and shorten(where, LONGEST["where"]), remedy and shorten(remedy, LONGEST["remedy"])
        self.what, self.where, self.remedy = what, where, remedy
        text = f"{where}: {what}" if where else what
        if remedy:
            text = f"{text if text[-1] in '.?!' else text + '.'} {remedy}"
        super().__init__(text)


class Diverged(TellError):
    """The training loss is no longer a number."""


class Interrupted(TellError):
    """SIGINT or SIGTERM arrived; the run folder was left resumable."""

    exit_code = 130
