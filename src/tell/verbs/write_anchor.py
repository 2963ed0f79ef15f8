"""`tell anchor`: let the model write, score and choose an anchor, without a run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tell.anchor.anchor import Anchor
from tell.anchor.separation import FEWEST, separate_states
from tell.config import Config
from tell.data.example import Example
from tell.data.general import is_given
from tell.errors import Diverged, TellError
from tell.mix.amount import Draw
from tell.mix.mixture import Mixture, build, build_repeated
from tell.progress import Display
from tell.rows.row_table import RowTable
from tell.rows.tokenize import RowRules, prompt_ids, tokenize
from tell.run.anchor_candidates import anchor_losses
from tell.run.choose_anchor import anchor_candidates
from tell.run.session import Session
from tell.run.task import Task, anchor_text, limited_rows, load_task
from tell.score.intervals import difference, estimate
from tell.score.means import mean_metric
from tell.score.scored import Metric
from tell.seeds import permutation
from tell.verbs.hidden_states import QUERIES, general_queries, layer_numbers, separation_numbers

SCORES = ("loss", "separation", "short-run")
SHORT_STEPS = 8


def write_anchor(
    config: Config,
    *,
    compare: Sequence[str] = (),
    scores: Sequence[str] | None = None,
    short_steps: int | None = None,
    display: Display | None = None,
) -> dict:
    """Candidate anchors, written by the model and by hand, scored, best first.

    The candidate with the lowest loss wins: loss of the reference answers under the untuned model, or, with short
    runs, validation loss after them. Separation is reported but never decides.

    Args:
        config: as for `tell.tune`; ``anchor.text`` is ignored. Separation and short runs take general rows from
            ``general.source`` where it is a file or hub name.
        compare: hand-written anchors, texts or ``@FILE``; the others' losses are paired with the first one's.
        scores: some of `SCORES`; None for all cheap ones: ``loss``, and ``separation`` where there are general rows.
        short_steps: optimiser steps of each short run (``short-run``; default `SHORT_STEPS`): same rows, order and
            seed under every candidate.

    Returns:
        The content of ``anchor.json``: text, place, origin, hash, candidates; and ``decided_by``. Candidates also have
        ``loss`` and ``short_run`` with 95 % intervals over rows, ``loss_difference`` and ``short_run_difference``,
        paired, from the first of ``compare``, and ``separation``.

    Raises:
        TellError: bad data, model or scores.
    """
    by_hand = list(dict.fromkeys(anchor_text(text, "--compare") for text in compare))
    wanted = _wanted(config, scores, short_steps)
    task = load_task(config, display)
    session = Session(task.files, task.config, task.chat, task.display)
    place, candidates = anchor_candidates(task, session, by_hand)
    usable = [c for c in candidates if c.losses is not None]
    losses = [c.losses for c in candidates if c.losses is not None]
    anchors = [Anchor(c.text, place, c.origin) for c in usable]
    metrics = {"loss": [mean_metric(x) for x in losses]}
    if "short-run" in wanted:
        steps = short_steps or SHORT_STEPS
        metrics["short_run"] = [mean_metric(x) for x in short_runs(task, session, anchors, steps)]
    decided_by = "short_run" if "short_run" in metrics else "loss"
    entries = [c.to_dict() for c in usable]
    first = next((i for i, c in enumerate(usable) if by_hand and c.text == by_hand[0]), None)
    for name, values in metrics.items():
        _add_numbers(entries, name, values, first, config)
    if "separation" in wanted:
        for entry, numbers in zip(entries, _separations(task, session, anchors), strict=True):
            entry["separation"] = numbers
    if "short_run" in metrics:
        for entry in entries:
            entry["short_run"]["steps"] = steps
    ranked = sorted(range(len(usable)), key=lambda i: _rank(entries[i][decided_by]["value"]))
    thrown = [c.to_dict() for c in candidates if c.losses is None]
    best = anchors[ranked[0]]
    return {**best.to_dict(), "candidates": [*(entries[i] for i in ranked), *thrown], "decided_by": decided_by}


def _wanted(config: Config, scores: Sequence[str] | None, short_steps: int | None) -> set[str]:
    """The scores to compute.

    Raises:
        TellError: an unknown score, or one that lacks its data.
    """
    general = is_given(config.general)
    if short_steps is not None and short_steps < 1:
        raise TellError(f"{short_steps} steps", where="--short-steps", remedy="Set it to 1 or more.")
    if scores is None:
        cheap = {"loss", "separation"} if general and find_spec("sklearn") else {"loss"}
        return cheap | ({"short-run"} if short_steps else set())
    for name in scores:
        if name not in SCORES:
            raise TellError(f"unknown score {name!r}", where="--score", remedy=f"Use some of {', '.join(SCORES)}.")
    if "separation" in scores and not general:
        raise TellError("separation needs general rows", where="--score", remedy="Pass a file with --general.")
    if short_steps and "short-run" not in scores:
        raise TellError("is set without the score short-run", where="--short-steps", remedy="Add it to --score.")
    return {"loss", *scores}


def _rank(value: float | None) -> float:
    return np.inf if value is None else value


def _add_numbers(entries: list[dict], name: str, values: list[Metric], first: int | None, config: Config) -> None:
    """Add a score with its interval to each entry, and its difference from the ``first`` entry's."""
    rule = {"seed": config.seed, "samples": config.eval.bootstrap}
    for i, (entry, value) in enumerate(zip(entries, values, strict=True)):
        entry[name] = estimate(value, **rule)
        if first is not None and i != first:
            entry[f"{name}_difference"] = difference(value, values[first], **rule)


