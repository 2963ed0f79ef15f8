"""Run folders with scores alone, by the scorers that real runs use: which test rows an arm answers right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tell.files import write_json, write_jsonl
from tell.folder import RunFolder
from tell.score.intervals import estimate
from tell.score.scorers import make_scorer

LABELS = ("billing", "bug")


def scored_run(root: Path, arms: Mapping[str, Sequence[int]], *, first: int = 0, kind: str = "label") -> RunFolder:
    """A run of labels (or of text) whose arms answer row ``first + i`` right where entry i is 1."""
    folder, metrics = RunFolder(root), {}
    for arm, right in arms.items():
        references = [LABELS[i % 2] for i in range(first, first + len(right))]
        answers = [r if ok else LABELS[r == LABELS[0]] for r, ok in zip(references, right, strict=True)]
        found = make_scorer(kind, labels=LABELS).score(answers, references)
        metrics[arm] = {name: estimate(metric, seed=0, samples=200) for name, metric in found.items()}
        rows = [
            {
                "hash": f"{first + i:016x}",
                "origin": f"test.csv:{first + i + 2}",
                "prompt": f"mail {first + i}",
                "reference": references[i],
                "answer": answers[i],
                "finish": "stop",
                "tokens": 2,
                "scores": {n: float(m.per_row[i]) for n, m in found.items() if m.per_row[i] == m.per_row[i]},
            }
            for i in range(len(right))
        ]
        write_jsonl(folder.prediction(arm), rows)
    primary = make_scorer(kind, labels=LABELS).primary
    write_json(folder.metrics, {"task": {"kind": kind, "primary": primary}, "arms": metrics})
    write_json(folder.findings, {"kind": {"name": kind, "labels": list(LABELS)}})
    folder.set_status("done")
    return folder
