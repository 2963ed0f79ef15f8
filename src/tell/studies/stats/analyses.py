"""What a recipe asks to be made of its curves: fits, efficiency, flips and fronts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tell.studies.labels import canonical, point_name
from tell.studies.page.figures import Mark
from tell.studies.results import Study, as_change, as_drawn, frozen
from tell.studies.stats.comparable_seeds import compared_seeds, seeds_name, with_seeds
from tell.studies.stats.curve_fit import fit_curve
from tell.studies.stats.curves import Curve, curves
from tell.studies.stats.efficiency import efficiency
from tell.studies.stats.flips import flips
from tell.studies.stats.pareto import front, verdict
from tell.studies.stats.seed_means import Bootstrap


@dataclass
class Analyses:
    """Entries of fits.json, flips.json, efficiency.json and pareto.json, and the fitted curves to draw."""

    fits: list[dict[str, Any]] = field(default_factory=list)
    flips: list[dict[str, Any]] = field(default_factory=list)
    efficiency: list[dict[str, Any]] = field(default_factory=list)
    pareto: list[dict[str, Any]] = field(default_factory=list)
    marks: dict[tuple[str, ...], Mark] = field(default_factory=dict)

    def mark(self, curve: Curve, x: str, y: str) -> Mark | None:
        """The fit of a curve, where one was asked for and has something to show."""
        return self.marks.get((x, y, curve.arm, frozen(curve.rest)))


def analyse(study: Study, bootstrap: Bootstrap) -> Analyses:
    """Everything the recipe asks for that the finished cells allow.

    Each curve is treated apart: one entry for each value of the grid's other keys, named by ``where``. Only what has
    the same seeds is compared. Where some points have fewer, there is an entry for those that have all, and one for all
    points over the seeds they share; ``compared`` says which.
    """
    found, seen = Analyses(), set[str]()
    sets = compared_seeds(study)
    for seeds in sets:
        part = study if len(sets) == 1 else with_seeds(study, seeds)
        drawn = bootstrap if part is study else Bootstrap(part, bootstrap.samples, bootstrap.seed)
        _analyse(part, drawn, found, seen, seeds_name(seeds) if len(sets) > 1 else "")
    return found


def _analyse(study: Study, bootstrap: Bootstrap, found: Analyses, seen: set[str], compared: str) -> None:
    """Add what these outcomes give, but for what the same points gave with more seeds."""

    def new(*parts: Any) -> bool:
        key = frozen(parts)
        seen_before = key in seen
        seen.add(key)
        return not seen_before

    recipe = study.recipe
    for asked in recipe.get("fits") or ():
        x, y, arm = asked["x"], as_drawn(study, asked["y"]), asked.get("arm") or "tell"
        for curve in curves(study, bootstrap, x=x, y=y, arms=[arm]):
            if not curve.numeric or curve.flat or len(curve.x) < 2 or not new("fit", x, y, arm, curve.rest, curve.x):
                continue
            what = {"x": x, "y": y, "arm": arm, "where": curve.rest, "compared": compared}
            fits = fit_curve(curve, y)
            found.fits.append({**what, **fits.facts})
            if fits.mark is not None:
                found.marks.setdefault((x, y, arm, frozen(curve.rest)), fits.mark)
            turned = flips(curve, y, x)
            if turned is not None:
                found.flips.append({**what, **turned})
    for asked in recipe.get("efficiency") or ():
        x, y = asked["x"], as_drawn(study, asked["y"])
        arms = list(asked.get("arms") or ("sft", "sft-matched", "tell"))
        reference = "tell" if "tell" in arms else arms[-1]
        for where, group in _contexts(curves(study, bootstrap, x=x, y=y, arms=arms), reference):
            if new("efficiency", x, y, where, [[c.arm, c.x] for c in group]):
                entry = efficiency(group, x=x, y=y, reference=reference)
                if entry is not None:
                    found.efficiency.append({"x": x, "y": y, "where": where, "compared": compared, **entry})
    for asked in recipe.get("pareto") or ():
        gain, cost = canonical(asked["gain"]), as_change(study, asked["cost"])
        for heading, within in panels(study, _task_size(study)):
            candidates = front(study, bootstrap, gain=gain, cost=cost, within=within)
            if len(candidates) > 1 and new("front", gain, cost, within, sorted(c["name"] for c in candidates)):
                heading = ", ".join(filter(None, (heading, compared)))
                what = {"gain": gain, "cost": cost, "where": within, "compared": compared, "heading": heading}
                found.pareto.append({**what, "verdict": verdict(candidates), "points": candidates})


def panels(study: Study, key: str | None) -> list[tuple[str, dict[str, Any]]]:
    """(heading, values that its points have) for each value of a key; one panel of everything for None."""
    if key is None:
        return [("", {})]
    values = {frozen(o.point.get(key)): o.point.get(key) for o in study.outcomes}
    return [(point_name({key: value}), {key: value}) for value in values.values()]


def _task_size(study: Study) -> str | None:
    """The key that says how many task rows there are, where it varies: points that differ in it are no alternatives."""
    return next((key for key in ("task.rows", "task.tokens") if key in study.keys), None)


def _contexts(found: list[Curve], reference: str) -> Iterator[tuple[dict[str, Any], list[Curve]]]:
    """Each curve of the reference with those of the other arms that go with it: the same values of the other keys,
    as far as they have an effect on the arm."""
    for own in found:
        if own.arm == reference:
            fitting = {c.arm: c for c in found if all(frozen(own.rest.get(k)) == frozen(v) for k, v in c.rest.items())}
            yield own.rest, list({**fitting, reference: own}.values())
