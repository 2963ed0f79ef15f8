"""Sets of comparable seeds: products of a grid may run with only some of them."""

from __future__ import annotations

from dataclasses import replace

from tell.studies.results import Study, frozen
from tell.studies.stats.seed_means import groups


def seed_sets(study: Study) -> list[tuple[int, ...]]:
    """The sets of seeds that points and arms have numbers of, the largest first; one where all have the same."""
    found = {tuple(sorted(o.seed for o in group)) for group in groups(study.outcomes).values()}
    return sorted(found, key=lambda seeds: (-len(seeds), seeds))


def compared_seeds(study: Study) -> list[tuple[int, ...]]:
    """`seed_sets` and the seeds common to all of them, over which everything can be compared."""
    sets = seed_sets(study)
    shared = tuple(sorted(set.intersection(*map(set, sets)))) if sets else ()
    return [*sets, shared] if shared and shared not in sets else sets


def with_seeds(study: Study, seeds: tuple[int, ...]) -> Study:
    """The study as if run with these seeds alone: points and arms that have all of them."""
    whole = {key for key, group in groups(study.outcomes).items() if {o.seed for o in group} >= set(seeds)}
    kept = [o for o in study.outcomes if o.seed in seeds and (frozen(dict(o.point)), o.arm) in whole]
    return replace(study, outcomes=kept)


def seeds_name(seeds: tuple[int, ...]) -> str:
    """``seeds 42, 43``, ``seed 42 alone``."""
    return f"seed {seeds[0]} alone" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
