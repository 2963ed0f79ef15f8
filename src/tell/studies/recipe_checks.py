"""Checks of a recipe beyond the types of its keys; each error names the place and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tell.config import Config, check_keys
from tell.errors import TellError, did_you_mean
from tell.nested import VARIABLE, flat, leaves, nest
from tell.overrides import GENERAL_AMOUNTS

if TYPE_CHECKING:
    from tell.studies.recipe import Part

Product = Mapping[str, Sequence[Any]]  # key of a run to its values

OF_A_PRODUCT = ("arms", "seeds")  # keys of a product that are not keys of a run
RIVALS = (tuple(f"general.{way}" for way in GENERAL_AMOUNTS), ("task.tokens", "task.rows"))  # ways to give one amount
REFUSED = {  # keys of a run that a recipe cannot set, and what to do instead
    "seed": "Set seeds in the recipe or --seeds, for the whole study.",
    "eval.arms": "Set arms in the recipe, for the whole study.",
    "out": "Set --out, for the whole study.",
    "max_minutes": "Leave it out: cells cut short by the clock cannot be compared.",
}
MOST_CELLS = 10_000


def check_size(grid: Iterable[Product], known: Product, where: str) -> None:
    """Refuse a grid that no machine could run, before its points are made; ``known``: the recipe's arms and seeds."""
    total = 0
    for product in grid:
        arms, seeds = (product.get(key, known[key]) for key in OF_A_PRODUCT)
        points = math.prod(len(values) for key, values in product.items() if key not in OF_A_PRODUCT)
        total += points * max(1, len(arms)) * len(seeds)
    if total > MOST_CELLS:
        what = f"the grid has {total:,} cells; a study has at most {MOST_CELLS:,}"
        raise TellError(what, where=where, remedy="Use fewer values per key, or fewer arms or seeds.")


def check_run_keys(nested: Mapping[str, Any], where: str, part: str) -> None:
    """Refuse keys of ``part`` that a run does not have, or that a recipe cannot set."""
    check_keys(nested, Config, f"{where}: {part}")
    for key, _ in leaves(nested):
        if key in REFUSED:
            raise TellError(f"{key} is set under {part}", where=where, remedy=REFUSED[key])


def check_set(nested: Mapping[str, Any], grid: Sequence[Product]) -> None:
    """Refuse a ``--set`` of what a recipe cannot set, or of what the grid would override."""
    for key, _ in flat(nested):
        where = f"--set {key}"
        if key in REFUSED:
            raise TellError("is not set for single runs of a study", where=where, remedy=REFUSED[key])
        others = [other for ways in RIVALS if key in ways for other in ways if other != key]
        for other in (other for product in grid for other in others if other in product):
            remedy = f"Set {other} instead, or change the recipe."
            raise TellError(f"the grid has {other}, which would override it", where=where, remedy=remedy)


def check_grid(grid: Iterable[Product], known: Product, where: str) -> None:
    """Refuse keys without values, arms and seeds that the recipe (``known``) lacks, and two ways to give one amount."""
    for product in grid:
        for key, values in product.items():
            if key not in OF_A_PRODUCT:
                check_run_keys(nest(key, values[0] if values else None), where, "grid")
            for value in values if key in OF_A_PRODUCT else ():
                if value not in known[key]:
                    names = [str(name) for name in known[key]]
                    what = f"grid has {key[:-1]} {value!r}, which the recipe's {key} lack"
                    remedy, close = (
                        f"They are {', '.join(names)}: add it to them, or fix it.",
                        did_you_mean(str(value), names),
                    )
                    raise TellError(what, where=where, remedy=remedy, nearest=close)
            if not values:
                raise TellError(f"grid.{key} has no value", where=where, remedy="Set one, or leave it out.")
        for ways in RIVALS:
            both = [key for key in product if key in ways]
            if len(both) > 1:
                what = f"a product of the grid has {' and '.join(both)}, which give the same amount twice"
                raise TellError(what, where=where, remedy="Leave one out, or make them two products.")


def check_parts(parts: Iterable[tuple[str, Part]], grid: Iterable[Product], arms: Sequence[str], where: str) -> None:
    """Refuse figures and analyses over keys that the grid does not vary, or of arms that the recipe does not run."""
    known = list(dict.fromkeys(key for product in grid for key in product if key not in OF_A_PRODUCT))
    for place, part in parts:
        for attribute, key in part.keys().items():
            if key is not None and key not in known:
                what = f"{place}.{attribute} is {key!r}, which is not a key of the grid"
                remedy = f"Use {' or '.join(known)}." if known else "Add that key to the grid, or leave it out."
                raise TellError(what, where=where, remedy=remedy, nearest=did_you_mean(key, known))
        attribute, named = part.named_arms()
        for arm in named:
            if arm not in arms:
                what = f"{place}.{attribute} is {arm}, which the recipe does not run"
                raise TellError(what, where=where, remedy=f"Use {', '.join(arms)}.")


def check_build(build: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Refuse a data set without a builder, and one made from another that comes after it."""
    names = list(build)
    for i, (name, options) in enumerate(build.items()):
        if "dataset" not in options:
            remedy = "Add e.g. dataset: halu-cot-json to it."
            raise TellError(f"build.{name} names no dataset", where=where, remedy=remedy)
        for _, value in leaves(options):
            for other in VARIABLE.findall(value) if isinstance(value, str) else ():
                if other in names[i:]:
                    how, remedy = "comes after it", f"Put {other} before {name}."
                    if other == name:
                        how, remedy = "is itself", "Fix its name."
                    raise TellError(f"build.{name} is made of ${{{other}}}, which {how}", where=where, remedy=remedy)
