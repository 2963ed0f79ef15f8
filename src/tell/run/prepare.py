"""From a configuration to a mixture, without torch: data, split, kind, anchor, rows, amounts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.anchor.derive import derived_anchor
from tell.config import Config, TrainConfig
from tell.data.example import Example
from tell.data.kind import Kind, detect_kind, load_schema, missing_classes, widen
from tell.data.overlap import Overlap, find_overlap
from tell.data.sources import Loaded, load
from tell.data.split import Splits, split, split_given_test
from tell.data.subset import take_rows, take_tokens
from tell.errors import TellError
from tell.files import read_text
from tell.models.find import ModelFiles, find_model, find_tokenizer
from tell.presets import learning_rate_for
from tell.progress import Display, Silent
from tell.rows.row_cache import cache_key, cached_table
from tell.rows.row_table import RowTable
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, tokenize
from tell.run.misfits import fitted
from tell.run.shots import check_shots, pick_shots
from tell.shown import left_out

PAIRS_KEPT = 20
MIXED = frozenset({"sft-matched", "general", "tell", "tell-anchor"})  # what these train on needs the mixture
FEW_ROWS = 30  # below this no row is set aside for validation
CACHED_ROWS = 500  # fewer task rows are tokenised as quickly as they are read back
VALIDATION_ROWS = 64  # enough to score anchors and watch the loss; more would only cost time


@dataclass
class Task:
    """The task's own side of a run: model files, tokenizer, examples, kind.

    Attributes:
        config: the run's, its ``train.max_length`` lowered to what the model's positions allow.
        train: rows to train on, after split, overlap removal and budget (the budget needs the anchor: see
            `limit_task`).
        shots: the examples that stand in every test prompt (``task.shots``).
        findings: ``findings.json`` as far as it is known.
        display: hears notices about rows.
    """

    config: Config
    files: ModelFiles
    chat: ChatTokenizer
    unit: ChatTokenizer
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    kind: Kind
    findings: dict
    notices: list[str] = field(default_factory=list)
    shots: list[Example] = field(default_factory=list)
    display: Display = field(default_factory=Silent)

    @property
    def training(self) -> TrainConfig:
        """The training settings with the learning rate resolved for this model."""
        rate = self.config.train.learning_rate or learning_rate_for(self.files.architecture.parameters)
        return self.config.train.model_copy(update={"learning_rate": rate})

    @property
    def rules(self) -> RowRules:
        train = self.config.train
        vocab = self.files.architecture.vocab
        return RowRules(train.max_length, train.too_long, train.nothing_to_train, train.loss_on, vocab=vocab)

    def notice(self, text: str, display: Display) -> None:
        if text not in self.notices:
            self.notices.append(text)
            display.note(text)


def load_task(config: Config, display: Display | None = None) -> Task:
    """Find the model's files, read and split the task's data, detect its kind.

    Raises:
        TellError: whatever is wrong with model or data.
    """
    display = display or Silent()
    if not config.task.data:
        raise TellError(
            "no task data given",
            where="task.data",
            remedy="Give a file, e.g. `tell tune tickets.jsonl`; `tell demo` runs on a task of ours.",
        )
    schema = load_schema(config.task.json_schema) if config.task.json_schema else None
    data = load(config.task.data, name="task", columns=config.task.columns)
    given = load(config.task.test, name="task", columns=config.task.columns) if config.task.test else None
    anchor_of(config)  # a missing @FILE is said before a model is looked for
    with display.bar("find the model", None):
        files = find_model(
            config.model.name,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            notify=display.note,
        )
    positions = files.architecture.max_positions
    if positions and positions < config.train.max_length:
        config = config.model_copy(update={"train": config.train.model_copy(update={"max_length": positions})})
    data, given, chat, notices = fitted(data, given, files, config.train, own_code=config.model.trust_remote_code)
    unit = chat
    if config.tokens.unit != "model":
        unit = ChatTokenizer(find_tokenizer(config.tokens.unit, notify=display.note))
    parts = _split(config, data, given)
    known = [*parts.train, *parts.validation]
    kind, said = widen(detect_kind(known, override=config.task.kind, schema=schema), known, parts.test)
    task = Task(config, files, chat, unit, parts.train, parts.validation, parts.test, kind, {}, display=display)
    for notice in (*data.notices, *(given.notices if given else ()), *notices, *([said] if said else ())):
        task.notice(notice, display)
    dropped_rows = [*data.dropped, *(given.dropped if given else ())]
    for text in left_out(dropped_rows):
        display.note(text)  # no notice: findings.json and plan.json list the rows themselves
    if not chat.has_own_template:
        task.notice(f"{files.name} has no chat template; the plain default is used (docs/howto/models.md)", display)
    task.validation = task.validation[:VALIDATION_ROWS]
    if config.task.test_rows and config.task.test_rows < len(task.test):
        task.test = [task.test[i] for i in sorted(take_rows(len(task.test), config.task.test_rows, config.seed))]
    for text in missing_classes(kind, known, task.test):
        task.notice(text, display)
    overlap = find_overlap(task.train, task.test)
    dropped = 0
    if config.task.drop_overlap and overlap.indices:
        kept = [e for i, e in enumerate(task.train) if i not in overlap.indices]
        if not kept:
            raise TellError(
                f"all {len(task.train)} training rows nearly equal a test row",
                where=config.task.data,
                remedy="Leave --drop-overlap out, or give other test rows.",
            )
        dropped, task.train = len(task.train) - len(kept), kept
    task.shots = pick_shots(task.config, task.train, task.chat)
    display.note(f"task: {config.task.data}, {data.layout}, {len(data.examples)} rows; {kind.why}")
    task.findings = {
        "data": describe(data),
        "test": describe(given) if given else None,
        "general": None,
        "split": {
            "train": len(task.train),
            "validation": len(task.validation),
            "test": len(task.test),
            "exact_duplicates_removed": parts.exact_duplicates if given else 0,
            "exact_duplicates_kept_together": 0 if given else parts.exact_duplicates,
        },
        "kind": {
            "name": kind.name,
            "why": kind.why,
            "schema_inferred": kind.schema_inferred,
            "labels": list(kind.labels) if kind.labels else None,
        },
        "overlap": {
            "train_test": overlap_facts(overlap, parts.train, task.test),
            "general_test": None,
            "dropped": dropped,
        },
        "dropped_rows": [{"origin": origin, "reason": reason} for origin, reason in dropped_rows],
    }
    return task


def _split(config: Config, data: Loaded, given: Loaded | None) -> Splits:
    # Below that every row is needed for training; anchors are then scored on training rows.
    share = config.task.validation_fraction if len(data.examples) >= FEW_ROWS else 0.0
    fractions = {"seed": config.seed, "validation_fraction": share}
    if given is not None:
        return split_given_test(data.examples, given.examples, **fractions)
    return split(data.examples, test_fraction=config.task.test_fraction, **fractions)


def describe(data: Loaded) -> dict:
    return {"path": data.path, "layout": data.layout, "columns": data.columns, "rows": len(data.examples)}


def overlap_facts(overlap: Overlap, rows: Sequence[Example], test: Sequence[Example]) -> dict:
    """Counts and the first pairs, with their texts, for findings.json."""
    pairs = [
        {
            "a": rows[p.a_index].origin,
            "b": test[p.test_index].origin,
            "similarity": round(p.similarity, 3),
            "a_text": rows[p.a_index].question[:300],
            "b_text": test[p.test_index].question[:300],
        }
        for p in overlap.pairs[:PAIRS_KEPT]
    ]
    return {"exact": overlap.exact, "near": overlap.near, "pairs": pairs}


def anchor_of(config: Config) -> Anchor | None:
    """The anchor as configured; None where the model is to write it."""
    text = config.anchor.text
    if text == "auto":
        return None
    if text == "none":
        return NO_ANCHOR
    return Anchor(anchor_text(text, "--anchor"), config.anchor.place, "hand")


def anchor_text(text: str, flag: str) -> str:
    """An anchor as typed behind ``flag``: the text itself, or ``@FILE``.

    Raises:
        TellError: the file cannot be read, or there is no text.
    """
    if text.startswith("@"):
        remedy = "Give an existing UTF-8 text file behind the @."
        try:
            text = read_text(Path(text[1:]), remedy=remedy)
        except (FileNotFoundError, TellError) as error:
            why = error.what if isinstance(error, TellError) else f"cannot be read ({error.strerror})"
            raise TellError(why, where=f"{flag} {text}", remedy=remedy) from error
    if not text.strip():
        raise TellError("the anchor is empty", where=flag, remedy="Write a text, or `none`.")
    return text.strip()


def place_anchor(task: Task, anchor: Anchor, display: Display) -> Anchor:
    """The anchor where the model's template can carry it."""
    if anchor and anchor.place == "system" and not task.chat.supports_system:
        task.notice("the chat template has no system role; the anchor goes to the head of the user turn", display)
        return Anchor(anchor.text, "user", anchor.origin)
    return anchor


