"""plan.json: rows, tokens, steps, FLOPs, time and memory of a run, before any weight is loaded. No torch."""

from __future__ import annotations

import numpy as np

from tell.data.example import Message
from tell.data.general import general_source
from tell.mix.amount import check_size
from tell.mix.mixture import GENERAL
from tell.mix.prefixes import copied_tokens
from tell.models.base import FULL
from tell.models.flops import lora_parameters
from tell.models.predict import Load, predict_memory
from tell.names import ARMS
from tell.pass_memory import MOST_TOKENS
from tell.rows.row_table import RowTable
from tell.run.answers import answer_limit
from tell.run.arms import trained_arms
from tell.run.constrained import own_alone
from tell.run.costs import (
    OTHER_SECONDS,
    Pace,
    answer_seconds,
    arm_costs,
    likely_place,
    measuring_seconds,
    pseudo_seconds,
    ranking_seconds,
    readout_seconds,
    shares_prefix,
    writing_seconds,
)
from tell.run.general_rows import General, load_general, source_of
from tell.run.prepare import Prepared
from tell.run.self_written import enough_of, self_file
from tell.run.session import pick_engine
from tell.run.task import Task
from tell.run.written_blocks import cached_blocks


def unwritten_general(task: Task, table: RowTable) -> General | None:
    """Rows that the model wrote for an earlier run, or an estimate of them; None where the model writes none."""
    source = source_of(task)
    if not source.written:
        return None
    config, tokens = task.config, int(table.unit.sum())
    enough = enough_of(config, task.unit, tokens)
    path = cached_blocks(self_file(config, task.files.fingerprint, task.chat.fingerprint, likely_engine(task)), enough)
    if path is None:
        task.notices.add("the model has yet to write the general data; its lengths are estimated")
        return estimated_general(task, tokens)
    return load_general(task, general_source(str(path), config.general.columns), overlap=config.task.drop_overlap)


def likely_engine(task: Task) -> str:
    """The engine that a run would decode with, as far as that is known without torch."""
    config = task.config
    if config.model.base != FULL or own_alone(config, task):
        return "own"
    choice = config.generate.engine
    return pick_engine(choice, likely_place(config).device) if choice == "auto" else choice


def estimated_general(task: Task, task_tokens: int) -> General:
    """Rows of the lengths that self-written data has on average, as a table without tokens."""
    config = task.config
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
    facts = {"path": "self", "estimated": True, "rows": n}
    return General(table, np.arange(n), np.zeros(0, np.int64), facts, [], estimated=True)


def describe_plan(prepared: Prepared) -> dict:
    """plan.json of a prepared run; mixture and totals are those of the leading arm, TELL's where no arm is trained."""
    task = prepared.task
    config, files = task.config, task.files
    lead = prepared.lead or "tell"
    mixture, draw = prepared.mixtures[lead][1], prepared.ingredients_of(lead).draw
    costs = {arm: arm_costs(prepared.task_of(arm), prepared.mixtures[arm][1]) for arm in trained_arms(prepared.arms)}
    main = costs.get(lead) or arm_costs(task, mixture)
    counts = mixture.counts()
    memory, tight = _memory(prepared, main)
    return {
        "model": {
            "name": files.name,
            "origin": files.origin,
            "path": str(files.path),
            "parameters": files.architecture.parameters,
            "thinking": task.chat.thinking,
            **({} if config.model.base == FULL else {"base": config.model.base}),
        },
        "task": _task_counts(prepared),
        "closed": [{"field": field.name, "values": len(field.values)} for field in task.closed],
        "general": prepared.general_facts,
        "draw": None if draw is None else {"rows": len(draw), "notices": draw.notices},
        "mixture": counts,
        "train": _training(prepared, lead, main),
        "arms": costs,
        **({"pseudo": found} if (found := prepared.pseudo_facts) else {}),
        "predicted": _predicted(prepared, main, costs, memory),
        "data": task.facts.data,
        "split": task.split_facts,
        "unit": config.tokens.unit,
        "dropped_rows": prepared.dropped_rows,
        "notices": [*task.notices.texts, *prepared.mixture_notices, *tight],
    }


