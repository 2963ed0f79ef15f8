"""What a run writes down about itself: what was decided, what was trained, what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, Field

from tell import __version__
from tell.config import LARGEST, Arm
from tell.errors import TellError
from tell.files import write_json, write_text
from tell.folder import AdapterFolder, RunFolder
from tell.mix.manifest import read_manifest, write_manifest
from tell.mix.mixture import Mixture
from tell.models.machine import cpu_name
from tell.rows.row_table import RowTable
from tell.run.answers import answer_limit
from tell.run.general_rows import General
from tell.run.plan import arm_costs
from tell.run.prepare import Task, split_file


class PlannedModel(BaseModel):
    """``model`` of plan.json."""

    thinking: bool = False


class PlannedGeneral(BaseModel):
    """``general`` of plan.json."""

    rows: int = Field(ge=0, le=LARGEST)


class Fit(BaseModel):
    """``fit`` of plan.json: how much of the run is done, and what was given up for --max-minutes."""

    arms: tuple[Arm, ...] = Field(min_length=1)
    test_rows: int = Field(ge=0, le=LARGEST)
    repeat: int = Field(ge=1, le=LARGEST)
    general_rows: int = Field(ge=0, le=LARGEST)
    given_up: list[str] = []


class Planned(BaseModel):
    """What is read back of plan.json."""

    model: PlannedModel
    general: PlannedGeneral | None = None
    fit: Fit | None = None


def write_decided(
    folder: RunFolder, task: Task, plan: dict, lead: tuple[Mapping[str, RowTable], Mixture] | None
) -> None:
    """Everything that is decided before training; a resumed run must decide the same again.

    Args:
        lead: tables and mixture of `lead_arm`; None where no arm is trained, which leaves no manifest.

    Raises:
        TellError: the data is no longer what it was when the run began.
    """
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


def train_numbers(
    task: Task,
    results: Mapping[str, dict],
    mixtures: Mapping[str, tuple],
    validation: Mapping[str, float],
    lead: str | None,
) -> dict:
    """``train`` of metrics.json.

    Args:
        results: what each trained arm's loop reported.
        mixtures: tables and mixture of each arm, as from `arm_mixtures`.
        validation: mean validation loss by arm; ``base`` is before training.
        lead: the arm whose totals stand in front, as from `lead_arm`; zeros where no arm was trained.
    """
    arms: dict[str, dict] = {}
    for arm, result in results.items():
        arms[arm] = {**result, "flops": arm_costs(task, mixtures[arm][1])["flops"]}
        if arm in validation:
            arms[arm]["validation_loss"] = validation[arm]
    totals = arms.get(lead or "", {})
    return {
        "arm": lead,
        **{key: totals.get(key, 0) for key in ("steps", "tokens", "flops", "seconds")},
        "validation_loss_before": validation.get("base"),
        "arms": arms,
    }


def dtype_name(loaded: Any) -> str:
    """``bf16`` or ``fp32``, of a loaded model."""
    return "bf16" if "bfloat16" in str(loaded.dtype) else "fp32"


def write_findings(
    folder: RunFolder,
    task: Task,
    table: RowTable,
    general: General | None,
    loaded: Any,
    *,
    seconds: float,
    command: str,
) -> None:
    """findings.json: what was detected and found on the way, the machine and the versions.

    Args:
        table: the task rows trained on.
        loaded: the loaded model.
        seconds: the whole run's, as far as it is, all its sessions together.
    """
    dropped = [{"origin": d.origin, "reason": d.reason} for d in table.dropped]
    findings = {
        **task.findings,
        "dropped_rows": [*task.findings["dropped_rows"], *dropped, *(general.dropped if general else [])],
        "notices": task.notices,
        "answer_limit": answer_limit(task.config, task.chat, task.train),
        "machine": {
            "cpu": cpu_name(),
            "device": str(loaded.device),
            "dtype": dtype_name(loaded),
            "dtype_reason": loaded.why,
            "model_origin": task.files.origin,
            "model_fingerprint": task.files.fingerprint,
        },
        "seconds": round(seconds, 1),
        "versions": {
            "tell": __version__,
            **{name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")},
        },
        "command": command,
    }
    write_json(folder.findings, findings)
