"""Forgetting: losses and answers on general prompts, before and after tuning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tell.config import Config
from tell.data.builtin import ON_BOARD, load_witness
from tell.data.example import Example
from tell.metric_names import HELD_OUT, PROBE, WITNESS
from tell.names import ARMS, TRAINED
from tell.rows.row_table import RowTable
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, prompt_ids, tokenize
from tell.run.general_rows import General
from tell.run.memo import once
from tell.run.session import Session
from tell.score.intervals import difference, estimate
from tell.score.means import mean_metric
from tell.score.probe import load_probe
from tell.score.scored import Metric, Scorer

SETS = 3  # names of the sets of general rows that loss is measured on
ANSWER_TOKENS = 160
BASE = "base"  # the weights before training


@dataclass
class Forgetting:
    """General rows to measure forgetting on, and the measurements.

    Attributes:
        losses: arm, set, (rows,) mean nll.
        formats: arm, (rows,) 1 where a general prompt was answered in the task's format; empty for free text
            and a user's own scorer, whose format is not known.
        answers: arm, answers to the first general prompts, without the anchor.
    """

    sets: dict[str, RowTable]
    facts: dict[str, dict]
    prompts: list[Example]
    losses: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    formats: dict[str, np.ndarray] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)

    def rows(self, arm: str) -> list[dict]:
        """``predictions/general/<arm>.jsonl``: the loss of each general row, which pairs arms of several runs."""
        return [
            {"set": name, "hash": str(key), "loss": round(float(loss), 6)}
            for name, table in self.sets.items()
            for key, loss in zip(table.hashes, self.losses[arm][name], strict=True)
        ]


def general_sets(config: Config, chat: ChatTokenizer, general: General | None) -> Forgetting | None:
    """Held-out rows of the general source, our own probe and the witness set; None where switched off.

    The probe and the witness set are in no mix. The witness set's answers are by the model that answered the built-in
    rows.
    """
    if not config.eval.forgetting_rows:
        return None
    probe = load_probe()[: config.eval.forgetting_rows]
    sets: dict[str, RowTable] = {}
    facts: dict[str, dict] = {}
    path = "" if general is None else general.facts.get("path", "")
    if general is not None and len(general.held_out):
        sets[HELD_OUT] = _part(general.table, general.held_out)
        facts[HELD_OUT] = {"origin": path, "rows": len(general.held_out), "in_mix_source": True}
    rules = RowRules(config.train.max_length, "drop", "drop", misfit="drop")
    witness = load_witness()[: config.eval.forgetting_rows]
    for name, rows in ((PROBE, probe), (WITNESS, witness)):
        sets[name] = tokenize(rows, chat, source=name, rules=rules)
    facts[PROBE] = {"origin": "written for TELL", "rows": len(sets[PROBE]), "in_mix_source": False}
    facts[WITNESS] = {
        "origin": "prompts written for TELL, answered by SmolLM2-135M",
        "rows": len(sets[WITNESS]),
        "in_mix_source": path == ON_BOARD,
    }
    return Forgetting(sets, facts, probe[: config.eval.forgetting_answers])


def _part(table: RowTable, rows: np.ndarray) -> RowTable:
    """A copy of some rows of a table."""
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


def losses_of(session: Session, arm: str, table: RowTable, advance: Callable[[int], None] | None = None) -> np.ndarray:
    """(rows,) mean nll of each row under an arm's weights; the untuned model's is computed once while it is loaded."""
    if arm != BASE:
        return session.row_losses(table, advance)
    digest = hashlib.sha256()
    for column in (table.ids, table.mask, table.starts):
        digest.update(np.ascontiguousarray(column).tobytes())
    key = ("losses", digest.digest(), session.config.train.forward_tokens)
    return once(session.model, key, lambda: session.row_losses(table, advance))


def measure_arm(state: Forgetting, arm: str, session: Session, scorer: Scorer) -> None:
    """Losses and answers of one arm, whose adapter is applied."""
    from tell.decode.sampler import Decoding

    total = sum(len(table) for table in state.sets.values())
    with session.display.bar(f"{arm}: general loss", total) as advance:
        state.losses[arm] = {}
        for name, table in state.sets.items():
            state.losses[arm][name] = losses_of(session, arm, table, advance)
            session.check()
    if not state.prompts:
        return
    config = session.config
    stops = session.chat.stop_ids
    decoding = Decoding.of(config.generate, max_new_tokens=ANSWER_TOKENS, stop_ids=stops, seed=config.seed)
    prompts = [prompt_ids(session.chat, example) for example in state.prompts]

    def ask() -> list[str]:
        answers = session.answer(prompts, decoding, f"{arm}: general answers")
        return [session.chat.answer(answer.ids) for answer in answers]

    key = ("answers", tuple(map(tuple, prompts)), decoding)
    texts = once(session.model, key, ask) if arm == BASE else ask()
    state.answers[arm] = texts
    formats = [scorer.is_task_format(text) for text in texts]
    if None not in formats:
        state.formats[arm] = np.array(formats, dtype=np.float64)


def numbers(state: Forgetting, config: Config) -> dict:
    """``forgetting`` of metrics.json."""
    metrics: dict[str, dict[str, dict[str, Metric]]] = {}
    for arm, sets in state.losses.items():
        metrics[arm] = {name: {"loss": mean_metric(values)} for name, values in sets.items()}
        if arm in state.formats:
            metrics[arm][PROBE]["task_format"] = mean_metric(state.formats[arm], binary=True)
    pairs = [(arm, BASE) for arm in metrics if arm != BASE and BASE in metrics]
    pairs += [("tell", arm) for arm in metrics if "tell" in metrics and arm not in ("tell", BASE)]
    shown = [arm for arm in ARMS if arm in (BASE, *TRAINED) and arm in state.answers]
    return {
        "sets": state.facts,
        "arms": {
            arm: {name: _estimates(found, config) for name, found in sets.items()} for arm, sets in metrics.items()
        },
        "differences": {
            f"{a} - {b}": {name: _gaps(found, metrics[b].get(name, {}), config) for name, found in metrics[a].items()}
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


def _estimates(metrics: Mapping[str, Metric], config: Config) -> dict:
    seed, samples = config.seed, config.eval.bootstrap
    return {key: estimate(metric, seed=seed, samples=samples) for key, metric in metrics.items()}


def _gaps(a: Mapping[str, Metric], b: Mapping[str, Metric], config: Config) -> dict:
    seed, samples = config.seed, config.eval.bootstrap
    return {key: difference(a[key], b[key], seed=seed, samples=samples) for key in a if key in b}
