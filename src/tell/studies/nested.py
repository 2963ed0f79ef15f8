"""Nested mappings by dotted keys, and the variables in them."""

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


def nest(key: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for ``a.b``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def dig(nested: Mapping[str, Any], key: str) -> Any:
    """The value at ``a.b`` in ``{"a": {"b": value}}``."""
    value: Any = nested
    for part in key.split("."):
        value = value[part]
    return value


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything below nested mappings; lists are values."""
    for key, inner in nested.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(inner, Mapping) and inner:
            yield from flat(inner, name)
        else:
            yield name, inner


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything below nested mappings and lists."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner, prefix)
    else:
        yield prefix, value
