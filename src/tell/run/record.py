"""The files in which a run records its decisions: plan.json, split.json, the adapter's metadata."""

from __future__ import annotations

import json

from pydantic import BaseModel, Field

from tell.config_sections import ArmName
from tell.config_values import LARGEST
from tell.errors import TellError
from tell.files import write_json, write_text
from tell.folder import AdapterFolder, RunFolder
from tell.mix.manifest import read_manifest, write_manifest
from tell.run.constrained import task_constraint
from tell.run.plan import describe_plan
from tell.run.prepare import Prepared
from tell.run.task import VALIDATION_ROWS, Task


class PlannedModel(BaseModel):
    """``model`` of plan.json."""

    thinking: bool = False


class PlannedGeneral(BaseModel):
    """``general`` of plan.json."""

    rows: int = Field(ge=0, le=LARGEST)


class Fit(BaseModel):
    """``fit`` of plan.json: the extent of the run, and what was given up for --max-minutes."""

    arms: tuple[ArmName, ...] = Field(min_length=1)
    test_rows: int = Field(ge=0, le=LARGEST)
    repeat: int = Field(ge=1, le=LARGEST)
    general_rows: int = Field(ge=0, le=LARGEST)
    given_up: list[str] = []


class Planned(BaseModel):
    """The part of plan.json that is read back."""

    model: PlannedModel
    general: PlannedGeneral | None = None
    fit: Fit | None = None


def write_plan(folder: RunFolder, prepared: Prepared, fit: dict | None = None) -> None:
    """Write everything that is decided before training; a resumed run must reach the same decisions.

    Args:
        fit: the extent of the run and what was given up for it, as `tell.run.in_time.InTime` decides.

    Raises:
        TellError: the data has changed since the run began.
    """
    plan = describe_plan(prepared) | ({"fit": fit} if fit else {})
    for text in prepared.mixture_notices:
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
            remedy="Put the files back as they were, or start again with --overwrite.",
        )
    write_text(folder.split, split_file(task))
    if task.kind.schema is not None:
        write_json(folder.schema, task.kind.schema)
    if (constraint := task_constraint(task)) is not None:
        write_json(folder.constraint, constraint.to_dict())
    write_json(folder.plan, plan)
    if lead is not None:
        tables, mixture = lead
        write_manifest(folder.manifest, mixture, tables, task.config.train.batch_size)


def split_file(task: Task) -> str:
    """split.json: the content hashes of each part, and of the examples in test prompts where there are any."""
    parts = {"train": task.train, "validation": task.whole_validation, "test": task.test}
    if task.shots:
        parts["shots"] = task.shots
    return json.dumps({name: [e.hash for e in rows] for name, rows in parts.items()}, indent=1) + "\n"


def _same_split(before: dict, now: dict) -> bool:
    """Whether two splits are of the same data: fewer test rows, as --max-minutes may leave, must be among the more.

    Older runs list only the validation rows that they measured, not all of the part.
    """
    tests = [set(part.pop("test", ())) for part in (before, now)]
    if before.get("validation") == now["validation"][:VALIDATION_ROWS]:
        now["validation"] = before["validation"]
    return before == now and (tests[0] <= tests[1] or tests[0] >= tests[1])


def thinks(folder: RunFolder) -> bool:
    """Whether a run's prompts let the model think."""
    if not folder.plan.exists():
        return False
    return folder.read_as(folder.plan, Planned).model.thinking


def write_adapter_notes(folder: RunFolder, task: Task, adapter: AdapterFolder) -> None:
    """Add to an adapter what it needs elsewhere: the anchor, and the base model's name or folder."""
    files = task.files
    name = str(files.path) if files.origin == "folder" else files.name
    anchor = folder.read(folder.anchor)
    anchor.pop("candidates", None)
    revision = task.config.model.revision
    notes = {"anchor": anchor, "base_model": name, "revision": revision, "origin": files.origin}
    notes["base_weights"] = files.weights
    write_json(adapter.notes, {**notes, "thinking": task.chat.thinking})
    # peft records the folder of the weights, which for a hub model is in the hub's cache.
    write_json(adapter.config, {**folder.read(adapter.config), "base_model_name_or_path": name})
