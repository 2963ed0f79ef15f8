"""Scorers, intervals, the verdict and the general probe. Imports no torch."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """``tell.evaluate`` is this package once anything in it is imported, and is the verb all the same."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from tell.study.evaluate import evaluate

        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
