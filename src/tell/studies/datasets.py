"""The data sets a recipe builds: made once, under a name that holds the builder, its options and its sources."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tell.paper
from tell.errors import TellError, did_you_mean
from tell.files import atomic_folder, write_json
from tell.progress import Display
from tell.studies.content import content_hash
from tell.studies.nested import fill
from tell.studies.recipe import Recipe
from tell.studies.study_folder import Root

DATA_FORMAT = 1  # raise when a builder makes other rows of the same sources and options

OURS = frozenset({"out", "progress", "teacher"})  # a teacher is no option but an object


def build_data(recipe: Recipe, root: Root, display: Display, *, where: str = "recipe") -> dict[str, str]:
    """The recipe's variables, with the folders of its data sets; those that lie there are not made again.

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
    parameters = {n: p for n, p in inspect.signature(make).parameters.items() if n not in OURS}
    names = list(parameters)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise TellError(f"lacks {name}", where=where, remedy=f"Add {name}: to it.")
    for option in options:
        if option not in names:
            raise TellError(
                f"unknown option {option}",
                where=where,
                remedy=f"Use {', '.join(names)}.",
                nearest=did_you_mean(option, names),
            )
    known = {key: _content(value) for key, value in options.items()}
    text = json.dumps({"format": DATA_FORMAT, "dataset": dataset, "options": known}, sort_keys=True)
    key = f"{dataset}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder = (root.data / key).resolve()
    if folder.exists():
        return folder
    with root.lock(key, "data"):
        if not folder.exists():  # another study may have made it while we waited
            with atomic_folder(folder) as temporary:
                built = make(**options, out=temporary)
                write_json(temporary / "build.json", {"dataset": dataset, "options": options})
            for line in built.lines():
                display.note(line.replace(str(temporary), str(folder)))
    return folder


def _builder(dataset: str, where: str) -> Callable[..., Any]:
    """``tell.build_<name>`` of the verb ``tell build <name>``."""
    module = dataset.replace("-", "_")
    if not module.isidentifier() or find_spec(f"tell.paper.{module}") is None:
        places = [p.stem.replace("_", "-") for p in Path(tell.paper.__path__[0]).glob("*.py")]
        known = [name for name in places if hasattr(_module(name), f"build_{name.replace('-', '_')}")]
        raise TellError(
            f"no builder makes {dataset!r}",
            where=where,
            remedy=f"Use {' or '.join(known)}.",
            nearest=did_you_mean(dataset, known),
        )
    return getattr(_module(dataset), f"build_{module}")


def _module(dataset: str) -> Any:
    return import_module(f"tell.paper.{dataset.replace('-', '_')}")


def _content(value: Any) -> Any:
    """An option for the key: a path by what lies there."""
    if isinstance(value, Mapping):
        return {key: _content(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_content(inner) for inner in value]
    if isinstance(value, str) and len(value) < 4096 and Path(value).exists():
        return {"content": content_hash(Path(value))}
    return value
