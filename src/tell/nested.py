"""Nested mappings addressed by dotted keys, and substitution of variables in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

VARIABLE = re.compile(r"\$\{([\w-]+)\}")


def fill(value: Any, variables: Mapping[str, str]) -> Any:
    """A nested value with every ``${name}`` replaced."""
    if isinstance(value, str):
        return VARIABLE.sub(lambda match: str(variables[match[1]]), value)
    if isinstance(value, Mapping):
        return {key: fill(inner, variables) for key, inner in value.items()}
    return [fill(inner, variables) for inner in value] if isinstance(value, list | tuple) else value


def nest(key: str, value: object) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for ``a.b``."""
    first, _, rest = key.partition(".")
    return {first: nest(rest, value) if rest else value}


def dig(nested: Mapping[str, Any], key: str) -> Any:
    """The value at ``a.b`` in ``{"a": {"b": value}}``."""
    value: Any = nested
    for part in key.split("."):
        value = value[part]
    return value


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything below nested mappings; lists are values."""
    for key, inner in nested.items():
        if isinstance(inner, Mapping) and inner:
            yield from flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def leaves(value: object, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything below nested mappings and lists."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner, key)
    else:
        yield key, value


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``, section by section."""
    out = dict(low)
    for key, value in high.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out