def _task_counts(prepared: Prepared) -> dict:
    task, table = prepared.task, prepared.table
    return {
        "data": task.config.task.data,
        "kind": task.kind.name,
        "rows": len(table),
        "validation_rows": len(task.whole_validation),
        "test_rows": len(task.test),
        "tokens": int(table.tokens.sum()),
        "trained_tokens": int(table.trained.sum()),
        "unit_tokens": int(table.unit.sum()),
        "repeat": prepared.mixtures[prepared.lead or "tell"][1].repeat,
    }


def _training(prepared: Prepared, lead: str, main: dict) -> dict:
    """``train`` of plan.json; ``main`` are the costs of the leading arm."""
    task, train = prepared.task, prepared.task.config.train
    mixture = prepared.mixtures[lead][1]
    per_step = mixture.examples_per_step(train.batch_size)
    return {
        "arm": lead,
        "preset": task.config.preset,
        "steps": main["steps"],
        "batch_size": train.batch_size,
        "examples_per_step": {name: round(float(per_step[:, i].mean()), 3) for i, name in enumerate(mixture.sources)},
        "tokens": main["tokens"],
        "trained_tokens": main["trained_tokens"],
        "flops": main["flops"],
        "learning_rate": prepared.task_of(lead).training(mixture).learning_rate,
        "adapter_parameters": lora_parameters(task.files.architecture, train.lora_r, train.lora_targets),
    }


def _predicted(prepared: Prepared, main: dict, costs: dict[str, dict], memory: dict) -> dict:
    """``predicted`` of plan.json: seconds by stage, and memory."""
    task = prepared.task
    pace = Pace.of(task, main)
    writing = writing_seconds(prepared, pace) + ranking_seconds(prepared, pace)
    training = sum(c["seconds"] for c in costs.values())
    answering = sum(answer_seconds(task, arm, pace) for arm in prepared.arms) + readout_seconds(prepared, pace)
    measuring = measuring_seconds(task, list(costs), pace)
    answering += pseudo_seconds(prepared, pace)
    others = OTHER_SECONDS * (len(prepared.arms) + 1)
    limit = 0.0 if prepared.chosen else 60 * (task.config.search.minutes or 0)
    searching = limit * sum(ARMS[arm].searched for arm in prepared.trained)  # at most
    return {
        "seconds": writing + searching + training + answering + measuring + others,
        "writing_seconds": writing,
        "training_seconds": training,
        "answering_seconds": answering,
        "measuring_seconds": measuring,
        **({"searching_seconds": searching} if searching else {}),
        "basis": main["basis"],
        **memory,
    }


def _memory(prepared: Prepared, main: dict) -> tuple[dict, list[str]]:
    """Memory of ``predicted`` in plan.json, and a notice where the run does not fit."""
    task, config = prepared.task, prepared.task.config
    mixture, train = prepared.mixtures[prepared.lead or "tell"][1], config.train
    place, tokens = likely_place(config), mixture.column("tokens")
    steps = np.add.reduceat(tokens, np.arange(0, len(tokens), train.batch_size)) if len(tokens) else [1]
    most = train.micro_tokens or MOST_TOKENS  # tokens of a pass
    answers = answer_limit(config, task.chat, task.train) if task.test else 0
    prompts = max((task.chat.length(e.question) for e in task.test[:50]), default=0)
    load = Load(
        longest=int(tokens.max(initial=1)),
        largest=int(max(steps)),
        trained_share=main["trained_tokens"] / max(1, main["tokens"]),
        rows=min(len(task.test), config.generate.batch_size),
        length=prompts + answers,
        soft=task.general_target == "untuned" and GENERAL in mixture.sources,
        copied=copied_tokens(mixture, train.batch_size, most) if shares_prefix(train) else 0,
    )
    total, free = task.memory or (None, None)
    memory = predict_memory(task.files.architecture, train, load, place=place, free=free, base=config.model.base)
    facts = {
        "memory_gb": round(memory.total / 1e9, 2),
        "device_memory_gb": None if total is None else round(total / 1e9, 2),
        "micro_tokens": memory.fit.micro_tokens,
        "recompute": memory.fit.level,
        "layers": task.files.architecture.layers,
    }
    needed = memory.weights + memory.evaluation + memory.process
    if free is None or (memory.fit.fits and needed <= free):
        return facts, []
    text = f"the run is predicted to need {memory.total / 1e9:.1f} GB; {free / 1e9:.1f} GB are free on {place.device}"
    return facts, [f"{text}: lower train.max_length or generate.batch_size, or choose a smaller model"]
