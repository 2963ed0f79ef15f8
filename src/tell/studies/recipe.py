"""The recipe of a study: a YAML file with the runs to make and the tables and figures to draw. Imports no torch.

    title: "Figure 11: schema adherence over general tokens"
    claim: "S-curve: 1 % untuned to 39.54 %"
    build:                                  # data sets made once, by content
      halu: {dataset: halu-cot-json, source: "${data}/halu_cot_json/halueval_general.jsonl.gz"}
    config:                                 # keys of a run, as in run.yaml
      task: {data: "${halu}/train.jsonl", test: "${halu}/test.jsonl", schema: "${halu}/schema.json"}
      general: {source: "${data}/general/alpaca_en.jsonl.gz"}
    grid:                                   # one product of values, or a list of them
      - {task.rows: [15, 115], general.tokens: [0, 3e4, 1e5]}
      - {task.rows: [15], general.tokens: [3e5], arms: [tell], seeds: [42]}    # fewer arms or seeds where runs are slow
    arms: [base, sft, sft-matched, tell]
    figures: [{x: general.tokens, y: schema_adherence, panels: task.rows}]

``${name}`` stands for a variable (``--data DIR`` is ``${data}``, ``--var name=value``), for the folder of a data set
under ``build``, or, as ``${recipe}``, for the folder of the recipe itself.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from tell.config import check_keys, read_yaml
from tell.config_sections import ArmName
from tell.config_values import Section
from tell.errors import TellError, did_you_mean
from tell.files import expanded
from tell.nested import VARIABLE, dig, leaves, nest
from tell.overrides import override, parse_overrides
from tell.studies.recipe_checks import (
    OF_A_PRODUCT,
    check_build,
    check_grid,
    check_parts,
    check_run_keys,
    check_set,
    check_size,
)


class Part(Section):
    """A figure or analysis of a recipe; it names keys of the grid, and arms."""

    def keys(self) -> dict[str, str | None]:
        """Keys of the grid, by the attribute that names them."""
        return {"x": getattr(self, "x", None)}

    def named_arms(self) -> tuple[str, tuple[ArmName, ...]]:
        """The attribute that names arms, and the arms that the author wrote there."""
        return ("arm", (self.arm,)) if hasattr(self, "arm") else ("", ())


class Figure(Part):
    """A curve for each value of ``lines``, or a map of one arm; a panel for each value of ``panels``."""

    kind: Literal["curves", "map"] = Field(
        "curves", description="curves of y over x, or a heat map of value over x and y"
    )
    x: str = Field(description="a key of the grid")
    y: str = Field(description="a metric; in a map, another key of the grid")
    lines: str = Field("arm", description="one curve for each arm, or for each value of this key of the grid")
    panels: str | None = Field(
        None, description="one panel for each value of this key; a map always has one for its other keys"
    )
    value: str | None = Field(None, description="map only: the metric")
    arm: ArmName = Field("tell", description="map only: the arm")

    def keys(self) -> dict[str, str | None]:
        y, lines = self.y if self.kind == "map" else None, self.lines if self.lines != "arm" else None
        return {"x": self.x, "panels": self.panels, "y": y, "lines": lines}

    def named_arms(self) -> tuple[str, tuple[ArmName, ...]]:
        return "arm", (self.arm,) if self.kind == "map" else ()

    @model_validator(mode="after")
    def _map_of_something(self) -> Figure:
        if self.kind == "map" and self.value is None:
            raise ValueError("a map needs value, the metric it shows")
        return self


class _Curve(Part):
    x: str = Field(description="a key of the grid")
    y: str = Field(description="a metric")


class Fit(_Curve):
    """A curve fitted to one arm's scores, one for each value of the grid's other keys."""

    arm: ArmName = Field("tell", description="whose scores")


class Efficiency(_Curve):
    """The amount of ``x`` that each arm needs for the same score."""

    arms: tuple[ArmName, ...] = Field(
        ("sft", "sft-matched", "tell"), description="compared with tell, or with the last if tell is missing"
    )

    def named_arms(self) -> tuple[str, tuple[ArmName, ...]]:
        return "arms", self.arms if "arms" in self.model_fields_set else ()


class Pareto(Part):
    """Gain against cost of every cell, and the cells that no other beats in both."""

    gain: str = Field(description="a metric, higher is better")
    cost: str = Field(description="a metric, or `<set> loss` of forgetting, lower is better")


class Separate(Section):
    """Hidden states of task and general queries compared at each point, without and with the anchor; trains nothing."""

    layer: str = Field("middle", description="middle, or a number (0: the embeddings)")
    queries: int = Field(50, ge=5, description="rows of each group, fewer where there are fewer")
    state: Literal["last", "mean"] = Field("last", description="of the prompt's last token, or the mean over it")
    match_length: bool = Field(False, description="general queries of the task queries' lengths")

    @field_validator("layer", mode="before")
    @classmethod
    def _one_layer(cls, value: object) -> object:
        if str(value) != "middle" and not str(value).isdigit():
            raise ValueError("is neither middle nor a number")
        return str(value)


class Resources(Section):
    """The resources of one cell on a cluster (``--executor ray``)."""

    cpus: float | None = Field(None, gt=0, description="CPU cores; none: all cores of one machine")
    gpus: float = Field(0, ge=0, description="GPUs")
    memory: float | None = Field(None, gt=0, description="memory in bytes, reserved but not enforced")


PARTS: dict[str, type[BaseModel]] = {  # keys of a recipe that are sections
    "figures": Figure,
    "fits": Fit,
    "efficiency": Efficiency,
    "pareto": Pareto,
    "separate": Separate,
    "resources": Resources,
}


class Recipe(Section):
    """Everything that a study depends on; saved as ``recipe.yaml`` in its folder."""

    title: str = Field("", description="heading of the page")
    claim: str = Field("", description="the paper's claim")
    variables: dict[str, str] = Field(default_factory=dict, description="values of `${name}`; `--var` overrides them")
    build: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="name -> {dataset: as in `tell build`, source: ..., options of that builder}"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="keys of every run, nested as in run.yaml")
    grid: tuple[dict[str, list[Any]], ...] = Field(
        ({},),
        description="dotted key of a run -> its values: their product; or a list of such products, "
        "each with its own `arms` and `seeds` where it is not run with all",
    )
    arms: tuple[ArmName, ...] = Field(("base", "sft", "sft-matched", "tell"), description="arms of each point")
    separate: Separate | None = Field(
        None, description="compare hidden states at each point; with `arms: []` nothing else is run"
    )
    seeds: tuple[int, ...] = Field((42, 43, 44), min_length=1, description="seeds of each point")
    order: Literal["seeds", "grid"] = Field(
        "seeds", description="run the whole grid with one seed after the other, or one product of it after the other"
    )
    metrics: tuple[str, ...] = Field((), description="metrics to tabulate; none: the task's primary one")
    figures: tuple[Figure, ...] = ()
    fits: tuple[Fit, ...] = ()
    efficiency: tuple[Efficiency, ...] = ()
    pareto: tuple[Pareto, ...] = ()
    resources: Resources = Field(default_factory=Resources)
    keep_adapters: bool = Field(False, description="keep the adapters of finished cells")

    @field_validator("grid", mode="before")
    @classmethod
    def _one_product(cls, value: object) -> object:
        return [value] if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _something_to_run(self) -> Recipe:
        if not self.arms and self.separate is None:
            raise ValueError("arms is empty, and nothing is to be separated")
        return self

    @field_validator("arms", "seeds", mode="after")
    @classmethod
    def _without_repeats(cls, value: tuple) -> tuple:
        return tuple(dict.fromkeys(value))

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every figure and analysis, with its place in the recipe."""
        for name in ("figures", "fits", "efficiency", "pareto"):
            yield from ((f"{name}[{i}]", part) for i, part in enumerate(getattr(self, name)))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(
    path: str | Path,
    *,
    data: str | Path | None = None,
    variables: Mapping[str, str] | None = None,
    overrides: Iterable[str] = (),
    seeds: Sequence[int] | None = None,
) -> Recipe:
    """A recipe read from YAML, with variables and overrides applied.

    Args:
        data: folder that ``${data}`` stands for.
        variables: values of other variables; they override the recipe's own.
        overrides: ``a.b=c`` over keys of every run; a key of the grid keeps this value alone.
        seeds: replace the recipe's.

    Returns:
        The recipe, its ``variables`` complete.

    Raises:
        TellError: an unknown key (with the nearest name), a wrong value, a variable that is missing or not used.
    """
    path = Path(path)
    recipe = make_recipe(read_yaml(path, "tell study"), where=str(path))
    # Here and not in `make_recipe`: other seeds may leave products of its grid out.
    check_parts(recipe.parts(), recipe.grid, recipe.arms, str(path))
    if data is not None and not expanded(data).is_dir():
        raise TellError("no such folder", where=f"--data {data}", remedy="Name the folder with the data.")
    given = dict(variables or {})
    if data is not None:
        given["data"] = str(expanded(data).resolve())
    filled = _variables(recipe, given, path)
    update: dict[str, Any] = {"variables": filled, **_overridden(recipe, overrides)}
    if seeds is not None:
        update |= {"seeds": tuple(seeds), "grid": _with_seeds(update["grid"], seeds, where=str(path))}
    return make_recipe({**recipe.model_dump(), **update}, where=str(path))


