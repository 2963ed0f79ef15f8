"""Teachers write the thought of each Halu-CoT-JSON answer; the label is always the human one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tell.paper.halueval import HaluRow, Label

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Thought:
    """A teacher's result for one row: a thought, or the reason there is none."""

    text: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of a million prompt and completion tokens, in any currency; None where unknown."""

    prompt: float | None = None
    completion: float | None = None


@dataclass(slots=True)
class Usage:
    """Usage of an endpoint: answers, tokens, cost.

    Attributes:
        answers: answers received in this run, discarded ones included.
        reused: rows taken from the cache of an earlier run.
        prompt_tokens, completion_tokens: as the endpoint counted them, this run.
    """

    answers: int = 0
    reused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prices: Prices = Prices()

    @property
    def cost(self) -> float | None:
        """Cost of this run, or None without prices."""
        if self.prices == Prices():
            return None
        prompt, completion = self.prices.prompt or 0, self.prices.completion or 0
        return (self.prompt_tokens * prompt + self.completion_tokens * completion) / 1e6

    def line(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.4f}"
        reused = f"; {self.reused:,} rows reused from an earlier run" if self.reused else ""
        return (
            f"{self.answers:,} answers, {self.prompt_tokens:,} tokens in, "
            f"{self.completion_tokens:,} tokens out{cost}{reused}"
        )


class Teacher(Protocol):
    """Writes thoughts; ``usage`` is None for a free teacher."""

    @property
    def name(self) -> str: ...
    @property
    def usage(self) -> Usage | None: ...

    def write(self, rows: Sequence[HaluRow], *, cache: Path, progress: Progress | None = None) -> list[Thought]:
        """A thought for each row, in order.

        Args:
            rows: rows to explain, with their labels.
            cache: JSON Lines file of finished rows, so that an interrupted run can continue.
            progress: called with (rows done, rows in all).
        """
        ...


# Between a negation and the negated word: "no part of it is a hallucination", but not "no basis, so a hallucination".
_LINK = r"(?:(?!(?:and|so|therefore|thus|hence|which|making|but|because)\b)[\w']+\s+){0,8}"
_DENIED = re.compile(
    rf"\b(?:no|none|nothing|without|free of|free from|zero)\s+{_LINK}hallucinat"
    r"|(?:\bnot|n't)\s+(?:(?:a|an|any|contain|include|exhibit|show|present|constitute|have|appear|to|be|been|considered"
    r"|seem|as|count|qualify)\s+){0,5}(?:\w+\s+)?hallucinat"
    r"|hallucinat\w*\s+(?:is|are|was|were|has been|have been)\s+(?:not|absent)"
)
_NAMED = re.compile(
    r"hallucinat\w*\W{0,3}(?:label|field|verdict)?\W{0,3}(?:is|should be|must be|:|=)?\W{1,4}(yes|no)\b\W*$"
)


def concluded(thought: str) -> Label | None:
    """The label that the last sentence of a thought concludes with, or None."""
    sentences = re.split(r"(?<=[.!?])\s+", thought.strip().lower())
    last = sentences[-1]
    if named := _NAMED.search(last):
        return "yes" if named[1] == "yes" else "no"
    if "hallucinat" not in last:
        return None
    return "no" if _DENIED.search(last) else "yes"


def contradicts(thought: str, label: Label) -> bool:
    """Whether a thought ends on the opposite of the human label."""
    return concluded(thought) not in (None, label)
