"""Do the metrics we ship rank translations as people do? WMT21 Icelandic-English, ten systems.

    python recipes/checks/wmt21_metrics.py DATA [--bleurt NAME]

DATA holds ``newstest2021.is-en.all.xml.gz`` and ``ad-seg-scores-is-en.csv.gz`` of
github.com/wmt-conference/wmt21-news-systems.
Prints the table of docs/explanation/method.md, "Translation metrics".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from correlation import correlations  # the file next to this one

from tell.data.formats import check_file, read_text
from tell.errors import TellError
from tell.metric_names import metric
from tell.paper.parallel_texts import Document, read_wmt
from tell.score.scored import Metric
from tell.score.text import TextScorer

XML, SCORES = "newstest2021.is-en.all.xml.gz", "ad-seg-scores-is-en.csv.gz"
METRICS = ("bleurt", "chrf", "bleu", "rouge_l")
COLUMNS = {
    "segment": {"kendall_like": "Kendall-like", "pearson": "Pearson"},
    "document": {"pearson": "Pearson, documents"},
    "system": {"system_pearson": "Pearson, systems", "pairwise_accuracy": "pairwise accuracy"},
}


def read_judgements(path: Path, systems: Sequence[str], segments: int) -> tuple[np.ndarray, np.ndarray]:
    """(segments, systems) raw and standardised direct assessments, NaN where there is none.

    Lines are ``SYS SID RAW.SCR Z.SCR N``: SYS is the system's name with a number behind a dot, SID counts the segments
    from 1, document by document in the order of ids.
    """
    raw, standardised = np.full((2, segments, len(systems)), np.nan)
    lines = read_text(check_file(path), compression=path.suffix).splitlines()
    for number, line in enumerate(lines[1:], 2):
        try:
            name, segment, points, z, _ = line.split()
            place = int(segment) - 1, systems.index(name.rpartition(".")[0])
            raw[place], standardised[place] = float(points), float(z)
        except (ValueError, IndexError) as error:
            raise TellError(
                f"is no judgement of these outputs ({error})",
                where=f"{path}:{number}",
                remedy="Give the scores that belong to the test set.",
            ) from error
    return raw, standardised


def agreement(documents: Sequence[Document], judgements: tuple[np.ndarray, np.ndarray], **options: object) -> dict:
    """Level, metric, measure: segment by segment, and with each document as one text."""
    systems = list(documents[0].systems)
    lengths = [len(doc.texts["en"]) for doc in documents]
    owner = np.repeat(np.arange(len(documents)), lengths)
    by_document = [_means(part, owner, len(documents)) for part in judgements]
    found: dict[str, dict] = {}
    scorer = TextScorer(options.pop("bleurt", None))
    for level, (raw, standardised) in (("segment", judgements), ("document", by_document)):
        scored: list[Mapping[str, Metric]] = []
        for system in systems:
            answers, references = zip(*_texts(documents, system, level), strict=True)
            scored.append(scorer.score(answers, references))
        found[level] = {
            name: correlations([part[name] for part in scored], raw, standardised, **options)
            for name in METRICS
            if name in scored[0]
        }
    return {**found, "system": found["segment"]}


def _texts(documents: Sequence[Document], system: str, level: str) -> list[tuple[str, str]]:
    if level == "document":
        return [("\n".join(doc.systems[system]), doc.text("en")) for doc in documents]
    return [pair for doc in documents for pair in zip(doc.systems[system], doc.texts["en"], strict=True)]


def _means(values: np.ndarray, owner: np.ndarray, documents: int) -> np.ndarray:
    """(documents, systems) mean of each document's judged segments."""
    judged = np.isfinite(values)
    sums, counts = np.zeros((2, documents, values.shape[1]))
    np.add.at(sums, owner, np.where(judged, values, 0.0))
    np.add.at(counts, owner, judged)
    with np.errstate(invalid="ignore"):
        return sums / counts


def table(found: Mapping[str, Mapping[str, Mapping[str, dict]]]) -> str:
    """Markdown, a row per metric."""
    cells = [(level, key, title) for level, part in COLUMNS.items() for key, title in part.items()]
    lines = ["| metric | " + " | ".join(title for *_, title in cells) + " |", "|---|" + "---|" * len(cells)]
    for name in found["segment"]:
        values = [found[level][name][key] for level, key, _ in cells]
        shown = [f"{v['value']:.3f} [{v['ci'][0]:.3f}, {v['ci'][1]:.3f}]" for v in values]
        lines.append(f"| {metric(name).phrase} | " + " | ".join(shown) + " |")
    first = next(iter(found["segment"]))
    counts = ", ".join(f"{title} {found[level][first][key]['n']:,}" for level, key, title in cells)
    return "\n".join([*lines, "", f"n: {counts}"])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of WMT21's files")
    parser.add_argument("--bleurt", help="folder or name of a BLEURT-20 checkpoint")
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap resamples")
    parser.add_argument("--documents", type=int, help="the first so many documents only")
    given = parser.parse_args(argv)
    try:
        _, documents = read_wmt(given.data / XML)
        systems, segments = list(documents[0].systems), sum(len(doc.texts["en"]) for doc in documents)
        judgements = read_judgements(given.data / SCORES, systems, segments)
        documents = documents[: given.documents]
        segments = sum(len(doc.texts["en"]) for doc in documents)
        judgements = (judgements[0][:segments], judgements[1][:segments])
        print(table(agreement(documents, judgements, bleurt=given.bleurt, samples=given.samples)))
    except TellError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
