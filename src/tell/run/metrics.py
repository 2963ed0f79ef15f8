"""metrics.json and findings.json: a run's measurements, and what it detected on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from tell import __version__
from tell.files import write_json
from tell.folder import RunFolder
from tell.models.machine import cpu_name
from tell.run.answers import answer_limit
from tell.run.costs import arm_costs
from tell.run.forgetting import numbers
from tell.run.measure import Measured, score_arms
from tell.run.prepare import Prepared
from tell.run.session import dtype_name
from tell.run.train_arms import Trained

if TYPE_CHECKING:
    from tell.models.load import Loaded


OPTIONAL = ("labels", "baseline", "benchmarks", "readout", "pseudo")


@dataclass(frozen=True)
class Metrics:
    """metrics.json; each part is as docs/reference describes it. The last ones may be absent."""

    task: dict
    arms: dict
    differences: dict
    forgetting: dict
    eval: dict
    mixture: dict
    train: dict
    failed: dict[str, str]
    same: dict[str, str]
    benchmarks: dict | None = None
    readout: list[dict] | None = None
    pseudo: dict[str, dict] | None = None
    labels: dict | None = None
    baseline: dict | None = None

    def to_dict(self) -> dict:
        parts = dict(vars(self))
        optional = {key: value for key in OPTIONAL if (value := parts.pop(key)) is not None}
        first = ("task", "arms", "differences", "forgetting", "eval")
        return {**{key: parts.pop(key) for key in first}, **optional, **parts}


def run_metrics(prepared: Prepared, trained: Trained, measured: Measured) -> Metrics:
    """metrics.json of a run: scores with intervals, paired differences of arms, forgetting, cost of training."""
    config = prepared.task.config
    lead = prepared.mixtures.get(prepared.lead or "")
    return Metrics(
        task={"kind": prepared.task.kind.name, "primary": measured.primary},
        **score_arms(measured.answers, config, prepared.task.kind),
        forgetting={} if measured.forgetting is None else numbers(measured.forgetting, config),
        mixture={} if lead is None else lead[1].counts(),
        train=train_numbers(prepared, trained.results, measured.validation),
        failed=trained.failed,
        same=prepared.same,
        benchmarks=measured.benchmarks,
        readout=None if measured.readout is None else measured.readout.numbers(),
        pseudo=prepared.pseudo_facts or None,
    )


def train_numbers(prepared: Prepared, results: Mapping[str, dict], validation: Mapping[str, float]) -> dict:
    """``train`` of metrics.json.

    Args:
        results: what each trained arm's loop reported.
        validation: mean validation loss by arm; ``base`` is before training.
    """
    arms: dict[str, dict] = {}
    for arm, result in results.items():
        arms[arm] = {**result, "flops": arm_costs(prepared.task_of(arm), prepared.mixtures[arm][1])["flops"]}
        if arm in validation:
            arms[arm]["validation_loss"] = validation[arm]
    totals = arms.get(prepared.lead or "", {})
    return {
        "arm": prepared.lead,
        **{key: totals.get(key, 0) for key in ("steps", "tokens", "flops", "seconds")},
        "validation_loss_before": validation.get("base"),
        "arms": arms,
    }


@dataclass(frozen=True)
class Findings:
    """findings.json: what was detected on the way, the machine and the versions."""

    data: dict
    test: dict | None
    general: dict | None
    split: dict[str, int]
    kind: dict
    overlap: dict
    dropped_rows: list[dict]
    notices: list[str]
    answer_limit: int
    machine: dict
    seconds: float
    versions: dict[str, str]
    command: str

    def to_dict(self) -> dict:
        return dict(vars(self))

    @classmethod
    def of(cls, prepared: Prepared, loaded: Loaded, *, seconds: float, command: str = "") -> Findings:
        """Facts of a finished run; ``seconds`` are of all its sessions."""
        task, general, kind = prepared.task, prepared.general, prepared.task.kind
        return cls(
            data=task.facts.data,
            test=task.facts.test,
            general=prepared.general_facts,
            split=task.split_facts,
            kind={
                "name": kind.name,
                "why": kind.why,
                "schema_inferred": kind.schema_inferred,
                **({"shown": kind.shown} if kind.shown is not None else {}),
                "labels": list(kind.labels) if kind.labels else None,
                **({"form": kind.form} if kind.form else {}),
            },
            overlap={
                "train_test": task.facts.overlap,
                "general_test": None if general is None else general.overlap,
                "dropped": task.facts.overlap_dropped + (general.overlap_dropped if general else 0),
            },
            dropped_rows=prepared.dropped_rows,
            notices=task.notices.texts,
            answer_limit=answer_limit(task.config, task.chat, task.train),
            machine={
                "cpu": cpu_name(),
                "device": str(loaded.device),
                "dtype": dtype_name(loaded),
                "dtype_reason": loaded.why,
                "model_origin": task.files.origin,
                "model_fingerprint": task.files.fingerprint,
            },
            seconds=round(seconds, 1),
            versions={
                "tell": __version__,
                **{name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")},
            },
            command=command,
        )


def write_results(folder: RunFolder, metrics: Metrics, findings: Findings) -> None:
    """Write findings.json and metrics.json."""
    write_json(folder.findings, findings.to_dict())
    write_json(folder.metrics, metrics.to_dict())