def _separations(task: Task, session: Session, anchors: Sequence[Anchor]) -> list[dict]:
    """How far each anchor moves the task's queries from general ones, at the middle layer."""
    from tell.train.states import hidden_states

    rows = limited_rows(task, anchors[0])
    order = permutation(len(rows), task.config.seed, "separate", "task")[:QUERIES]
    queries = [rows[int(i)] for i in order]
    general = general_queries(task, most=len(queries))
    if min(len(queries), len(general)) < FEWEST:
        raise TellError(
            f"separation of {len(queries)} task rows from {len(general)} general rows",
            where="--score",
            remedy=f"Use at least {FEWEST} of each, or leave out separation.",
        )
    queries = queries[: len(general)]
    layer = layer_numbers("middle", task.files.architecture.layers)
    micro_tokens = task.config.train.micro_tokens
    out: list[dict] = []
    with task.display.bar("anchor: separation", len(anchors), "candidates") as advance:
        base = hidden_states(
            session.model, [prompt_ids(task.chat, e) for e in general], layer, micro_tokens=micro_tokens
        )[0, 0]
        for anchor in anchors:
            prompts = [prompt_ids(task.chat, e, anchor) for e in queries]
            states = hidden_states(session.model, prompts, layer, micro_tokens=micro_tokens)[0, 0]
            found = separate_states(states, base, seed=task.config.seed)
            out.append({"layer": layer[0], **separation_numbers(found, task.config)})
            advance(1)
    return out


def short_runs(task: Task, session: Session, anchors: Sequence[Anchor], steps: int) -> list[np.ndarray]:
    """(rows,) losses of the validation rows after a short LoRA run under each anchor; NaN where training diverged.

    At least half of the rows are general ones where there is a source: each task row occurs equally often. Where no
    row is kept for validation, every fourth training row is.
    """
    from tell.train.trainer import Trainer
    from tell.train.training_job import TrainingHooks, TrainingJob

    config, chat, seed = task.config, task.chat, task.config.seed
    rules = RowRules(config.train.max_length, "drop", "drop", config.train.loss_on)
    train, validation = _short_rows(task, anchors, rules)
    general = None
    total = steps * config.train.batch_size
    if is_given(config.general):
        examples = general_queries(task, most=total // 2)
        general = tokenize(examples, chat, source="general", rules=replace(rules, misfit="drop"))
    out: list[np.ndarray] = []
    with task.display.bar("anchor: short runs", steps * len(anchors), "steps") as advance:
        for anchor in anchors:
            table = tokenize(train, chat, source="task", anchor=anchor, rules=rules)
            tables, mixture = _short_mixture(table, general, total, config)
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                alone = {"checkpoint_every": 0, "general_target": "text", "report_to": ()}
                training = task.training(mixture).model_copy(update=alone)
                job = TrainingJob(tables, mixture, training, seed, folder / "adapter", folder / "log.jsonl")
                hooks = TrainingHooks(progress=lambda report: advance(1, f"loss {report.loss:.3f}"))
                try:
                    Trainer(session.model, job, device=session.loaded.device, hooks=hooks).run()
                except Diverged:
                    out.append(np.full(len(validation), np.nan))
                    continue
                with session.adapter(folder / "adapter"):
                    out.append(anchor_losses(session, validation, anchor))
    return out


def _short_rows(task: Task, anchors: Sequence[Anchor], rules: RowRules) -> tuple[list[Example], list[Example]]:
    """Rows to train and validate on, the same for every anchor: those too long with any anchor are left out."""
    train = limited_rows(task, anchors[0])
    validation = task.validation
    if not validation:
        train, validation = [e for i, e in enumerate(train) if i % 4], train[::4]
    lost = {
        dropped.origin
        for anchor in anchors
        for dropped in tokenize([*train, *validation], task.chat, source="task", anchor=anchor, rules=rules).dropped
    }
    train, validation = ([e for e in rows if e.origin not in lost] for rows in (train, validation))
    if not train or not validation:
        raise TellError(
            f"{len(train)} rows to train on and {len(validation)} to validate on",
            where="--score short-run",
            remedy="Add task rows, or raise train.max_length.",
        )
    return train, validation


def _short_mixture(
    table: RowTable, general: RowTable | None, total: int, config: Config
) -> tuple[dict[str, RowTable], Mixture]:
    """``total`` rows, half of them general where there are any; by row numbers alone, so the same for every anchor."""
    if general is None:
        return {"task": table}, build_repeated(table, total, config.seed)
    rows = permutation(len(table), config.seed, "short run")[: max(1, total // 2)]
    repeat = max(1, total // 2 // len(rows))
    wanted = total - repeat * len(rows)
    draw = Draw(np.resize(np.arange(len(general)), wanted).astype(np.int32), wanted / len(general))
    tables = {"task": table, "general": general}
    order, seed = config.mix.order, config.seed
    return tables, build(tables, general=draw, repeat=repeat, ordering=order, seed=seed, task_rows=rows)