def stand_in_anchor(task: Task) -> Anchor:
    """What stands for an anchor the model has yet to write, for counting."""
    return derived_anchor(task.kind, task.config.anchor.place) or Anchor(
        "Answer the following in the way of the task.", task.config.anchor.place, "derived"
    )


def limited_rows(task: Task, anchor: Anchor) -> list[Example]:
    """The training rows within the task's budget of rows or tokens; subsets are nested by seed."""
    config = task.config.task
    if config.rows is not None:
        chosen = take_rows(len(task.train), config.rows, task.config.seed)
    elif config.tokens is not None:
        contents = ["\n".join(m.content for m in anchor.apply(e.messages)) for e in task.train]
        unit = np.array([len(e.ids) for e in task.unit.backend.encode_batch(contents, add_special_tokens=False)])
        chosen = take_tokens(unit, config.tokens, task.config.seed)
    else:
        return task.train
    return [task.train[i] for i in sorted(chosen)]


def limit_task(task: Task, anchor: Anchor) -> None:
    """Keep the rows of the task's budget.

    Raises:
        TellError: fewer rows that can be shown than ``task.shots``.
    """
    task.train = limited_rows(task, anchor)
    check_shots(task.config, task.train, task.shots)
    task.findings["split"]["train"] = len(task.train)


