"""Reports of training steps: as JSON Lines, and to trackers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tell.config_sections import TrainConfig
from tell.train.trackers import Note, Reported, Trackers


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a progress display needs after a step."""

    step: int
    steps: int
    loss: float
    by_source: dict[str, float]
    tokens: int
    tokens_total: int
    seconds: float


class StepLog:
    """One JSON line per step, and the same numbers for the trackers of ``train.report_to``."""

    def __init__(self, path: Path, config: TrainConfig, *, keep: int, note: Note) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        if keep and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()[:keep]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        self.trackers = Trackers(config.report_to, Reported(path, keep, note), config.model_dump(mode="json"))

    def write(self, report: StepReport, rate: float, norm: float) -> None:
        row = {
            "step": report.step,
            "loss": round(report.loss, 6),
            "by_source": {name: round(value, 6) for name, value in report.by_source.items()},
            "learning_rate": rate,
            "tokens": report.tokens_total,
            "seconds": round(report.seconds, 3),
            "grad_norm": round(norm, 6),
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        scalars = {"loss/all": report.loss, **{f"loss/{name}": x for name, x in report.by_source.items()}}
        self.trackers.log({**scalars, "learning_rate": rate, "grad_norm": norm}, report.step)

    def close(self) -> None:
        self.file.close()
        self.trackers.close()
