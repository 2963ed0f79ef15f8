"""Errors a user can fix: each says what is wrong, where, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from tell.shown import shorten

LONGEST = {"what": 1000, "where": 400, "remedy": 500}  # characters of each part: a quotation may be a whole file


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust panicked (tokenizers, safetensors): its error is not an Exception."""
    return type(error).__name__ == "PanicException"


def did_you_mean(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like ``name``, or like its last dotted part (``ratio`` for ``general.ratio``), or None."""
    names = list(dict.fromkeys(choices))
    if close := difflib.get_close_matches(name, names, n=1):
        return close[0]
    tails = {choice.rpartition(".")[2]: choice for choice in reversed(names)}
    close = difflib.get_close_matches(name.rpartition(".")[2], list(tails), n=1, cutoff=0.7)
    return tails[close[0]] if close else None


class TellError(Exception):
    """Bad input. The command line prints it as one line and exits with code 2.

    Args:
        what: what is wrong, with the offending value.
        where: file, row, key or argument, e.g. ``"tickets.jsonl:12"`` or ``"--model"``.
        remedy: what to do about it, as an imperative sentence.
        nearest: what was probably meant, from `did_you_mean`; ``what`` then ends with "did you mean ...?".
    """

    exit_code = 2

    def __init__(
        self, what: str, *, where: str | None = None, remedy: str | None = None, nearest: str | None = None
    ) -> None:
        what = shorten(f"{what}; did you mean {nearest}?" if nearest else what, LONGEST["what"])
        where, remedy = where and shorten(where, LONGEST["where"]), remedy and shorten(remedy, LONGEST["remedy"])
        self.what, self.where, self.remedy = what, where, remedy
        text = f"{where}: {what}" if where else what
        if remedy:
            text = f"{text if text[-1] in '.?!' else text + '.'} {remedy}"
        super().__init__(text)


class ConfigError(TellError):
    """A configuration key that is unknown, or whose value is invalid.

    Args:
        key: the key, e.g. ``"general.ratio"``, or a section whose keys exclude each other.
        problem: what is wrong with its value; None: the key is unknown.
        conflict: the keys of the section that are set and exclude each other.
    """

    def __init__(
        self,
        key: str,
        problem: str | None = None,
        *,
        where: str,
        conflict: Sequence[str] = (),
        remedy: str | None = None,
        nearest: str | None = None,
    ) -> None:
        self.key, self.problem, self.conflict = key, problem, conflict
        what = f"unknown key {key}" if problem is None else f"{key}: {problem}"
        super().__init__(what, where=where, remedy=remedy or f"Change {key}.", nearest=nearest)


class NotInstalled(TellError):
    """A package that an extra of tell-llm installs is missing."""

    def __init__(self, package: str, extra: str, *, where: str) -> None:
        super().__init__(f"{package} is not installed", where=where, remedy=f'pip install "tell-llm[{extra}]"')


def require_package(package: str, extra: str, *, where: str) -> None:
    """Fail early if the package of an extra is missing.

    Raises:
        NotInstalled: the package is missing.
    """
    if find_spec(package) is None:
        raise NotInstalled(package, extra, where=where)


class Unwritable(TellError):
    """A file or folder cannot be written."""


class Diverged(TellError):
    """The training loss is no longer a number."""


class Interrupted(TellError):
    """SIGINT or SIGTERM arrived; the run folder was left resumable."""

    exit_code = 130
