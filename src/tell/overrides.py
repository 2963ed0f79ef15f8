"""Keys given on top of others: ``--set a.b=c``, flags and files, presets. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tell.errors import TellError
from tell.files import parse_yaml
from tell.nested import merge, nest

GENERAL_AMOUNTS = ("ratio", "tokens", "rows")  # keys that set the amount of general data


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Nested keys from ``a.b=c`` texts, later ones over earlier ones.

    Raises:
        TellError: a text without ``=``.
    """
    data: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise TellError(f"--set {text!r} is not of the form a.b=c", remedy="Write e.g. --set general.ratio=100.")
        data = override(data, nest(key.strip(), _parse_scalar(value)))
    return data


def override(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested keys of ``high`` over ``low``; one way of giving an amount replaces the ways given lower down."""
    low = {key: dict(value) if isinstance(value, Mapping) else value for key, value in low.items()}
    for section, ways in (("general", set(GENERAL_AMOUNTS)), ("task", {"rows", "tokens"})):
        upper = high.get(section)
        if isinstance(upper, Mapping) and isinstance(low.get(section), dict) and ways & set(upper):
            for way in ways - set(upper):
                low[section].pop(way, None)
    return merge(low, high)


def _parse_scalar(text: str) -> Any:
    try:
        value = parse_yaml(text, where="--set")
    except TellError:  # 2001-99-99, or "a: b: c": keep the text
        return text
    if isinstance(value, str):  # YAML 1.1 reads 1e4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value
