"""`tell eval`: score the arms of a finished run again, on its own test rows or on others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tell.config import Config, GenerateConfig, make_config, merge, parse_overrides
from tell.data.budget import take_rows
from tell.data.example import Example
from tell.data.kind import Kind
from tell.data.sources import load
from tell.errors import TellError
from tell.progress import Display, Silent
from tell.run import RunFolder, write_jsonl
from tell.study.answer_loss import answer_loss_metric, answer_losses
from tell.study.scoring import (
    adapter_ready,
    answer_costs,
    answer_rows,
    arm_numbers,
    arm_prompts,
    check_prompts,
    eval_numbers,
    score_rows,
    scorer_of,
)
from tell.study.session import CELL_ADAPTER, OpenRun, open_run

WITHOUT = {"test": ", or give test rows with --test", "training": ", or leave the arm icl out", "fixed example": ""}


def evaluate(
    run: str | Path,
    *,
    arms: Sequence[str] | None = None,
    test: str | None = None,
    greedy: bool | None = None,
    seed: int | None = None,
    rows: int | None = None,
    overrides: Sequence[str] = (),
    display: Display | None = None,
) -> dict:
    """Score arms of a run.

    Args:
        run: a run folder with its adapters.
        arms: default: those of the run that can be answered with.
        test: another test file; default: the run's own test rows.
        greedy, seed: decoding other than the run's.
        rows: score at most this many test rows, drawn by seed.
        overrides: ``generate.x=y`` as for ``--set``.
        display: shows progress.

    Returns:
        The shape of metrics.json: ``task``, ``arms``, ``differences`` and ``eval`` as scored now; ``forgetting``,
        ``mixture``, ``train`` and ``failed`` as the run measured them. The run's own metrics and answers stay as they
        are; the new answers go to ``predictions/eval/``.

    Raises:
        TellError: no run, no adapter for an arm, bad test file, rows that are no longer there.
    """
    display = display or Silent()
    opened = open_run(run)
    config = opened.config
    if overrides:
        config = _override(config, overrides)
    seed = config.seed if seed is None else seed
    wanted = list(dict.fromkeys(arms or (a for a in config.eval.arms if adapter_ready(opened.folder, a))))
    if not wanted:
        raise TellError(
            "has no adapter left",
            where=str(opened.folder.root),
            remedy=f"Give `tell tune` again; {CELL_ADAPTER}",
        )
    adapters = {arm: opened.adapter(arm) for arm in wanted}
    facts = _read(opened.folder, opened.folder.findings)
    train, examples, shots = _examples(opened, test, need_train="icl" in wanted)
    if rows is not None and rows < len(examples):
        examples = [examples[i] for i in sorted(take_rows(len(examples), rows, seed))]
    check_prompts(opened.chat, opened.anchor, examples, opened.files.architecture.max_positions, shots)
    kind = _kind(opened, facts["kind"])
    scorer = scorer_of(config, kind)
    from tell.generate.sampler import Decoding
    from tell.train.lora import adapter_merged

    model = opened.load(config, display=display)
    limit = config.generate.max_new_tokens or facts["answer_limit"]
    rule: GenerateConfig = config.generate
    if greedy is not None:
        rule = rule.model_copy(update={"greedy": greedy})
    decoding = Decoding.of(rule, max_new_tokens=limit, stop_ids=opened.chat.stop_ids, seed=seed)
    scored: dict[str, dict] = {}
    costs: dict[str, dict] = {}
    for arm in wanted:
        room = min(opened.engine.max_positions - limit, config.train.max_length * 2)
        prompts, _ = arm_prompts(
            arm,
            opened.chat,
            opened.anchor,
            examples,
            train,
            examples=config.eval.icl_examples,
            room=room,
            seed=config.seed,
            shots=shots,
        )
        with adapter_merged(model, adapters[arm]):
            answers = answer_rows(
                opened.engine, opened.chat, prompts, examples, decoding, title=f"answer {arm}", display=display
            )
            more = {}
            if config.eval.answer_loss:
                values = answer_losses(
                    model,
                    opened.chat,
                    prompts,
                    examples,
                    positions=opened.files.architecture.max_positions,
                    micro_tokens=config.train.micro_tokens,
                    device=opened.engine.device,
                    title=f"answer loss {arm}",
                    display=display,
                )
                more = answer_loss_metric(values)
        scored[arm] = score_rows(scorer, answers, more)
        costs[arm] = answer_costs(opened.files.architecture, prompts, answers)
        write_jsonl(opened.folder.predictions / "eval" / f"{arm}.jsonl", answers)
    values, gaps = arm_numbers(scored, seed=seed, samples=config.eval.bootstrap)
    metrics = _read(opened.folder, opened.folder.metrics)
    kept = {key: metrics.get(key) for key in ("forgetting", "mixture", "train", "failed")}
    kept |= {key: metrics[key] for key in ("benchmarks",) if key in metrics}
    task = {"kind": kind.name, "primary": scorer.primary}
    return {"task": task, "arms": values, "differences": gaps, "eval": eval_numbers(costs), **kept}


def _override(config: Config, overrides: Sequence[str]) -> Config:
    changes = parse_overrides(overrides)
    if set(changes) - {"generate", "eval"}:
        raise TellError(
            f"--set {next(iter(set(changes) - {'generate', 'eval'}))} has no effect on scoring",
            remedy="Only generate.* and eval.* can be changed after training.",
        )
    return make_config(merge(config.model_dump(by_alias=True, mode="json"), changes), where="--set")


def _read(folder: RunFolder, path: Path) -> dict:
    return json.loads(folder.require(path, "`tell tune`").read_text(encoding="utf-8"))


def _kind(opened: OpenRun, facts: dict) -> Kind:
    """The kind of task as the run found it."""
    folder = opened.folder
    schema = json.loads(folder.schema.read_text(encoding="utf-8")) if folder.schema.exists() else None
    labels = tuple(facts["labels"]) if facts.get("labels") else None
    return Kind(facts["name"], schema, facts["schema_inferred"], labels, facts["why"])


def _examples(
    opened: OpenRun, test: str | None, *, need_train: bool
) -> tuple[list[Example], list[Example], list[Example]]:
    """Training rows (for in-context examples only), test rows and fixed examples, found again by their hashes."""
    task = opened.config.task
    parts = _read(opened.folder, opened.folder.split)
    shown = parts.get("shots") or []
    needed = [task.data] * bool(need_train or shown) + [task.test or task.data] * (test is None)
    by_hash = _by_hash(opened, needed)
    train = _pick(parts["train"], by_hash, task.data, "training") if need_train else []
    shots = _pick(shown, by_hash, task.data, "fixed example")
    if test:
        return train, load(test, name="task", columns=task.columns).examples, shots
    return train, _pick(parts["test"], by_hash, task.test or task.data, "test"), shots


def run_shots(opened: OpenRun) -> list[Example]:
    """The fixed examples of the run's prompts (``task.shots``), found again by their content hashes.

    Raises:
        TellError: they are no longer in the task's file.
    """
    hashes = _read(opened.folder, opened.folder.split).get("shots") or []
    data = opened.config.task.data
    return _pick(hashes, _by_hash(opened, [data] * bool(hashes)), data, "fixed example")


def _by_hash(opened: OpenRun, paths: Iterable[str | None]) -> dict[str, Example]:
    """The rows of task files, each file read once."""
    columns = opened.config.task.columns
    files = dict.fromkeys(path for path in paths if path)
    return {e.hash: e for path in files for e in load(path, name="task", columns=columns).examples}


def _pick(hashes: Sequence[str], by_hash: dict[str, Example], path: str | None, what: str) -> list[Example]:
    missing = sum(h not in by_hash for h in hashes)
    if missing:
        raise TellError(
            f"{missing} of the run's {len(hashes)} {what} rows are no longer in the file",
            where=str(path),
            remedy=f"Put the file back as it was{WITHOUT[what]}.",
        )
    return [by_hash[h] for h in hashes]
