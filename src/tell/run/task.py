"""The task of a run: model files, chat template, examples and their kind. No torch, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.anchor.derive import derived_anchor
from tell.config import Config
from tell.config_sections import TrainConfig
from tell.data.closed import MOST_VALUES, ClosedField, closed_fields, opening
from tell.data.example import Example
from tell.data.general import Target, general_target
from tell.data.kind import Kind
from tell.data.overlap import find_overlap
from tell.data.sources import Loaded
from tell.data.subset import take_rows, take_tokens
from tell.data.unlabelled import Prompts, load_prompts_of
from tell.errors import TellError
from tell.files import read_text
from tell.mix.mixture import GENERAL, Mixture
from tell.models.base import check_planned_model
from tell.models.find import ModelFiles, find_model, find_tokenizer
from tell.models.machine import device_memory, likely_place
from tell.models.wheel import HUB_NAME
from tell.presets import learning_rate_for
from tell.progress import Display, Silent
from tell.rows.row_cache import cache_key, cached_table
from tell.rows.row_table import RowTable
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, tokenize
from tell.run.computed import put
from tell.run.misfits import cleaned, fitted
from tell.run.shots import check_shots, pick_shots
from tell.run.task_rows import DataFacts, Read, read_task, split_task
from tell.shown import brief, left_out

CACHED_ROWS = 500  # tokenising fewer rows is as fast as reading them from the cache
VALIDATION_ROWS = 64  # enough to score anchors and monitor the loss; more would only cost time


@dataclass
class Notices:
    """Everything a run dropped, guessed or shrank, each text once, shown as it is added; and how it was computed.

    Attributes:
        heard: by arm, the notes of training on how it was computed; kept with the arm for a resumed run.
    """

    display: Display = field(default_factory=Silent)
    texts: list[str] = field(default_factory=list)
    computed: dict[str, str] = field(default_factory=dict)
    heard: dict[str, list[str]] = field(default_factory=dict)

    def hear(self, arm: str, text: str) -> None:
        """Add a note of training: to how the run was computed, else to the notices."""
        if put(self.computed, arm, text):
            self.heard.setdefault(arm, []).append(text)
            self.display.note(text)
        else:
            self.add(text)

    def recall(self, arm: str, texts: Iterable[str]) -> None:
        """Add notes on how an arm was computed; only those are shown that differ from other arms'."""
        for text in texts:
            known = dict(self.computed)
            put(self.computed, arm, text)
            if self.computed != known:
                self.display.note(text)

    def add(self, text: str) -> None:
        if text not in self.texts:
            self.texts.append(text)
            self.display.note(text)


@dataclass(frozen=True)
class Task:
    """The task's side of a run.

    Attributes:
        config: the run's, with ``train.max_length`` lowered to the model's positions.
        chat: template and tokenizer of the model.
        unit: tokenizer that budgets are counted in.
        train: rows to train on, after split and overlap removal; `limit_task` applies the budget.
        validation: the rows that losses are measured on, at most `VALIDATION_ROWS`.
        more_validation: those beyond them, in the validation part all the same.
        shots: the examples in every test prompt (``task.shots``).
        unlabelled: prompts without answers (``task.unlabelled``); None where no file is given.
        memory: bytes of the device, and those free before anything was loaded; None where they are unknown.
    """

    config: Config
    files: ModelFiles
    chat: ChatTokenizer
    unit: ChatTokenizer
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    kind: Kind
    shots: list[Example]
    facts: DataFacts
    notices: Notices
    unlabelled: Prompts | None = None
    more_validation: list[Example] = field(default_factory=list)
    memory: tuple[float, float] | None = None

    @property
    def whole_validation(self) -> list[Example]:
        """The validation part, measured or not."""
        return [*self.validation, *self.more_validation]

    @property
    def display(self) -> Display:
        return self.notices.display

    def training(self, mixture: Mixture) -> TrainConfig:
        """The training settings, with learning rate and target of general rows resolved for this model and mixture."""
        size, mixed = self.files.architecture.parameters, GENERAL in mixture.sources
        rate = self.config.train.learning_rate or learning_rate_for(size, mixed=mixed)
        return self.config.train.model_copy(update={"learning_rate": rate, "general_target": self.general_target})

    @property
    def general_target(self) -> Target:
        """What general rows are trained on."""
        return general_target(self.config, wrote_builtin=self.files.name == HUB_NAME)

    @property
    def rules(self) -> RowRules:
        train = self.config.train
        vocab = self.files.architecture.vocab
        return RowRules(train.max_length, train.too_long, train.nothing_to_train, train.loss_on, vocab=vocab)

    @cached_property
    def closed(self) -> list[ClosedField]:
        """The closed fields that are decided; empty where ``generate.closed`` is off."""
        if self.config.generate.closed == "off":
            return []
        found = closed_fields(self.kind, self.train)
        if large := [field for field in found if field.classes > MOST_VALUES]:
            names = ", ".join(f"{brief(field.name)} ({field.classes:,} values)" for field in large)
            self.notices.add(f"not decided but written freely, having more than {MOST_VALUES:,} values: {names}")
        return [field for field in found if field not in large]

    @cached_property
    def opening(self) -> str:
        """What every answer is led to begin with; empty where nothing is certain, or ``generate.closed`` is off."""
        if self.config.generate.closed == "off":
            return ""
        return opening(self.kind, [example.answer for example in self.train])

    @property
    def decides(self) -> bool:
        """Whether anything of an answer is decided rather than sampled."""
        return bool(self.closed or self.opening)

    @property
    def split_facts(self) -> dict[str, int]:
        """``split`` of findings.json and plan.json."""
        sizes = {"train": len(self.train), "validation": len(self.whole_validation), "test": len(self.test)}
        return sizes | self.facts.duplicates


