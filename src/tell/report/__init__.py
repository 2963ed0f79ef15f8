"""The page of a run and its drawings, from a run folder alone. Imports no torch."""

import sys
from types import ModuleType
from typing import Any

from tell.report.compare import compare
from tell.report.page import render, write_report

__all__ = ["compare", "render", "write_report"]


class _Callable(ModuleType):
    """``tell.report`` is this package once anything in it is imported, and is the verb all the same."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from tell.report.verb import report

        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