def task_table(task: Task, anchor: Anchor, examples: Sequence[Example], name: str = "task") -> RowTable:
    """Tokenised task rows with the anchor; many are cached, since each plan and run wants them again.

    Raises:
        TellError: no row is left to train on.
    """

    def make() -> RowTable:
        return tokenize(examples, task.chat, source=name, anchor=anchor, rules=task.rules, unit=task.unit)

    if len(examples) < CACHED_ROWS:
        table = make()
    else:
        key = cache_key(
            rows=[[e.hash, e.origin] for e in examples],
            source=name,
            anchor=anchor.hash if anchor else None,
            tokenizer=task.chat.fingerprint,
            unit=task.unit.fingerprint,
            rules=asdict(task.rules),
        )
        table, _ = cached_table(key, make)
    for notice in table.notices:
        task.notice(notice, task.display)
    if examples and not len(table):
        first = table.dropped[0]
        raise TellError(
            f"none of the {len(examples)} task rows can be trained on; the first: {first.reason}",
            where=first.origin,
            remedy="Raise train.max_length, or shorten the rows.",
        )
    return table


def split_file(task: Task) -> str:
    """split.json: the content hashes of each part, and of the examples in test prompts where there are any."""
    parts = {"train": task.train, "validation": task.validation, "test": task.test}
    if task.shots:
        parts["shots"] = task.shots
    return json.dumps({name: [e.hash for e in rows] for name, rows in parts.items()}, indent=1) + "\n"