def load_task(config: Config, display: Display | None = None) -> Task:
    """The task of a configuration: model files found, data read and split, kind detected.

    Raises:
        TellError: anything wrong with the model or the data.
    """
    notices = Notices(display or Silent())
    memory = device_memory(likely_place(config.model.device, config.model.dtype).device)
    read = read_task(config)
    anchor_of(config)  # report a missing @FILE before searching for the model
    check_planned_model(config.model, installed=False)
    with notices.display.bar("find the model", None):
        files = find_model(
            config.model.name,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            notify=notices.display.note,
        )
    return replace(open_task(config, read, files, notices), memory=memory)


def open_task(config: Config, read: Read, files: ModelFiles, notices: Notices) -> Task:
    """The task of data that was read, for a model that was found.

    Raises:
        TellError: anything wrong with the model's files or the data.
    """
    display, (data, given, schema, held) = notices.display, read
    positions = files.architecture.max_positions
    if positions and positions < config.train.max_length:
        config = config.model_copy(update={"train": config.train.model_copy(update={"max_length": positions})})
    data, given, chat, fit_notices = fitted(data, given, files, config.train, own_code=config.model.trust_remote_code)
    unit = chat
    if config.tokens.unit != "model":
        unit = ChatTokenizer(find_tokenizer(config.tokens.unit, notify=display.note))
    read = Read(data, given, schema, None if held is None else cleaned(held, chat)[0])
    rows = split_task(config, read)
    said = (text for loaded in read.files for text in loaded.notices)
    for text in filter(None, (*said, *fit_notices, rows.lost, rows.widened)):
        notices.add(text)
    for text in left_out((row["origin"], row["reason"]) for row in rows.facts.dropped_rows):
        display.note(text)  # not a notice: findings.json and plan.json list the rows themselves
    if not chat.has_own_template:
        notices.add(f"{files.name} has no chat template; the plain default is used (docs/howto/models.md)")
    for text in rows.missing:
        notices.add(text)
    display.note(f"task: {config.task.data}, {data.layout}, {len(data.examples)} rows; {rows.kind.why}")
    shots = pick_shots(config, rows.train, chat)
    validation, more = rows.validation[:VALIDATION_ROWS], rows.validation[VALIDATION_ROWS:]
    if more:
        notices.add(f"validation losses are of the first {VALIDATION_ROWS} of {len(rows.validation):,} validation rows")
    unlabelled = _unlabelled(config, data, rows.held_out, notices)
    parts = rows.train, validation, rows.test, rows.kind, shots, rows.facts
    return Task(config, files, chat, unit, *parts, notices, unlabelled, more)


