"""What a run will do, before any weight is loaded: rows, tokens, steps, FLOPs, time, memory. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tell.config import Config
from tell.data.example import Message
from tell.mix.amount import Draw, check_size
from tell.mix.mixture import TASK, Mixture
from tell.models.flops import lora_parameters, training_flops
from tell.models.machine import likely_device, likely_dtype
from tell.models.predict import answer_speed, predict_memory, predict_seconds
from tell.progress import Display, Silent
from tell.rows.prefix import common_prefix, computed_tokens
from tell.rows.row_table import RowTable
from tell.run.answers import answer_limit, check_prompts, scorer_of
from tell.run.arms import ADAPTED, arm_mixtures, lead_arm, same_runs, trained_arms, wanted_arms
from tell.run.forgetting import ANSWER_TOKENS, SETS
from tell.run.general_rows import General, draw_general, general_source, load_general
from tell.run.prepare import Task, anchor_of, limit_task, load_task, place_anchor, stand_in_anchor, task_table
from tell.run.self_written import cached_self_file, enough_of

SELF_KEPT = 0.7  # share of the model's own rows that pass the filters (91 of 128, SmolLM2-135M)
ANSWER_SECONDS_SHARE = 3.0  # decoding a token costs about this many times training on one (docs/explanation/lab.md)
GENERAL_ROW_TOKENS = 150  # of a row that forgetting is measured on; an estimate
OTHER_SECONDS = 2.0  # of an arm: its adapter merged, its answers scored; and once for the report


def plan(config: Config, *, display: Display | None = None) -> dict:
    """Count a run without loading weights.

    Args:
        config: as for `tell.tune`.

    Returns:
        What ``plan.json`` holds. With ``general: self`` and nothing written yet, the general part is an
        estimate and says so; so is the anchor's length with ``anchor: auto``. ``max_minutes`` is met by the
        speed on record, where a run measures it anew.

    Raises:
        TellError: bad data, model or configuration.
    """
    display = display or Silent()
    task = load_task(config, display)
    scorer_of(config, task.kind)  # what `tune` refuses
    wanted_arms(config)
    anchor = anchor_of(config)
    if anchor is None:
        anchor = stand_in_anchor(task)
        task.notice("the model will write the anchor; a stand-in of similar length is counted", display)
    anchor = place_anchor(task, anchor, display)
    limit_task(task, anchor)
    table = task_table(task, anchor, task.train)
    arch = task.files.architecture
    check_prompts(task.chat, anchor, task.test, arch.max_positions, task.shots, arch.vocab)
    general, draw = plan_general(task, table, display)
    if config.max_minutes:
        from tell.run.time_budget import fit_minutes

        extent, given_up = fit_minutes(task, table, general, draw, minutes=config.max_minutes, spent=0.0)
        for text in given_up:
            task.notice(text, display)
        task, draw = extent.apply(task), extent.draw
    return describe_plan(task, table, general, draw)


def plan_general(task: Task, table: RowTable, display: Display) -> tuple[General | None, Draw | None]:
    """The general side for counting: a file's rows, what the model has written, or an estimate of that."""
    config, tokens = task.config, int(table.unit.sum())
    source = general_source(task, display)
    if source == "none":
        return None, None
    if source == "self":
        enough = enough_of(config, task.unit, tokens)
        path = cached_self_file(config, task.files.fingerprint, task.chat.fingerprint, enough)
        if path is None:
            task.notice("the model has yet to write the general data; its lengths are estimated", display)
            general = estimated_general(config, task, tokens)
            return general, draw_general(config, general, tokens)
        source = str(path)
    # Comparing texts with the test rows takes longer than all else here, and only dropping changes a count.
    general = load_general(task, source, display, overlap=config.task.drop_overlap)
    return general, draw_general(config, general, tokens)


