"""Memoises base-model results while the model is loaded, so that the runs of a study share them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")
_made: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()  # by model


def once(model: object, key: Hashable, make: Callable[[], T]) -> T:
    """The result of ``make``, memoised by model and key.

    Args:
        model: the untuned model, without an adapter.
        key: all that the result depends on besides the weights.
    """
    known = _made.setdefault(model, {})
    if key not in known:
        known[key] = make()
    return known[key]
