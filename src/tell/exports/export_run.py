"""`tell export`: one arm of a finished run in a form that other tools serve, with a proof that it behaves the same."""

from __future__ import annotations

import shutil
from pathlib import Path

from tell import __version__
from tell.config import Config
from tell.errors import TellError, did_you_mean
from tell.exports.card import lost_notice, measured
from tell.exports.check_export import check_export
from tell.exports.target import ExportOptions, Source, find_target
from tell.files import atomic_folder, expanded, read_json, write_json
from tell.folder import AdapterFolder
from tell.names import ARMS
from tell.progress import Display, Silent
from tell.run.answers import arm_anchor, shots_by_system
from tell.run.arms import arm_config
from tell.run.claim import check_trust
from tell.run.task import Notices
from tell.train.adapter_file import read_adapter
from tell.verbs.evaluate import Findings, run_shots
from tell.verbs.open_run import CELL_ADAPTER, OpenRun, open_run

RECORD = "export.json"
DAMAGED = "Run `tell tune` again, or restore the file."


def export(
    run: str | Path,
    to: str = "hf",
    *,
    out: str | Path | None = None,
    arm: str = "tell",
    check: bool | None = None,
    options: ExportOptions = ExportOptions(),  # noqa: B008  (frozen)
    display: Display | None = None,
) -> dict:
    """Export one arm of a finished run.

    Args:
        run: a run folder with its adapters.
        to: ``hf``, ``adapter``, ``vllm``, ``hub`` or another target of `tell.exports.target.export_targets`.
        out: folder to write; default ``exports/<run>-<to>``. It may not exist.
        arm: whose adapter and anchor.
        check: compare prompts and answers with the run's; None: where rows and runtime are there.
        options: what only some targets read.
        display: shows progress.

    Returns:
        export.json, with ``folder`` and ``next`` (what to type). ``check.passed`` is False where the artefact differs
        from the run (it is written all the same, and not published), None where it was not checked.

    Raises:
        TellError: no such run, arm, target or tool; another base model; the folder exists; the disk is too small.
    """
    notices = Notices(display or Silent())
    target = find_target(to)
    source = open_source(run, arm, options, notices)
    folder = expanded(out) if out else Path("exports") / f"{source.name}-{to}"
    _check_place(folder)
    target.ready(source, options)
    _check_room(folder, target.size(source, options))
    with atomic_folder(folder) as temporary:
        facts = target.write(source, options, temporary)
        checked = {"passed": None, "why": "not requested"}
        if check is not False:
            checked = check_export(target, source, temporary, required=bool(check))
        if lost := lost_notice(source):
            notices.add(lost)
        record = {**_facts(source, to), **facts, "check": checked, "notices": notices.texts}
        write_json(temporary / RECORD, record)
    lines = [] if checked["passed"] is False else target.finish(source, options, folder)
    return {"folder": str(folder), **record, "next": lines}


def open_source(run: str | Path, arm: str, options: ExportOptions, notices: Notices) -> Source:
    """The arm of a finished run, its files checked.

    Raises:
        TellError: an arm without an adapter, or another base model than the adapter was trained on.
    """
    if arm not in ARMS:
        remedy = f"The arms are {', '.join(ARMS)}."
        raise TellError(f"unknown arm {arm!r}", where="--arm", remedy=remedy, nearest=did_you_mean(arm, ARMS))
    opened = open_run(run, trust_remote_code=options.trust.code)
    check_trust(opened.folder, opened.config, code=options.trust.code, scorer=options.trust.scorer)
    adapter = _adapter(opened, arm)
    facts = opened.folder.read_as(opened.folder.findings, Findings)
    read_adapter(adapter.root)  # damage is reported before anything is written
    _check_base(opened, adapter, notices)
    config: Config = arm_config(opened.config, arm, opened.chosen)
    shots = run_shots(opened)
    return Source(
        opened=opened,
        arm=arm,
        adapter=adapter,
        anchor=arm_anchor(arm, opened.anchor),
        shots=shots_by_system(shots) if shots else None,
        generate=config.generate,
        most_tokens=config.generate.max_new_tokens or facts.answer_limit,
        notices=notices,
    )


def _adapter(opened: OpenRun, arm: str) -> AdapterFolder:
    """The folder of an arm's adapter; the errors name the arms that can be exported."""
    root, spec = opened.folder, ARMS[arm]
    there = [a.name for a in ARMS.values() if a.mixture and root.adapter_of(a.name).weights.exists()]
    remedy = f"Choose --arm from {', '.join(there)}." if there else f"Run `tell tune` with the arm tell; {CELL_ADAPTER}"
    if spec.adapter is None:
        raise TellError(f"the arm {arm} has no adapter: {spec.phrase}", where=str(root.root), remedy=remedy)
    if spec.in_context:
        what = f"the arm {arm} shows other examples in each prompt, which no chat template can"
        raise TellError(what, where=str(root.root), remedy=f"Export --arm {spec.adapter}.")
    found = root.adapter_of(spec.adapter)
    if not found.weights.exists():
        raise TellError(f"this run has no adapter for the arm {arm}", where=str(root.root), remedy=remedy)
    return found


def _check_base(opened: OpenRun, adapter: AdapterFolder, notices: Notices) -> None:
    """Refuse a base model that is not the one the adapter was trained on; say where that cannot be known."""
    findings, files = opened.folder.read(opened.folder.findings), opened.files
    known = (findings.get("machine") or {}).get("model_fingerprint")
    notes = read_json(adapter.notes, remedy=DAMAGED) if adapter.notes.exists() else {}
    weights = notes.get("base_weights")
    changed = "its configuration, tokenizer or template" if known and known != files.fingerprint else None
    if weights and weights != files.weights:
        changed = "its weights"
    if changed:
        raise TellError(
            f"{changed} changed since this run was trained",
            where=str(files.path),
            remedy="Put the model back as it was (model.revision pins one of the hub), or run `tell tune` again.",
        )
    if not weights:
        notices.add("the run recorded no hash of the base model's weights: only their sizes were compared")


def _check_place(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise TellError("already exists", where=f"--out {folder}", remedy="Choose another --out, or remove it.")


def _check_room(folder: Path, needed: int) -> None:
    """Refuse a disk without room, before anything is written."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise TellError(
            f"{needed / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB are free",
            where=f"--out {folder}",
            remedy="Free disk space, or choose a folder on another disk.",
        )


def _facts(source: Source, to: str) -> dict:
    """What was exported, for export.json."""
    files = source.opened.files
    arm, scores = measured(source)
    return {
        "tell": __version__,
        "to": to,
        "run": str(source.opened.folder.root.resolve()),
        "arm": source.arm,
        "base": {"name": files.name, "revision": files.revision, "fingerprint": files.fingerprint},
        "anchor": source.anchor.to_dict(),
        "thinking": source.chat.thinking,
        "scored_as": arm,
        "scores": scores,
    }