def estimated_general(config: Config, task: Task, task_tokens: int) -> General:
    """Rows of the lengths that self-written data has on average, as a table without tokens."""
    unit = config.general.self_.max_prompt_tokens // 3 + config.general.self_.max_answer_tokens // 2
    extra = len(task.chat.encode(task.chat.render([Message("user", ""), Message("assistant", "")])))
    ((way, amount),) = config.general.amount(task_tokens).items()
    tokens = amount * task_tokens if way == "ratio" else amount
    check_size(amount if way == "rows" else tokens / unit, f"general.{way}")
    n = int(amount) if way == "rows" else int(tokens / unit) + 1
    lengths = np.full(n, unit + extra, np.int32)
    table = RowTable(
        source="general",
        hashes=np.array([f"{i:016x}" for i in range(n)], dtype="U16"),
        origins=np.array(["self"] * n, dtype=str),
        tokens=lengths,
        trained=np.full(n, config.general.self_.max_answer_tokens // 2, np.int32),
        unit=np.full(n, unit, np.int32),
        ids=np.zeros(0, np.int32),
        mask=np.zeros(0, bool),
        starts=np.zeros(n + 1, np.int64),
    )
    return General(table, np.arange(n), np.zeros(0, np.int64), {"path": "self", "estimated": True, "rows": n}, [])


def computed_by(task: Task, mixture: Mixture) -> int:
    """Tokens that training computes: those of the rows, but a shared prefix once a pass (an estimate from 64 rows)."""
    config, tokens = task.config.train, mixture.column("tokens").astype(np.int64)
    if config.lora_dropout or config.neftune_alpha or not len(mixture):
        return int(tokens.sum())
    tables = {i: mixture.tables[name] for i, name in enumerate(mixture.sources)}
    heads: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for source, table in tables.items():
        rows = np.unique(mixture.row[mixture.source == source])
        if len(rows) and len(table.ids):  # rows still to be written have no tokens yet
            sample = rows[np.linspace(0, len(rows) - 1, min(64, len(rows))).astype(int)]
            heads[mixture.sources[source] == TASK] += [table.row(int(row))[0] for row in sample]
    prefix = common_prefix(heads[True]) if heads[True] else 0
    is_task = np.array([name == TASK for name in mixture.sources])[mixture.source]
    step = np.arange(len(mixture)) // config.batch_size
    cell, shape = 2 * step + ~is_task, (mixture.steps(config.batch_size), 2)
    return computed_tokens(
        np.bincount(cell, minlength=shape[0] * 2).reshape(shape),
        np.bincount(cell, weights=tokens, minlength=shape[0] * 2).astype(np.int64).reshape(shape),
        prefix=prefix,
        shared=common_prefix(heads[True] + heads[False]) if heads[False] else 0,
        micro_tokens=config.micro_tokens,
        device=likely_place(task.config)[0],
    )


def likely_place(config: Config) -> tuple[str, str]:
    """Device and number format that the run will compute in, as far as can be said without torch."""
    device = likely_device() if config.model.device == "auto" else config.model.device
    return device, likely_dtype(device) if config.model.dtype == "auto" else config.model.dtype


def arm_costs(task: Task, mixture: Mixture) -> dict:
    """Steps, tokens, FLOPs and predicted seconds of one trained arm."""
    config, arch = task.config, task.files.architecture
    lengths = mixture.column("tokens")
    trained = int(mixture.column("trained").sum(dtype=np.int64))
    adapter = lora_parameters(arch, config.train.lora_r, config.train.lora_targets)
    tokens = int(lengths.sum(dtype=np.int64))
    device, dtype = likely_place(config)
    facts = {"trained_tokens": trained, "lengths": lengths.tolist(), "lora_parameters": adapter}
    computed = max(1, computed_by(task, mixture))
    time = predict_seconds(arch, computed, fingerprint=task.files.fingerprint, device=device, dtype=dtype, **facts)
    return {
        "steps": mixture.steps(config.train.batch_size),
        "rows": len(mixture),
        "tokens": tokens,
        "computed_tokens": computed,
        "trained_tokens": trained,
        "flops": training_flops(arch, tokens, **facts),
        "seconds": time.seconds,
        "basis": time.basis,
    }


@dataclass(frozen=True)
class Pace:
    """Tokens a second: ``train`` computed in training, ``decode`` decoded."""

    train: float
    decode: float

    @classmethod
    def of(cls, task: Task, costs: dict) -> Pace:
        """From what an arm's training is predicted to take, and the decoding speed measured here, if any."""
        train = costs["computed_tokens"] / costs["seconds"] if costs["seconds"] else 1.0
        device, dtype = likely_place(task.config)
        measured = answer_speed(task.files.fingerprint, device=device, dtype=dtype)
        return cls(train, measured or train / ANSWER_SECONDS_SHARE)


def answer_seconds(task: Task, arm: str, pace: Pace) -> float:
    """Predicted seconds to answer the test rows once: an untuned model does not know where to stop."""
    if not task.test:
        return 0.0
    tuned = arm in ADAPTED
    sample = task.test[:50]
    length = np.mean([len(task.chat.encode(e.answer)) for e in sample])
    answers = length if tuned else answer_limit(task.config, task.chat, task.train)
    prompts = np.mean([len(task.chat.encode(e.question)) for e in sample])
    shots = sum(len(task.chat.encode(m.content)) for e in task.shots for m in e.messages)
    return float(len(task.test) * (answers / pace.decode + (prompts + shots) / (3 * pace.train)))


def measuring_seconds(task: Task, arms: Sequence[str], pace: Pace) -> float:
    """Predicted seconds to measure forgetting, of the untuned model and each trained arm."""
    rules = task.config.eval
    if not rules.forgetting_rows:
        return 0.0
    loss = SETS * rules.forgetting_rows * GENERAL_ROW_TOKENS / (3 * pace.train)
    return (len(arms) + 1) * (loss + rules.forgetting_answers * ANSWER_TOKENS / pace.decode)


def writing_seconds(general: General | None, draw: Draw | None, pace: Pace) -> float:
    """Predicted seconds until the model has written the general rows that are only estimated so far."""
    if general is None or draw is None or not general.facts.get("estimated"):
        return 0.0
    return float(general.table.trained[draw.indices].sum(dtype=np.int64)) / SELF_KEPT / pace.decode


def describe_plan(task: Task, table: RowTable, general: General | None, draw: Draw | None) -> dict:
    """plan.json of a prepared run; mixture and totals are those of `lead_arm`, TELL's where no arm is trained."""
    config, files = task.config, task.files
    mixtures = arm_mixtures(config, table, general, draw)
    arms = wanted_arms(config)
    lead = lead_arm(arms, mixtures) or "tell"
    _, mixture = mixtures[lead]
    same = same_runs(arms, mixtures)
    trained = [arm for arm in trained_arms(arms) if arm in mixtures and arm not in same]
    costs = {arm: arm_costs(task, mixtures[arm][1]) for arm in trained}
    main = costs.get(lead) or arm_costs(task, mixture)
    counts = mixture.counts()
    per_step = mixture.examples_per_step(config.train.batch_size)
    adapter = lora_parameters(files.architecture, config.train.lora_r, config.train.lora_targets)
    device, dtype = likely_place(config)
    memory = predict_memory(
        files.architecture,
        micro_tokens=min(
            config.train.micro_tokens, int(np.sort(mixture.column("tokens"))[-config.train.batch_size :].sum())
        ),
        trained_share=main["trained_tokens"] / max(1, main["tokens"]),
        lora_parameters=adapter,
        lora_rank=config.train.lora_r,
        device=device,
        dtype=dtype,
    )
    pace = Pace.of(task, main)
    answering = sum(answer_seconds(task, arm, pace) for arm in arms if arm not in same)
    measuring = measuring_seconds(task, list(costs), pace)
    training = sum(c["seconds"] for c in costs.values())
    writing = writing_seconds(general, draw, pace)
    dropped = [{"origin": d.origin, "reason": d.reason} for d in table.dropped]
    return {
        "model": {
            "name": files.name,
            "origin": files.origin,
            "path": str(files.path),
            "parameters": files.architecture.parameters,
            "thinking": task.chat.thinking,
        },
        "task": {
            "data": config.task.data,
            "kind": task.kind.name,
            "rows": len(table),
            "validation_rows": len(task.validation),
            "test_rows": len(task.test),
            "tokens": int(table.tokens.sum()),
            "trained_tokens": int(table.trained.sum()),
            "unit_tokens": int(table.unit.sum()),
            "repeat": mixture.repeat,
        },
        "general": None if general is None else general.facts,
        "draw": None if draw is None else {"rows": len(draw), "notices": draw.notices},
        "mixture": counts,
        "train": {
            "arm": lead,
            "preset": config.preset,
            "steps": main["steps"],
            "batch_size": config.train.batch_size,
            "examples_per_step": {
                name: round(float(per_step[:, i].mean()), 3) for i, name in enumerate(mixture.sources)
            },
            "tokens": main["tokens"],
            "trained_tokens": main["trained_tokens"],
            "flops": main["flops"],
            "learning_rate": task.training.learning_rate,
            "adapter_parameters": adapter,
        },
        "arms": costs,
        "predicted": {
            "seconds": writing + training + answering + measuring + OTHER_SECONDS * (len(arms) + 1),
            "writing_seconds": writing,
            "training_seconds": training,
            "answering_seconds": answering,
            "measuring_seconds": measuring,
            "basis": main["basis"],
            "memory_gb": round(memory.total / 1e9, 2),
        },
        "data": task.findings["data"],
        "split": task.findings["split"],
        "unit": config.tokens.unit,
        "dropped_rows": [*task.findings["dropped_rows"], *dropped, *(general.dropped if general else [])],
        "notices": [*task.notices, *counts["notices"]],
    }
