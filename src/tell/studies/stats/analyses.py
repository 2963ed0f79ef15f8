"""The analyses of recipes: fits (with flips), efficiency and fronts. To add one, give `Recipe` its key
and part, and this module (or one that it imports) a function::

    @analysis("mine")
    def mine(outcomes: Outcomes, asked: Mapping[str, Any]) -> Iterator[tuple[str, Entry]]:
        yield "mine", {...}  # an entry of mine.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tell.metric_names import canonical
from tell.registry import Registry
from tell.studies.labels import point_name
from tell.studies.recipe import PARTS
from tell.studies.results import Study, as_change, as_drawn, frozen
from tell.studies.stats.comparable_seeds import compared_seeds, seeds_name, with_seeds
from tell.studies.stats.curve_fit import Mark, fit_curve
from tell.studies.stats.curves import Curve, curves
from tell.studies.stats.efficiency import efficiency
from tell.studies.stats.flips import flips
from tell.studies.stats.pareto import front, verdict
from tell.studies.stats.seed_means import Bootstrap

FILES = ("fits", "efficiency", "flips", "pareto")  # JSON files in the study's folder, each a list of entries
Entry = dict[str, Any]


@dataclass
class Analyses:
    """Entries by file, and the fitted curves to draw."""

    entries: dict[str, list[Entry]] = field(default_factory=lambda: {name: [] for name in FILES})
    marks: dict[tuple[str, ...], Mark] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def mark(self, curve: Curve, x: str, y: str) -> Mark | None:
        """The fit of a curve, where the recipe requests one and there is something to draw."""
        return self.marks.get((x, y, curve.arm, frozen(curve.rest)))


@dataclass(frozen=True)
class Outcomes:
    """Outcomes that can be compared: those with the same seeds.

    Attributes:
        compared: names the seeds, where not all points have the same.
        found: entries of the sets with more seeds.
    """

    study: Study
    bootstrap: Bootstrap
    compared: str
    found: Analyses

    def new(self, *parts: object) -> bool:
        """Whether nothing with this key was found before: the same points with more seeds."""
        key = frozen(parts)
        known = key in self.found.seen
        self.found.seen.add(key)
        return not known


Analysis = Callable[[Outcomes, Mapping[str, Any]], Iterator[tuple[str, Entry]]]
analysis = Registry[Analysis]("analysis")


def analyse(study: Study, bootstrap: Bootstrap) -> Analyses:
    """Every analysis that the recipe asks for and the finished cells allow.

    Each curve is analysed separately: one entry for each value of the grid's other keys, named by ``where``. Only what
    has the same seeds is compared. Where some points have fewer, there is an entry for those that have all, and one for
    all points over the seeds they share; ``compared`` says which.
    """
    found = Analyses()
    sets = compared_seeds(study)
    for seeds in sets:
        part = study if len(sets) == 1 else with_seeds(study, seeds)
        drawn = bootstrap if part is study else Bootstrap(part, bootstrap.samples, bootstrap.seed)
        outcomes = Outcomes(part, drawn, seeds_name(seeds) if len(sets) > 1 else "", found)
        for key, run in analysis.items():
            for asked in study.recipe.get(key) or ():
                for name, entry in run(outcomes, asked):
                    found.entries[name].append(entry)
    return found


@analysis("fits")
def _fits(outcomes: Outcomes, asked: Mapping[str, Any]) -> Iterator[tuple[str, Entry]]:
    x, y, arm = asked["x"], as_drawn(outcomes.study, asked["y"]), asked.get("arm") or "tell"
    for curve in curves(outcomes.study, outcomes.bootstrap, x=x, y=y, arms=[arm]):
        enough = curve.numeric and not curve.flat and len(curve.x) > 1
        if not enough or not outcomes.new("fit", x, y, arm, curve.rest, curve.x):
            continue
        what = {"x": x, "y": y, "arm": arm, "where": curve.rest, "compared": outcomes.compared}
        fits = fit_curve(curve, y)
        yield "fits", {**what, **fits.facts}
        if fits.mark is not None:
            outcomes.found.marks.setdefault((x, y, arm, frozen(curve.rest)), fits.mark)
        if (turned := flips(curve, y, x)) is not None:
            yield "flips", {**what, **turned}


@analysis("efficiency")
def _efficiency(outcomes: Outcomes, asked: Mapping[str, Any]) -> Iterator[tuple[str, Entry]]:
    x, y = asked["x"], as_drawn(outcomes.study, asked["y"])
    arms = list(asked.get("arms") or ("sft", "sft-matched", "tell"))
    reference = "tell" if "tell" in arms else arms[-1]
    found = curves(outcomes.study, outcomes.bootstrap, x=x, y=y, arms=arms)
    for where, group in _contexts(found, reference):
        if outcomes.new("efficiency", x, y, where, [[c.arm, c.x] for c in group]):
            entry = efficiency(group, x=x, y=y, reference=reference)
            if entry is not None:
                yield "efficiency", {"x": x, "y": y, "where": where, "compared": outcomes.compared, **entry}


@analysis("pareto")
def _pareto(outcomes: Outcomes, asked: Mapping[str, Any]) -> Iterator[tuple[str, Entry]]:
    study, compared = outcomes.study, outcomes.compared
    gain, cost = canonical(asked["gain"]), as_change(study, asked["cost"])
    # Points that differ in the number of task rows are not alternatives.
    size = next((key for key in ("task.rows", "task.tokens") if key in study.keys), None)
    for heading, within in panels(study, size):
        candidates = front(study, outcomes.bootstrap, gain=gain, cost=cost, within=within)
        if len(candidates) > 1 and outcomes.new("front", gain, cost, within, sorted(c["name"] for c in candidates)):
            heading = ", ".join(filter(None, (heading, compared)))
            what = {"gain": gain, "cost": cost, "where": within, "compared": compared, "heading": heading}
            yield "pareto", {**what, "verdict": verdict(candidates), "points": candidates}


if analysis.keys() != PARTS.keys() - {"figures", "separate", "resources"}:
    raise ValueError("the analyses are not those of a recipe")


def panels(study: Study, key: str | None) -> list[tuple[str, dict[str, Any]]]:
    """(heading, values that its points have) for each value of a key; one panel of everything for None."""
    if key is None:
        return [("", {})]
    values = {frozen(o.point.get(key)): o.point.get(key) for o in study.outcomes}
    return [(point_name({key: value}), {key: value}) for value in values.values()]


def _contexts(found: list[Curve], reference: str) -> Iterator[tuple[dict[str, Any], list[Curve]]]:
    """Each curve of the reference with those of the other arms that go with it: the same values of the other keys,
    as far as they have an effect on the arm."""
    for own in found:
        if own.arm == reference:
            fitting = {c.arm: c for c in found if all(frozen(own.rest.get(k)) == frozen(v) for k, v in c.rest.items())}
            yield own.rest, list({**fitting, reference: own}.values())
