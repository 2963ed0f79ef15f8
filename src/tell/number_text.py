"""Numbers as pages, screen and sentences show them, each in its unit."""

from __future__ import annotations

import math
import re
from typing import Literal, TypeGuard

Unit = Literal["share", "points", "score", "nats", "plain"]
"""``share``: 0 to 1, written in per cent; ``points``: a difference of shares; ``score``: 0 to 100; ``nats``: a loss."""
NARROW = "\u202f"
"""The space before a per cent sign, at which no line breaks."""
_DECIMALS: dict[Unit, int] = {"share": 1, "points": 1, "score": 1, "nats": 3, "plain": 3}
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_KEYBOARD = str.maketrans({NARROW: " ", "−": "-", "–": "-"})


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def has_interval(ci: object) -> TypeGuard[tuple[float, float]]:
    """Whether it is a pair of finite numbers."""
    return isinstance(ci, list | tuple) and len(ci) == 2 and all(map(is_number, ci))


def factor(unit: Unit) -> float:
    """Factor by which values are multiplied for display."""
    return 100.0 if unit in ("share", "points") else 1.0


def show(
    value: object, unit: Unit = "plain", *, sign: bool = False, digits: int | None = None, exact: bool = False
) -> str:
    """A number in its unit, as typeset: ``92.6 %``, ``−3.1``, ``0.482``; an en dash where there is none.

    Args:
        sign: write the plus of a positive number.
        digits: decimals; by default one, or three of a loss or a number of unknown range.
        exact: as many decimals as keep a value apart from 0 and from 100 %, without zeros at the end.
    """
    if not is_number(value):
        return "–"
    digits, scaled = _DECIMALS[unit] if digits is None else digits, factor(unit) * value
    text = f"{scaled:{'+' if sign else ''}.{digits}f}"
    if exact:
        ends = (0.0, 100.0) if factor(unit) > 1 else (0.0,)
        while digits < 6 and round(scaled, digits) in ends and scaled not in ends:
            digits += 1
        text = f"{round(scaled, digits):{'+' if sign else ''}.6g}"
    text = re.sub(r"^[+-](?=0(\.0*)?$)", "", text).replace("-", "−")
    return f"{text}{NARROW}%" if unit == "share" else text


def show_interval(ci: object, unit: Unit = "plain", *, sign: bool = False, exact: bool = False) -> str:
    """``90.0 to 96.0``; empty where there is no interval."""
    bare: Unit = "points" if unit == "share" else unit
    return " to ".join(show(limit, bare, sign=sign, exact=exact) for limit in ci) if has_interval(ci) else ""


def as_typed(text: str) -> str:
    """Shown numbers in the characters of a keyboard, for terminals and plain text."""
    return text.translate(_KEYBOARD)


def show_count(value: object) -> str:
    """A whole number with thousands separated, else up to two decimals."""
    if not is_number(value):
        return "–"
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.2f}"


def show_power(value: object) -> str:
    """A large number as ``1.2 × 10¹⁴``."""
    if not is_number(value) or value < 1e6:
        return show_count(value) if is_number(value) and value > 0 else "–"
    head, _, exponent = f"{value:.1e}".partition("e+")
    return f"{head} × 10{exponent.lstrip('0').translate(_RAISED)}"


def show_duration(seconds: object) -> str:
    """``48 s``, ``3 min 30 s``, ``2 h 5 min``."""
    if not is_number(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
