"""Rows of the decoding engine: what is asked, how far each has come, and which wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from tell.decode.sampler import uniforms

if TYPE_CHECKING:
    from tell.decode.grammar import Mask
    from tell.decode.guide import Guide


@dataclass(slots=True)
class Answer:
    """Decoded tokens without the stop token, and why decoding ended."""

    ids: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt for `Engine.serve`.

    Attributes:
        prompt: token ids, at least one.
        limit: most new tokens; prompt and answer fit into the model's context.
        seed: its random numbers are those of `Engine.generate` for a single prompt with that seed.
        on_token: gets each token as it comes; if it returns True, that token is the answer's last.
        on_end: gets the finished answer.
        guide, mask: as of `Engine.generate`; the decoding of masked rows has no repetition penalty.
    """

    prompt: Sequence[int]
    limit: int
    seed: int
    on_token: Callable[[int], object]
    on_end: Callable[[Answer], object]
    guide: Guide | None = None
    mask: Mask | None = None


Arrivals = Callable[[int, Callable[[Request], bool]], Sequence[Request]]
"""``arrivals(free, fits)`` returns at most ``free`` requests that join a running batch, each of which ``fits``."""


@dataclass(slots=True, eq=False)
class Row:
    """An answer under way."""

    prompt: list[int]  # after the shared prefix
    limit: int
    draws: np.ndarray
    answer: Answer
    guide: Guide | None = None
    mask: Mask | None = None
    on_token: Callable[[int], object] | None = None
    on_end: Callable[[Answer], object] | None = None
    cached: int = 0  # tokens, after the shared prefix, whose keys and values are cached

    @classmethod
    def of(cls, request: Request) -> Row:
        draws = uniforms(request.seed, 0, request.limit)
        steering = (request.guide, request.mask, request.on_token, request.on_end)
        return cls(list(request.prompt), request.limit, draws, Answer(), *steering)

    @property
    def whole(self) -> list[int]:
        """Its tokens after the shared prefix."""
        return self.prompt + self.answer.ids

    @property
    def fresh(self) -> list[int]:
        """The tokens of the answer that are not cached yet, at least one."""
        return self.answer.ids[self.cached - len(self.prompt) :]

    def append(self, tokens: Sequence[int]) -> bool:
        """Go on by tokens, as far as the answer may; whether it is complete."""
        for token in tokens:
            if len(self.answer.ids) >= self.limit:
                return True
            if self.guide is not None and self.mask is not None:
                self.guide.decision(self.answer.ids)  # it is to see every prefix, those before forced tokens too
            self.answer.ids.append(token)
            if self.on_token and self.on_token(token) is True:
                self.answer.finish = "stop"
                return True
        if self.mask is not None and self.mask.ended:
            self.answer.finish = "stop"  # also at the limit: nothing could follow
            return True
        return len(self.answer.ids) >= self.limit

    def end(self) -> None:
        """Hand over the finished answer."""
        if self.on_end:
            self.on_end(self.answer)


def waiting_rows(rows: Sequence[Row], prefix: list[int]) -> list[Row]:
    """Rows that wait for their prompts to be computed, taken from the end; the prefix is taken off their prompts."""
    for row in rows:
        row.prompt = row.prompt[len(prefix) :]
    wait = []
    for row in rows:  # tokens that an answer must begin with are fed with its prompt; they may be all of it
        if row.mask is not None and row.append(row.mask.start()):
            row.end()
        else:
            wait.append(row)
    return longest_last(wait)


def longest_last(rows: Sequence[Row]) -> list[Row]:
    """Waiting rows, taken from the end: long prompts first, so that rows prefilled together are alike in length."""
    return sorted(reversed(rows), key=lambda row: len(row.prompt))  # of equal ones the first is taken first