def _variables(recipe: Recipe, given: Mapping[str, str], path: Path) -> dict[str, str]:
    """Values of all variables that the recipe uses; refuses those that are missing, unknown or also built."""
    every, used = used_variables(recipe), used_variables(recipe, given)
    for name in given:
        if name != "data" and name not in every:
            what, close = f"the recipe has no ${{{name}}}", did_you_mean(name, every)
            raise TellError(what, where=f"--var {name}", remedy="Leave it out, or fix its name.", nearest=close)
    for name in recipe.build:
        if name in given or name in recipe.variables:
            where = f"--var {name}" if name in given else f"{path}: variables.{name}"
            remedy = f"Rename the variable, or write its folder instead of ${{{name}}} and do not build it."
            raise TellError(f"{name} is a variable and a data set under build", where=where, remedy=remedy)
    known = {"recipe": str(path.parent.resolve()), **given}
    values = _filled(recipe.variables, known, recipe.build, where=str(path))
    for name, place in used.items():
        if name not in values and name not in recipe.build:
            flag = "--data DIR" if name == "data" else f"--var {name}=VALUE"
            what, close = f"${{{name}}} in {place} is not given", did_you_mean(name, [*values, *recipe.build])
            raise TellError(what, where=str(path), remedy=f"Add {flag}.", nearest=close)
    return {name: value for name, value in values.items() if name in used}


