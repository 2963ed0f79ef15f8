"""What tuning cost elsewhere: losses and answers on general prompts, before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tell.config import Config
from tell.data.builtin import ON_BOARD, load_witness
from tell.data.example import Example
from tell.names import HELD_OUT, PROBE, WITNESS
from tell.progress import Display
from tell.rows.row_table import RowTable
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, prompt_ids, tokenize
from tell.run.general_rows import General
from tell.run.memo import once
from tell.score.intervals import difference, estimate
from tell.score.means import mean_metric
from tell.score.probe import load_probe
from tell.score.scored import Metric, Scorer

SETS = 3  # of general rows that loss is measured on
ANSWER_TOKENS = 160


@dataclass
class Forgetting:
    """General rows to measure on, and what was measured.

    Attributes:
        losses: arm, set, (rows,) mean nll.
        formats: arm, (rows,) 1 where a general prompt was answered in the task's format; empty for free text
            and a user's own scorer, whose format is not known.
        answers: arm, answers to the first general prompts, no anchor on them.
    """

    sets: dict[str, RowTable]
    facts: dict[str, dict]
    prompts: list[Example]
    losses: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    formats: dict[str, np.ndarray] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)


def general_sets(config: Config, chat: ChatTokenizer, general: General | None) -> Forgetting | None:
    """Held-out rows of the general source, our own probe and the witness set; None where switched off.

    The probe and the witness set are in no mix. Whoever wrote the witness set's answers wrote the rows on board too.
    """
    if not config.eval.forgetting_rows:
        return None
    probe = load_probe()[: config.eval.forgetting_rows]
    sets: dict[str, RowTable] = {}
    facts: dict[str, dict] = {}
    if general is not None and len(general.held_out):
        sets[HELD_OUT] = _part(general.table, general.held_out)
        facts[HELD_OUT] = {
            "origin": general.facts.get("path", ""),
            "rows": len(general.held_out),
            "in_mix_source": True,
        }
    rules = RowRules(config.train.max_length, "drop", "drop", misfit="drop")
    sets[PROBE] = tokenize(probe, chat, source=PROBE, rules=rules)
    facts[PROBE] = {"origin": "written for TELL", "rows": len(sets[PROBE]), "in_mix_source": False}
    witness = load_witness()[: config.eval.forgetting_rows]
    sets[WITNESS] = tokenize(witness, chat, source=WITNESS, rules=rules)
    on_board = general is not None and general.facts.get("path") == ON_BOARD
    facts[WITNESS] = {
        "origin": "prompts written for TELL, answered by SmolLM2-135M",
        "rows": len(sets[WITNESS]),
        "in_mix_source": on_board,
    }
    return Forgetting(sets, facts, probe[: config.eval.forgetting_answers])


def _part(table: RowTable, rows: np.ndarray) -> RowTable:
    """A table of some rows, copied out of the whole one."""
    pieces = [table.row(int(i)) for i in rows]
    tokens = np.asarray(table.tokens)[rows]
    return RowTable(
        source=table.source,
        hashes=np.asarray(table.hashes)[rows],
        origins=np.asarray(table.origins)[rows],
        tokens=tokens,
        trained=np.asarray(table.trained)[rows],
        unit=np.asarray(table.unit)[rows],
        ids=np.concatenate([ids for ids, _ in pieces]),
        mask=np.concatenate([mask for _, mask in pieces]),
        starts=np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)]),
    )


def losses_of(
    model: Any,
    arm: str,
    table: RowTable,
    *,
    micro_tokens: int,
    device: Any,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """(rows,) mean nll of each row under an arm's weights, as `tell.train.step.row_losses` has it."""
    from tell.train.step import row_losses

    compute = partial(row_losses, model, table, micro_tokens=micro_tokens, progress=progress)
    if arm != "base":
        return compute()
    digest = hashlib.sha256()
    for column in (table.ids, table.mask, table.starts):
        digest.update(np.ascontiguousarray(column))
    return once(model, ("losses", digest.digest(), micro_tokens), compute)


def measure(
    state: Forgetting,
    arm: str,
    model: Any,
    engine: Any,
    scorer: Scorer,
    config: Config,
    chat: ChatTokenizer,
    display: Display,
    check: Callable[[], None],
) -> None:
    """Losses and answers of one arm; ``model`` has the arm's adapter merged."""
    from tell.decode.sampler import Decoding

    total = sum(len(table) for table in state.sets.values())
    with display.bar(f"{arm}: general loss", total) as advance:
        state.losses[arm] = {}
        for name, table in state.sets.items():
            state.losses[arm][name] = losses_of(
                model, arm, table, micro_tokens=config.train.micro_tokens, device=engine.device, progress=advance
            )
            check()
    if not state.prompts:
        return
    decoding = Decoding.of(config.generate, max_new_tokens=ANSWER_TOKENS, stop_ids=chat.stop_ids, seed=config.seed)
    with display.bar(f"{arm}: general answers", len(state.prompts), "answers") as advance:

        def progress(_: int, further: float) -> None:
            advance(further)
            check()

        prompts = [prompt_ids(chat, example) for example in state.prompts]
        key = ("answers", tuple(map(tuple, prompts)), decoding)
        ask = partial(engine.generate, prompts, decoding, progress=progress)
        found = once(model, key, ask) if arm == "base" else ask()
    texts = [chat.answer(a.ids) for a in found]
    state.answers[arm] = texts
    formats = [scorer.is_task_format(text) for text in texts]
    if None not in formats:
        state.formats[arm] = np.array(formats, dtype=np.float64)


def loss_rows(state: Forgetting, arm: str) -> list[dict]:
    """``predictions/general/<arm>.jsonl``: the loss of each general row, by which arms of several runs are paired."""
    return [
        {"set": name, "hash": str(key), "loss": round(float(loss), 6)}
        for name, table in state.sets.items()
        for key, loss in zip(table.hashes, state.losses[arm][name], strict=True)
    ]


def numbers(state: Forgetting, config: Config) -> dict:
    """``forgetting`` of metrics.json."""
    rule = {"seed": config.seed, "samples": config.eval.bootstrap}
    metrics: dict[str, dict[str, dict[str, Metric]]] = {}
    for arm, sets in state.losses.items():
        metrics[arm] = {name: {"loss": mean_metric(values)} for name, values in sets.items()}
        if arm in state.formats:
            metrics[arm][PROBE]["task_format"] = mean_metric(state.formats[arm], binary=True)
    arms = list(metrics)
    pairs = [(arm, "base") for arm in arms if arm != "base" and "base" in arms]
    pairs += [("tell", arm) for arm in arms if "tell" in arms and arm not in ("tell", "base")]
    shown = [arm for arm in ("base", "sft", "sft-matched", "general", "tell") if arm in state.answers]
    return {
        "sets": state.facts,
        "arms": _map(metrics, lambda metric: estimate(metric, **rule)),
        "differences": {
            f"{a} - {b}": {
                name: {
                    key: difference(metric, metrics[b][name][key], **rule)
                    for key, metric in found.items()
                    if key in metrics[b].get(name, {})
                }
                for name, found in metrics[a].items()
            }
            for a, b in pairs
        },
        "answers": [
            {
                "prompt": example.question,
                "reference": example.answer,
                **{arm: state.answers[arm][i] for arm in shown},
            }
            for i, example in enumerate(state.prompts)
        ],
    }


def _map(tree: Mapping[str, Any], change: Callable[[Metric], dict]) -> dict:
    return {k: change(v) if isinstance(v, Metric) else _map(v, change) for k, v in tree.items()}
