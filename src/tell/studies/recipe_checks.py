"""What a recipe may not say beyond the types of its keys: each refusal names the place and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tell.config import GENERAL_AMOUNTS, Config, check_keys
from tell.errors import TellError, did_you_mean
from tell.studies.nested import VARIABLE, flat, leaves, nest

OF_A_PRODUCT = ("arms", "seeds")  # beside the keys of a run: which of the recipe's a product of the grid is run with
RIVALS = (tuple(f"general.{way}" for way in GENERAL_AMOUNTS), ("task.tokens", "task.rows"))  # keys that say one amount
REFUSED = {  # keys of a run that a recipe cannot set, and what to do instead
    "seed": "Give them as seeds in the recipe or as --seeds, for the whole study.",
    "eval.arms": "Give them as arms in the recipe, for the whole study.",
    "out": "Give it as --out, for the whole study.",
    "max_minutes": "Leave it out: cells cut short by the clock cannot be compared.",
}


MOST_CELLS = 10_000


def check_size(grid: Iterable[Mapping[str, Sequence[Any]]], known: Mapping[str, Sequence[Any]], where: str) -> None:
    """Refuse a grid that no machine could run, before its points are made.

    Args:
        known: the recipe's ``arms`` and ``seeds``.
    """
    total = 0
    for product in grid:
        arms, seeds = (product.get(key, known[key]) for key in OF_A_PRODUCT)
        points = math.prod(len(values) for key, values in product.items() if key not in OF_A_PRODUCT)
        total += points * max(1, len(arms)) * len(seeds)
    if total > MOST_CELLS:
        raise TellError(
            f"the grid has {total:,} cells; a study has at most {MOST_CELLS:,}",
            where=where,
            remedy="Give its keys fewer values, or run it with fewer arms or seeds.",
        )


def check_run_keys(nested: Mapping[str, Any], where: str, part: str) -> None:
    """Refuse keys of ``part`` that a run does not have, or that a recipe cannot set."""
    check_keys(nested, Config, f"{where}: {part}")
    for key, _ in leaves(nested):
        if key in REFUSED:
            raise TellError(f"{key} stands under {part}", where=where, remedy=REFUSED[key])


def check_set(nested: Mapping[str, Any], grid: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a ``--set`` of what a recipe cannot set, or of what the grid would go over."""
    for key, _ in flat(nested):
        if key in REFUSED:
            raise TellError("is not set for single runs of a study", where=f"--set {key}", remedy=REFUSED[key])
        check_rivals(key, grid)


def check_grid(grid: Iterable[Mapping[str, Sequence[Any]]], known: Mapping[str, Sequence[Any]], where: str) -> None:
    """Refuse keys without values, arms and seeds that the recipe lacks, and two ways of giving one amount.

    Args:
        known: the recipe's ``arms`` and ``seeds``.
    """
    for product in grid:
        for key, values in product.items():
            if key in OF_A_PRODUCT:
                _check_among(key, values, known[key], where)
            else:
                check_run_keys(nest(key, values[0] if values else None), where, "grid")
            if not values:
                raise TellError(f"grid.{key} has no value", where=where, remedy="Give it one, or leave it out.")
        for ways in RIVALS:
            both = [key for key in product if key in ways]
            if len(both) > 1:
                raise TellError(
                    f"a product of the grid has {' and '.join(both)}, which say the same amount twice",
                    where=where,
                    remedy="Leave one out, or make them products of their own.",
                )


def _check_among(key: str, values: Sequence[Any], known: Sequence[Any], where: str) -> None:
    for value in values:
        if value not in known:
            raise TellError(
                f"grid has {key[:-1]} {value!r}, which the recipe's {key} lack",
                where=where,
                nearest=did_you_mean(str(value), map(str, known)),
                remedy=f"They are {', '.join(map(str, known))}: add it to them, or mend it.",
            )


def check_axes(asked: Iterable[tuple[str, str]], grid: Iterable[Mapping[str, Any]], where: str) -> None:
    """Refuse a figure or fit over what the grid does not vary.

    Args:
        asked: (its place in the recipe, the key it names).
    """
    known = list(dict.fromkeys(key for product in grid for key in product if key not in OF_A_PRODUCT))
    for place, key in asked:
        if key not in known:
            raise TellError(
                f"{place} is {key!r}, which is no key of the grid",
                where=where,
                nearest=did_you_mean(key, known),
                remedy=f"Use {' or '.join(known)}." if known else "Give the grid that key, or leave it out.",
            )


def check_arms(asked: Iterable[tuple[str, str]], arms: Sequence[str], where: str) -> None:
    """Refuse a fit, map or comparison of an arm that the recipe does not run.

    Args:
        asked: (its place in the recipe, the arm it names).
        arms: the recipe's.
    """
    for place, arm in asked:
        if arm not in arms:
            raise TellError(
                f"{place} is {arm}, which the recipe does not run", where=where, remedy=f"Use {', '.join(arms)}."
            )


def check_build(build: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Refuse a data set without a builder, and one made of another that stands after it."""
    names = list(build)
    for i, (name, options) in enumerate(build.items()):
        if "dataset" not in options:
            raise TellError(
                f"build.{name} names no dataset", where=where, remedy="Add e.g. dataset: halu-cot-json to it."
            )
        for _, value in leaves(options):
            for other in VARIABLE.findall(value) if isinstance(value, str) else ():
                if other in names[i:]:
                    raise TellError(
                        f"build.{name} is made of ${{{other}}}, which "
                        + ("is itself" if other == name else "stands after it"),
                        where=where,
                        remedy="Mend its name." if other == name else f"Put {other} before {name}.",
                    )


def check_rivals(key: str, grid: Iterable[Mapping[str, Any]]) -> None:
    """Refuse ``--set`` of one way of giving an amount where the grid holds another, which would go over it."""
    for ways in RIVALS:
        for product in grid:
            for other in set(ways) - {key}:
                if key in ways and other in product:
                    raise TellError(
                        f"the grid has {other}, which would go over it",
                        where=f"--set {key}",
                        remedy=f"Set {other} instead, or change the recipe.",
                    )
