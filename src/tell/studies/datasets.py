"""Builds the data sets of a recipe, each once, under a hash of its builder, options and source files."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import tell.paper
from tell.errors import TellError, did_you_mean
from tell.files import atomic_folder, write_json
from tell.nested import fill
from tell.progress import Display
from tell.studies.content import content_hash
from tell.studies.recipe import Recipe
from tell.studies.study_folder import Root

DATA_FORMAT = 1  # increment when a change to a builder changes its rows
NOT_OPTIONS = frozenset({"out", "progress", "teacher"})  # parameters that a recipe cannot set


def build_data(recipe: Recipe, root: Root, display: Display, *, where: str = "recipe") -> dict[str, str]:
    """The recipe's variables and the folders of its data sets; existing data sets are not built again.

    Raises:
        TellError: no such builder or option, or what the builder refuses.
    """
    variables = dict(recipe.variables)
    for name, options in recipe.build.items():
        filled = fill(options, variables)
        variables[name] = str(_built(str(filled.pop("dataset")), filled, root, display, f"{where}: build.{name}"))
    return variables


def _built(dataset: str, options: Mapping[str, Any], root: Root, display: Display, where: str) -> Path:
    make = _builder(dataset, where)
    parameters = {n: p for n, p in inspect.signature(make).parameters.items() if n not in NOT_OPTIONS}
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise TellError(f"lacks {name}", where=where, remedy=f"Add {name}: to it.")
    for option in options:
        if option not in parameters:
            remedy, close = f"Use {', '.join(parameters)}.", did_you_mean(option, parameters)
            raise TellError(f"unknown option {option}", where=where, remedy=remedy, nearest=close)
    known = {key: _content(value) for key, value in options.items()}
    text = json.dumps({"format": DATA_FORMAT, "dataset": dataset, "options": known}, sort_keys=True)
    key = f"{dataset}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder = (root.data / key).resolve()
    if folder.exists():
        return folder
    with root.lock(key, "data"):
        if not folder.exists():  # another study may have built it while we waited
            with atomic_folder(folder) as temporary:
                built = make(**options, out=temporary)
                write_json(temporary / "build.json", {"dataset": dataset, "options": options})
            for line in built.lines():
                display.note(line.replace(str(temporary), str(folder)))
    return folder


def _builder(dataset: str, where: str) -> Callable[..., Any]:
    """``tell.build_<name>`` of the verb ``tell build <name>``."""
    modules = [module.name for module in iter_modules(tell.paper.__path__)]
    name = dataset.replace("-", "_")
    if name not in modules or not hasattr(_module(name), f"build_{name}"):
        known = [other.replace("_", "-") for other in modules if hasattr(_module(other), f"build_{other}")]
        remedy, close = f"Use {' or '.join(known)}.", did_you_mean(dataset, known)
        raise TellError(f"no builder makes {dataset!r}", where=where, remedy=remedy, nearest=close)
    return getattr(_module(name), f"build_{name}")


def _module(name: str) -> object:
    return import_module(f"tell.paper.{name}")


def _content(value: object) -> object:
    """An option as it is hashed: a path by its content."""
    if isinstance(value, Mapping):
        return {key: _content(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_content(inner) for inner in value]
    if isinstance(value, str) and len(value) < 4096 and Path(value).exists():
        return {"content": content_hash(Path(value))}
    return value
