"""New rows for a task that is split already: every old row stays in its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tell.data.example import Example, Message
from tell.data.split import PARTS, Splits, prompt_groups, split


@dataclass(frozen=True)
class Grown:
    """The grown parts.

    Attributes:
        parts: old rows first, in their order, then the new ones in theirs.
        new: the new rows of each part, by its name.
        repeated: rows that equal an old row in full and were dropped.
        bound: new rows that went into the part where their prompt already was.
    """

    parts: Splits
    new: dict[str, list[Example]]
    repeated: int
    bound: int


def grow(old: Splits, more: Sequence[Example], *, seed: int, test_fraction: float, validation_fraction: float) -> Grown:
    """Old rows where they are, and new ones split by seed and content, whatever their order in the file.

    A new row whose prompt an old row has goes into that row's part, since no test prompt may be trained on. The others
    are split as `split` does; where they have one prompt only, they are trained on.
    """
    before = {name: getattr(old, name) for name in PARTS}
    known = {example.hash for rows in before.values() for example in rows}
    fresh = [example for example in more if example.hash not in known]
    place: dict[tuple[Message, ...], str] = {e.prompt: name for name, rows in before.items() for e in rows}
    free = sorted((e for e in fresh if e.prompt not in place), key=lambda e: e.hash)
    bound = len(fresh) - len(free)
    if len(prompt_groups(free)) > 1:
        drawn = split(free, seed=seed, test_fraction=test_fraction, validation_fraction=validation_fraction)
        place |= {e.prompt: name for name in PARTS for e in getattr(drawn, name)}
    new: dict[str, list[Example]] = {name: [] for name in PARTS}
    for example in fresh:
        new[place.get(example.prompt, "train")].append(example)
    grown = {name: [*before[name], *new[name]] for name in PARTS}
    return Grown(Splits(**grown, exact_duplicates=0), new, len(more) - len(fresh), bound)