def _unlabelled(config: Config, data: Loaded, test: list[Example], notices: Notices) -> Prompts | None:
    """The prompts of ``task.unlabelled``, read by the columns of the task's data.

    Copies of test rows are left out here, be they scored or not (``task.test_rows``): others may be scored later.
    """
    if config.task.unlabelled is None:
        return None
    found = load_prompts_of(config.task.unlabelled, data.columns, data.form)
    for text in (*found.notices, *left_out(found.dropped)):
        notices.add(text)
    tested = find_overlap(found.examples, test).indices
    kept = [example for i, example in enumerate(found.examples) if i not in tested]
    return replace(found, examples=kept, tested=len(tested))


def anchor_of(config: Config) -> Anchor | None:
    """The anchor as configured; None where the model has to write it."""
    text = config.anchor.text
    if text == "auto":
        return None
    if text == "none":
        return NO_ANCHOR
    return Anchor(anchor_text(text, "--anchor"), config.anchor.place, "hand")


def anchor_text(text: str, flag: str) -> str:
    """An anchor as given to ``flag``: the text itself, or ``@FILE``.

    Raises:
        TellError: the file cannot be read, or the text is empty.
    """
    if text.startswith("@"):
        remedy = "Put the path of a UTF-8 text file after the @."
        try:
            text = read_text(Path(text[1:]), remedy=remedy)
        except (FileNotFoundError, TellError) as error:
            why = error.what if isinstance(error, TellError) else f"cannot be read ({error.strerror})"
            raise TellError(why, where=f"{flag} {text}", remedy=remedy) from error
    if not text.strip():
        raise TellError("the anchor is empty", where=flag, remedy="Write a text, or `none`.")
    return text.strip()


def place_anchor(task: Task, anchor: Anchor) -> Anchor:
    """The anchor where the model's template can carry it."""
    if anchor and anchor.place == "system" and not task.chat.supports_system:
        task.notices.add("the chat template has no system role; the anchor goes to the head of the user turn")
        return Anchor(anchor.text, "user", anchor.origin)
    return anchor


def stand_in_anchor(task: Task) -> Anchor:
    """A placeholder for an anchor the model has yet to write, for counting tokens."""
    return derived_anchor(task.kind, task.config.anchor.place) or Anchor(
        "Answer the following in the way of the task.", task.config.anchor.place, "derived"
    )


def placed_anchor(task: Task) -> Anchor:
    """The configured anchor, or its placeholder, where the template can carry it."""
    anchor = anchor_of(task.config)
    return place_anchor(task, stand_in_anchor(task) if anchor is None else anchor)


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


def limit_task(task: Task, anchor: Anchor) -> Task:
    """The task with the rows of its budget.

    Raises:
        TellError: fewer rows that can be shown than ``task.shots``.
    """
    train = limited_rows(task, anchor)
    check_shots(task.config, train, task.shots)
    return replace(task, train=train)


def task_table(task: Task, anchor: Anchor) -> RowTable:
    """The tokenised training rows with the anchor; large sets are cached, since each plan and run needs them again.

    Raises:
        TellError: no row is left to train on.
    """
    examples = task.train
    table = anchored_table(task, anchor, examples, "task", task.rules)
    for notice in table.notices:
        task.notices.add(notice)
    if examples and not len(table):
        first = table.dropped[0]
        raise TellError(
            f"none of the {len(examples)} task rows can be trained on; the first: {first.reason}",
            where=first.origin,
            remedy="Raise train.max_length, or shorten the rows.",
        )
    return table


def anchored_table(task: Task, anchor: Anchor, rows: Sequence[Example], source: str, rules: RowRules) -> RowTable:
    """Rows of a task, tokenised with the anchor; many come from the cache where it has them."""

    def make() -> RowTable:
        return tokenize(rows, task.chat, source=source, anchor=anchor, rules=rules, unit=task.unit)

    if len(rows) < CACHED_ROWS:
        return make()
    key = cache_key(
        rows=[[e.hash, e.origin] for e in rows],
        source=source,
        anchor=anchor.hash if anchor else None,
        tokenizer=task.chat.fingerprint,
        unit=task.unit.fingerprint,
        rules=asdict(rules),
    )
    return cached_table(key, make)[0]
