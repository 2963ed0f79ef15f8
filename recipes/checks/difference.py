"""The paired difference of two points of a study, or of two arms: ``docs/explanation/study.md`` states some of them.

    python recipes/checks/difference.py studies/fig16 schema_adherence \\
      "tell task.rows=115 anchor.text=automatic" "tell task.rows=115 anchor.text=anchor.txt"

Each side is an arm and values of the grid's keys, as the study's table has them, quoted where there are spaces in
them: ``"tell 'anchor.text=not set'"``. The interval is the study's own, paired by seed and test row.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from tell.errors import TellError
from tell.metric_names import metric
from tell.number_text import show, show_interval
from tell.studies.labels import arm_name, point_name, value_name
from tell.studies.results import Outcome, Study, read_results
from tell.studies.stats.seed_means import Bootstrap


def chosen(study: Study, text: str) -> list[Outcome]:
    """The outcomes that ``ARM KEY=VALUE ...`` names, one a seed.

    Raises:
        TellError: none, or those of several points that differ.
    """
    arm, *wanted = shlex.split(text) or [""]
    values = {key: value.replace(",", "") for key, _, value in (part.partition("=") for part in wanted)}
    known = list(dict.fromkeys(key for row in study.rows for key in row["point"]))
    for key in values:
        if key not in known:
            remedy = f"Write {', '.join(f'{name}=VALUE' for name in known)}."
            raise TellError(f"{key!r} is no key of its grid", where=text, remedy=remedy)
    found = [
        o
        for o in study.outcomes
        if o.arm == arm
        and all(value_name(o.point.get(key), key).replace(",", "") == value for key, value in values.items())
    ]
    by_seed: dict[int, set[str]] = {}
    for outcome in found:
        by_seed.setdefault(outcome.seed, set()).add(outcome.cell)
    if not found or any(len(cells) > 1 for cells in by_seed.values()):
        what = "several points" if found else "nothing"
        raise TellError(f"names {what}", where=text or "''", remedy=f"Its keys are {', '.join(known)}.")
    return list({outcome.cell: outcome for outcome in found}.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="folder that `tell study` wrote")
    parser.add_argument("metric")
    parser.add_argument("a", help="ARM KEY=VALUE ...")
    parser.add_argument("b", help="what is taken from it")
    given = parser.parse_args(argv)
    study = read_results(given.study)
    a, b = chosen(study, given.a), chosen(study, given.b)
    gap = Bootstrap(study).difference(a, b, given.metric)
    if gap is None:
        raise TellError("was not measured on both", where=given.metric, remedy="Choose a metric of the study's table.")
    spec = metric(given.metric)
    value, ends = show(gap["value"], spec.gap_unit, sign=True), show_interval(gap["ci"], spec.gap_unit, sign=True)
    print(f"{spec.label}: {value} [{ends}], seeds: {gap['seeds']}")
    for sign, group in ((" ", a), ("−", b)):
        print(f"{sign} {', '.join(filter(None, (arm_name(group[0].arm), point_name(dict(group[0].point)))))}")


if __name__ == "__main__":
    try:
        main()
    except TellError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
