"""Renders a study's finished cells: tables, figures, fits and one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from tell.files import write_json, write_text
from tell.metric_names import CHANGE, canonical, metric
from tell.names import ARMS, arm_order
from tell.report.page import fill
from tell.studies.page.figure_kinds import Contents
from tell.studies.page.study_sections import STATES, Picture, Section, sections
from tell.studies.results import Study, read_results
from tell.studies.separation_cells import WORDS as CONTRAST_WORDS
from tell.studies.separation_cells import pictures
from tell.studies.stats.analyses import FILES, analyse
from tell.studies.stats.comparable_seeds import seed_sets, seeds_name
from tell.studies.stats.results_table import gaps, lines, to_csv, to_markdown
from tell.studies.stats.seed_means import Bootstrap

WORDS = (
    (
        "interval",
        "Where the value would lie in 95 of 100 repetitions with other seeds and other test rows of the same kind, by "
        "a bootstrap over both. A seed decides the training rows, their order, the test rows and the decoding. Three "
        "seeds show little of how much seeds differ: intervals over seeds are more likely too narrow than too wide.",
    ),
    ("difference", "TELL minus the other arm, paired by seed and test row; shares in percentage points."),
    (
        "held-out error",
        "How far a shape fitted to all other amounts misses the mean at one left out; root mean square over the "
        "amounts. Its interval covers seeds and test rows, not the choice of amounts.",
    ),
    (
        "takes off",
        "Where the tangent at the steepest point of the fitted S-curve leaves its floor (the end of the lag phase; "
        "Zwietering et al. 1990).",
    ),
    ("front", "The points that no other equals or beats in both gain and cost."),
    (
        "FLOPs",
        "Floating-point operations of training as counted (LoRA needs no gradients of the base's weights); as 6 N D, "
        "the paper's count (A.1); and those of answering the test rows.",
    ),
)


def write_study(folder: str | Path) -> Path:
    """Write ``table.csv``, ``table.md``, ``fits.json``, ``efficiency.json``, ``flips.json``, ``pareto.json``,
    ``figures/`` and ``index.html``, each atomically.

    Cells that are not finished are left out and counted on the page, so a study can be read while it runs.

    Returns:
        The page.

    Raises:
        TellError: no ``study.json``, a folder that cannot be written, or matplotlib or scipy missing.
    """
    folder = Path(folder)
    study = read_results(folder)
    bootstrap = Bootstrap(study)
    table, differences = lines(study, bootstrap), gaps(study, bootstrap)
    write_text(folder / "table.csv", to_csv(study, table))
    write_text(folder / "table.md", to_markdown(study, table, differences))
    found = analyse(study, bootstrap)
    for name in FILES:
        write_json(folder / f"{name}.json", found.entries[name])
    every = sections(Contents(study, bootstrap, found, table, differences))
    drawn = {block.name for section in every for block in section.blocks if isinstance(block, Picture)}
    undrawn = _undrawn(study)
    for path in (folder / "figures").glob("f*.*"):
        # Others are figures of an earlier recipe; but a picture of hidden states may be the only copy there is.
        if path.stem not in drawn and not (undrawn and path.stem.startswith(STATES)):
            path.unlink(missing_ok=True)
    write_text(folder / "index.html", _page(study, [section for section in every if section.blocks]))
    return folder / "index.html"


def _undrawn(study: Study) -> int:
    """Comparisons of hidden states whose picture is in no run folder: packed cells have none."""
    return sum(path is None for _, path in pictures(study))


def _page(study: Study, sections: Sequence[Section]) -> str:
    arms = arm_order(row["arm"] for row in study.rows)
    metrics = [metric(name) for name in study.metrics()]
    return fill(
        "study.html.j2",
        title=study.title,
        claim=study.claim,
        notices=notices(study),
        failed=sorted(study.failed.items()),
        facts=[
            ("Cells", f"{study.states['done']} of {study.states.total()} finished"),
            ("Seeds", ", ".join(str(s) for s in sorted({row["seed"] for row in study.rows}))),
            ("Begun", study.created),
        ],
        sections=sections,
        words=[
            *((spec.label, spec.about) for spec in metrics),
            *((name, f"{ARMS[name].label}. {ARMS[name].about}") for name in arms if name in ARMS),
            *((name, CONTRAST_WORDS[name]) for name in arms if name in CONTRAST_WORDS),
            *WORDS,
        ],
        recipe=yaml.safe_dump(study.recipe, sort_keys=False, allow_unicode=True),
    )


def unknown_metrics(study: Study) -> list[str]:
    """Metrics that the recipe names and no finished cell has; empty while nothing is finished."""
    parts = {key: study.recipe.get(key) or () for key in ("figures", "fits", "efficiency", "pareto", "metrics")}
    named = [f["value"] if f.get("kind") == "map" else f["y"] for f in parts["figures"]]
    named += [part["y"] for part in (*parts["fits"], *parts["efficiency"])]
    named += [part[key] for part in parts["pareto"] for key in ("gain", "cost")]
    named += [name for name in parts["metrics"] if name != "benchmarks"]
    known = study.known()
    return [name for name in dict.fromkeys(named) if known and canonical(name) not in known]


def notices(study: Study) -> list[str]:
    """Sentences on what is missing and on limits of the numbers."""
    parts = [f"{count} {state}" for state, count in study.missing.items()]
    found = [f"Not complete. Of {len(study.rows)} rows of the study, {', '.join(parts)}."] if parts else []
    sets = seed_sets(study)
    if len(sets) > 1:
        found.append(
            f"Points and arms have different seeds ({'; '.join(map(seeds_name, sets))}). With one seed, an interval "
            "covers the choice of test rows alone. Fits, factors, fronts and differences compare results with the same "
            "seeds."
        )
    if unknown := unknown_metrics(study):
        known = ", ".join(name for name in sorted(study.known()) if CHANGE not in name)
        found.append(f"The recipe requests {', '.join(unknown)}, which no finished cell has. They have {known}.")
    if undrawn := _undrawn(study):
        found.append(
            f"Pictures of hidden states are missing for {undrawn} comparisons, whose run folders are not here. "
            f"`tell study` draws them again; those in figures/{STATES}* stay until then."
        )
    if len(study.machines) > 1:
        counts = [f"{count} in {name}" for name, count in study.machines.most_common()]
        found.append(f"Rows were measured on different devices or in different number formats: {', '.join(counts)}.")
    for name, weights in study.weights.items():
        if len(weights) > 1:
            counts = [f"{count} with {fingerprint}" for fingerprint, count in weights.most_common()]
            found.append(f"Rows of {name} were measured with different weights or templates: {', '.join(counts)}.")
    if len(study.seeds) == 1:
        found.append("One seed only: intervals cover the choice of test rows, not of training rows, order or decoding.")
    return found
