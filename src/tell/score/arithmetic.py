"""A scorer for word problems: the number an answer ends with, as for GSM8K (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MARK = "####"


def last_number(text: str) -> Decimal | None:
    """The number after the last ``####``, or the last in the text where that mark is missing; None without one."""
    _, mark, tail = text.rpartition(MARK)
    numbers = _NUMBER.findall(tail)
    if not numbers:
        return None
    return Decimal((numbers[0] if mark else numbers[-1]).replace(",", ""))


def solved(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for each answer that ends with the number its reference ends with, for ``--set task.scorer=``.

    Raises:
        ValueError: a reference without a number.
    """
    out = []
    for answer, reference in zip(answers, references, strict=True):
        if (expected := last_number(reference)) is None:
            raise ValueError(f"the reference {reference[-40:]!r} has no number")
        out.append(float(last_number(answer) == expected))
    return out
