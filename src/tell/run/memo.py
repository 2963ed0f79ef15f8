"""What the untuned model has made, kept as long as it stays in memory: runs of a study share it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")
_made: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()  # by model


def once(model: object, key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` returns, the first time; the same again for the same model and key.

    Args:
        model: the untuned model, without an adapter.
        key: all that the result depends on besides the weights.
    """
    known = _made.setdefault(model, {})
    if key not in known:
        known[key] = make()
    return known[key]