def make_recipe(data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Validate a recipe's keys, those of its runs and of its grid among them.

    Raises:
        TellError: an unknown key (with the nearest name) or a wrong value.
    """
    check_keys(data, Recipe, where, remedy=f"The keys of a recipe are {', '.join(Recipe.model_fields)}.")
    for key, kind in PARTS.items():
        given, known_keys = data.get(key), f"Its keys are {', '.join(kind.model_fields)}."
        several = isinstance(given, list | tuple)
        for i, item in enumerate(list(given) if isinstance(given, list | tuple) else [given]):
            if isinstance(item, Mapping):
                check_keys(item, kind, where, f"{key}[{i}]." if several else f"{key}.", known_keys)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"]
        if place[:1] == ("grid",) and not isinstance(data.get("grid"), list | tuple):
            place = ("grid", *place[2:])  # it was written as one product
        key = ".".join(str(part) for part in place)
        shown = "" if isinstance(first.get("input"), dict) else f" (got {first.get('input')!r})"
        text = first["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("Tuple", "List")
        if first["type"] == "literal_error":
            close = did_you_mean(str(first.get("input")), re.findall(r"'([^']+)'", first["ctx"]["expected"]))
            text += f"; did you mean {close}?" if close else ""
        what = f"{key}: {text}{shown}" if key else text
        raise TellError(what, where=where, remedy=f"Change {key}." if key else "Add one or the other.") from error
    check_run_keys(recipe.config, where, "config")
    known = {"arms": recipe.arms, "seeds": recipe.seeds}
    check_size(recipe.grid, known, where)
    check_grid(recipe.grid, known, where)
    check_build(recipe.build, where)
    return recipe


def _overridden(recipe: Recipe, overrides: Iterable[str]) -> dict[str, Any]:
    """``config`` and ``grid`` of the recipe under ``a.b=c`` texts."""
    config: Mapping[str, Any] = recipe.config
    grid = [dict(product) for product in recipe.grid]
    for text in overrides:
        nested = parse_overrides([text])
        check_set(nested, recipe.grid)
        for product in grid:
            for key in product.keys() - OF_A_PRODUCT:
                with suppress(KeyError, TypeError):  # a key that the text does not set
                    given = dig(nested, key)
                    sections = isinstance(given, Mapping)  # set in part: the rest of them stays
                    olds = product[key] if sections else [given]
                    product[key] = [dig(override(nest(key, old), nested), key) for old in olds]
        config = override(config, nested)
    return {"config": config, "grid": grid}


def _with_seeds(grid: Iterable[Mapping[str, Any]], seeds: Sequence[int], *, where: str) -> list[dict[str, Any]]:
    """The products that run with one of the seeds."""
    kept = []
    for product in grid:
        own = [seed for seed in product.get("seeds", seeds) if seed in seeds]
        if own:
            kept.append({**product, "seeds": own} if "seeds" in product else dict(product))
    if not kept:
        what = f"nothing in the grid is run with seed {', '.join(map(str, seeds))}"
        remedy = "Its products have their own seeds: use one of those, or remove them."
        raise TellError(what, where=where, remedy=remedy)
    return kept


def used_variables(recipe: Recipe, given: Iterable[str] = ()) -> dict[str, str]:
    """Variables by name, with the first key that uses each, which may be a variable that is not ``given``."""
    found: dict[str, str] = {}
    texts = list(leaves({"build": recipe.build, "config": recipe.config, "grid": list(recipe.grid)}))
    while texts:
        key, value = texts.pop(0)
        for name in VARIABLE.findall(value) if isinstance(value, str) else ():
            if name not in found and name in recipe.variables and name not in given:
                texts.append((f"variables.{name}", recipe.variables[name]))
            found.setdefault(name, key)
    return found


def _filled(
    variables: Mapping[str, str], given: Mapping[str, str], built: Collection[str], *, where: str
) -> dict[str, str]:
    """The values of all variables, with variables within variables replaced; those that are not given stay.

    Args:
        built: data sets that the recipe builds, whose folders are not known yet.
    """
    values = dict(given)

    def value(name: str, above: tuple[str, ...] = ()) -> str:
        if name in above:
            raise TellError(f"variables.{name} contains itself", where=where, remedy="Fix the name in it.")
        if name in built and above:
            what = f"variables.{above[-1]} contains ${{{name}}}, which is built later"
            raise TellError(what, where=where, remedy=f"Write ${{{name}}} instead of ${{{above[-1]}}}.")
        if name not in values and name in variables:
            values[name] = VARIABLE.sub(lambda match: value(match[1], (*above, name)), variables[name])
        return values.get(name, f"${{{name}}}")

    for name in variables:
        value(name)
    return values


def points(recipe: Recipe, seed: int) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """The points of a seed, as written, each once, with its arms: the union of the grid's products."""
    found: dict[str, tuple[dict[str, Any], set[str]]] = {}
    for product in recipe.grid:
        if seed not in product.get("seeds", recipe.seeds):
            continue
        keys = [key for key in product if key not in OF_A_PRODUCT]
        for values in itertools.product(*(product[key] for key in keys)):
            point = dict(zip(keys, values, strict=True))
            arms = found.setdefault(json.dumps(point, sort_keys=True), (point, set()))[1]
            arms.update(product.get("arms", recipe.arms))
    return [(point, tuple(arm for arm in recipe.arms if arm in arms)) for point, arms in found.values()]
