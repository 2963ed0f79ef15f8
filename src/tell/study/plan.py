"""What a run will do, before any weight is loaded: rows, tokens, steps, FLOPs, time, memory. No torch."""

from __future__ import annotations

import numpy as np

from tell.config import Config
from tell.data.example import Message
from tell.mix.amount import Draw, check_size
from tell.mix.mixture import TASK, Mixture
from tell.models.flops import lora_parameters, training_flops
from tell.models.machine import likely_device, likely_dtype
from tell.models.predict import predict_memory, predict_seconds
from tell.progress import Display, Silent
from tell.rows.prefix import common_prefix, computed_tokens
from tell.rows.table import RowTable
from tell.study.arms import arm_mixtures, lead_arm, trained_arms, wanted_arms
from tell.study.prepare import (
    General,
    Task,
    anchor_of,
    draw_general,
    general_source,
    limit_task,
    load_general,
    load_task,
    place_anchor,
    stand_in_anchor,
    task_table,
)
from tell.study.scoring import scorer_of
from tell.study.self_data import cached_self_file, enough_of

SELF_KEPT = 0.7  # share of the model's own rows that pass the filters (91 of 128, SmolLM2-135M)
ANSWER_SECONDS_SHARE = 3.0  # decoding a token costs about this many times training on one (docs/lab.md)


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
    general, draw = plan_general(task, table, display)
    if general is not None and draw is not None and config.max_minutes:
        draw = fit_minutes(task, table, general, draw, config.max_minutes, 0.0)
    return describe_plan(task, table, general, draw)


def plan_general(task: Task, table: RowTable, display: Display) -> tuple[General | None, Draw | None]:
    """The general side for counting: a file's rows, what the model has written, or an estimate of that."""
    config, tokens = task.config, int(table.unit.sum())
    source = general_source(config)
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


def answer_seconds(task: Task, costs: dict) -> float:
    """Predicted seconds to answer the test rows once, from the training speed."""
    speed = costs["computed_tokens"] / costs["seconds"] if costs["seconds"] else 1.0
    answers = np.mean([len(task.chat.encode(e.answer)) for e in task.test[:50]]) if task.test else 0.0
    prompts = np.mean([len(task.chat.encode(e.question)) for e in task.test[:50]]) if task.test else 0.0
    prompts += sum(len(task.chat.encode(m.content)) for e in task.shots for m in e.messages)
    return len(task.test) * (answers * ANSWER_SECONDS_SHARE + prompts / 3) / speed


def writing_seconds(general: General | None, costs: dict) -> float:
    """Predicted seconds until the model has written the general rows that are only estimated so far."""
    if general is None or not general.facts.get("estimated"):
        return 0.0
    speed = costs["computed_tokens"] / costs["seconds"] if costs["seconds"] else 1.0
    return float(general.table.unit.sum()) / SELF_KEPT * ANSWER_SECONDS_SHARE / speed


def describe_plan(task: Task, table: RowTable, general: General | None, draw: Draw | None) -> dict:
    """plan.json of a prepared run; mixture and totals are those of `lead_arm`, TELL's where no arm is trained."""
    config, files = task.config, task.files
    mixtures = arm_mixtures(config, table, general, draw)
    arms = wanted_arms(config)
    lead = lead_arm(arms, mixtures) or "tell"
    _, mixture = mixtures[lead]
    costs = {arm: arm_costs(task, mixtures[arm][1]) for arm in trained_arms(arms) if arm in mixtures}
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
    answering = answer_seconds(task, main)
    training = sum(c["seconds"] for c in costs.values())
    writing = writing_seconds(general, main)
    dropped = [{"origin": d.origin, "reason": d.reason} for d in table.dropped]
    return {
        "model": {
            "name": files.name,
            "origin": files.origin,
            "path": str(files.path),
            "parameters": files.architecture.parameters,
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
            "seconds": writing + training + answering * len(arms),
            "writing_seconds": writing,
            "training_seconds": training,
            "answering_seconds": answering * len(arms),
            "basis": main["basis"],
            "memory_gb": round(memory.total / 1e9, 2),
        },
        "data": task.findings["data"],
        "split": task.findings["split"],
        "unit": config.tokens.unit,
        "dropped_rows": dropped + (general.dropped if general else []),
        "notices": [*task.notices, *counts["notices"]],
    }


def fit_minutes(task: Task, table: RowTable, general: General, draw: Draw, minutes: float, spent: float) -> Draw:
    """Shorten the draw until the whole run is predicted to end in time; it stays a prefix of the full draw.

    Args:
        minutes: ``--max-minutes``.
        spent: seconds already gone.
    """
    low, high = 0, len(draw)
    if _fits(task, table, general, draw, high, minutes * 60 - spent):
        return draw
    while high - low > max(1, len(draw) // 100):
        middle = (low + high) // 2
        if _fits(task, table, general, draw, middle, minutes * 60 - spent):
            low = middle
        else:
            high = middle
    epochs = draw.epochs * low / max(1, len(draw))
    notice = f"--max-minutes {minutes:g}: {low:,} of {len(draw):,} general rows fit the time predicted"
    if epochs > 1:
        notice += f"; the source is passed {epochs:.2f} times"
    if not low:
        notice += "; even without general data the run is predicted to take longer"
    return Draw(draw.indices[:low], epochs, [notice])  # what was said of the whole draw holds no longer


def _fits(task: Task, table: RowTable, general: General, draw: Draw, rows: int, seconds: float) -> bool:
    part = Draw(draw.indices[:rows], 0.0, [])
    return describe_plan(task, table, general, part)["predicted"]["seconds"] <= seconds
