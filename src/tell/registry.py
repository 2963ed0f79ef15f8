"""Registries: values chosen by name and registered by a decorator where they are defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """Values by name; call it with a name to get the decorator. A name that is taken is an error.

    Args:
        kind: what the values are, for the error.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __call__(self, name: str) -> Callable[[T], T]:
        def add(value: T) -> T:
            if name in self:
                raise ValueError(f"two {self.kind}s are named {name}: {name!r} is declared twice")
            self[name] = value
            return value

        return add
