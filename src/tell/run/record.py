"""What a run writes down about itself: what was decided, what was trained, what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from tell import __version__
from tell.config import LARGEST, ArmName
from tell.errors import TellError
from tell.files import write_json, write_text
from tell.folder import AdapterFolder, RunFolder
from tell.mix.manifest import read_manifest, write_manifest
from tell.models.machine import cpu_name
from tell.run.answers import answer_limit
from tell.run.costs import arm_costs
from tell.run.plan import describe_plan
from tell.run.prepare import Prepared
from tell.run.session import dtype_name
from tell.run.task import Task

if TYPE_CHECKING:
    from tell.models.load import Loaded


class PlannedModel(BaseModel):
    """``model`` of plan.json."""

    thinking: bool = False


class PlannedGeneral(BaseModel):
    """``general`` of plan.json."""

    rows: int = Field(ge=0, le=LARGEST)


class Fit(BaseModel):
    """``fit`` of plan.json: how much of the run is done, and what was given up for --max-minutes."""

    arms: tuple[ArmName, ...] = Field(min_length=1)
    test_rows: int = Field(ge=0, le=LARGEST)
    repeat: int = Field(ge=1, le=LARGEST)
    general_rows: int = Field(ge=0, le=LARGEST)
    given_up: list[str] = []


class Planned(BaseModel):
    """What is read back of plan.json."""

    model: PlannedModel
    general: PlannedGeneral | None = None
    fit: Fit | None = None


def write_plan(folder: RunFolder, prepared: Prepared, fit: dict) -> dict:
    """Write everything that is decided before training; a resumed run must decide the same again.

    Args:
        fit: of plan.json.

    Returns:
        What plan.json holds.

    Raises:
        TellError: the data is no longer what it was when the run began.
    """
    plan = describe_plan(prepared) | {"fit": fit}
    for text in plan["mixture"]["notices"]:
        prepared.task.notices.add(text)
    task, lead = prepared.task, prepared.mixtures.get(prepared.lead or "")
    if (folder.split.exists() and not _same_split(folder.read(folder.split), json.loads(split_file(task)))) or (
        lead is not None
        and folder.manifest.exists()
        and read_manifest(folder.manifest).schema.metadata[b"tell.digest"] != lead[1].digest().encode()
    ):
        raise TellError(
            "the data has changed since this run began",
            where=str(folder.root),
            remedy="Put the files back as they were, or start anew with --overwrite.",
        )
    write_text(folder.split, split_file(task))
    if task.kind.schema is not None:
        write_json(folder.schema, task.kind.schema)
    write_json(folder.plan, plan)
    if lead is not None:
        tables, mixture = lead
        write_manifest(folder.manifest, mixture, tables, task.config.train.batch_size)
    return plan


def split_file(task: Task) -> str:
    """split.json: the content hashes of each part, and of the examples in test prompts where there are any."""
    parts = {"train": task.train, "validation": task.validation, "test": task.test}
    if task.shots:
        parts["shots"] = task.shots
    return json.dumps({name: [e.hash for e in rows] for name, rows in parts.items()}, indent=1) + "\n"


def _same_split(before: dict, now: dict) -> bool:
    """Whether two splits are of the same data: fewer test rows, which --max-minutes may leave, are among more."""
    tests = [set(part.pop("test", ())) for part in (before, now)]
    return before == now and (tests[0] <= tests[1] or tests[0] >= tests[1])


def thinks(folder: RunFolder) -> bool:
    """Whether a run's prompts let the model think."""
    if not folder.plan.exists():
        return False
    return folder.read_as(folder.plan, Planned).model.thinking


def write_adapter_notes(folder: RunFolder, task: Task, adapter: AdapterFolder) -> None:
    """What an adapter needs to be used elsewhere: the anchor, and its base model by name, or by path of a folder."""
    files = task.files
    name = str(files.path) if files.origin == "folder" else files.name
    anchor = folder.read(folder.anchor)
    anchor.pop("candidates", None)
    revision = task.config.model.revision
    notes = {"anchor": anchor, "base_model": name, "revision": revision, "origin": files.origin}
    write_json(adapter.notes, {**notes, "thinking": task.chat.thinking})
    # peft notes the folder the weights lay in, for a model of the hub one of its cache.
    write_json(adapter.config, {**folder.read(adapter.config), "base_model_name_or_path": name})


@dataclass(frozen=True)
class Metrics:
    """metrics.json; each part is as docs/reference describes it. ``benchmarks`` is absent where none was requested."""

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

    def to_dict(self) -> dict:
        parts = dict(vars(self))
        benchmarks = parts.pop("benchmarks")
        if benchmarks is None:
            return parts
        first = ("task", "arms", "differences", "forgetting", "eval")
        return {**{key: parts.pop(key) for key in first}, "benchmarks": benchmarks, **parts}


def train_numbers(prepared: Prepared, results: Mapping[str, dict], validation: Mapping[str, float]) -> dict:
    """``train`` of metrics.json.

    Args:
        results: what each trained arm's loop reported.
        validation: mean validation loss by arm; ``base`` is before training.
    """
    arms: dict[str, dict] = {}
    for arm, result in results.items():
        arms[arm] = {**result, "flops": arm_costs(prepared.task, prepared.mixtures[arm][1])["flops"]}
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
    """findings.json: what was detected and found on the way, the machine and the versions."""

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
    def of(cls, prepared: Prepared, loaded: Loaded, *, seconds: float, command: str) -> Findings:
        """What is known of a run at its end; ``seconds`` are of all its sessions."""
        task, general, kind = prepared.task, prepared.general, prepared.task.kind
        return cls(
            data=task.facts.data,
            test=task.facts.test,
            general=None if general is None else general.facts,
            split=task.split_facts,
            kind={
                "name": kind.name,
                "why": kind.why,
                "schema_inferred": kind.schema_inferred,
                "labels": list(kind.labels) if kind.labels else None,
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
