"""A user's own scoring function, named ``package.module:function``."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, cast

import numpy as np

from tell.errors import TellError
from tell.score.means import check_pairs, mean_metric
from tell.score.scored import Metric
from tell.score.scorer_code import forget_changed, scorers_first

RENAMED = {"tell.evaluate.arithmetic:solved": "tell.score.arithmetic:solved"}  # in finished recipes


class CustomScorer:
    """Scorer that calls ``function(answers, references)`` and averages what it returns.

    The function gets two lists of n strings and returns n numbers, higher being better, or a mapping from metric name
    to n numbers. A metric whose numbers are all 0 or 1 is binary. A single list is named after the function;
    ``primary`` is that name, or the first key of a returned mapping.

    Args:
        spec: ``package.module:function``; the current directory is searched first.

    Raises:
        TellError: the spec has another form, the module or the function is not found, or the import fails.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._function = _load(spec)
        self.primary = spec.rpartition(":")[2].rpartition(".")[2]

    def is_task_format(self, answer: str) -> None:
        """None: the format is not known."""

    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
        """Metrics by name, each over the same n rows.

        Raises:
            TellError: the function raised, or returned another length, no metric, or no finite numbers.
        """
        check_pairs(answers, references)
        try:
            with scorers_first():  # it may import its neighbours late
                result = self._function(list(answers), list(references))
        except (Exception, SystemExit) as error:
            raise self._wrong(f"raised {type(error).__name__}: {error}", "Fix the function.") from error
        lists = result if isinstance(result, Mapping) else {self.primary: result}
        if not lists:
            raise self._wrong("returned no metric", "Return at least one list of numbers.")
        metrics = {}
        for key, values in lists.items():
            if not isinstance(key, str):
                raise self._wrong(f"named a metric {key!r}", "Name metrics with strings.")
            numbers = self._numbers(key, values, len(answers))
            metrics[key] = mean_metric(numbers, binary=bool(np.isin(numbers, (0.0, 1.0)).all()))
        self.primary = next(iter(metrics))
        return metrics

    def _numbers(self, key: str, values: object, n: int) -> np.ndarray:
        if isinstance(values, (str, bytes)) or not isinstance(values, Sized):
            raise self._wrong(f"returned {type(values).__name__} for {key}", "Return a list of numbers.")
        if len(values) != n:
            raise self._wrong(f"returned {len(values)} numbers for {n} answers ({key})", "Return one for each answer.")
        numbers = np.empty(n)
        for i, value in enumerate(cast(Iterable[Any], values)):
            try:
                numbers[i] = float(value)
            except (TypeError, ValueError):
                numbers[i] = np.nan
            if not np.isfinite(numbers[i]):
                raise self._wrong(f"returned {value!r} for answer {i + 1} ({key})", "Return finite numbers.")
        return numbers

    def _wrong(self, what: str, remedy: str) -> TellError:
        return TellError(what, where=f"scorer {self.spec}", remedy=remedy)


def _load(spec: str) -> Callable[[list[str], list[str]], Any]:
    where = f"scorer {spec}"
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise TellError("is not of the form package.module:function", where=where, remedy="Write e.g. my_scores:f1.")
    forget_changed(spec)
    module_name = RENAMED.get(spec, spec).partition(":")[0]
    try:
        with scorers_first():
            target = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        remedy = "Run in the folder of that module, or install it."
        raise TellError(f"module {error.name} is not found", where=where, remedy=remedy) from error
    except (Exception, SystemExit) as error:  # anything that the user's module does on import
        what = f"importing {module_name} failed with {type(error).__name__}: {error}"
        raise TellError(what, where=where, remedy="Fix the module.") from error
    for part in path.split("."):
        if not hasattr(target, part):
            close = difflib.get_close_matches(part, dir(target), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TellError(f"{module_name} has no {path}{hint}", where=where, remedy="Name a function it defines.")
        target = getattr(target, part)
    if not callable(target):
        raise TellError(f"{path} is not a function", where=where, remedy="Name a function.")
    return target
