"""Answers, scores and losses of every arm of a run, on its test, general and validation rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tell.anchor.anchor import Anchor
from tell.config import Config
from tell.data.example import Example
from tell.data.kind import Kind
from tell.files import read_jsonl, write_jsonl
from tell.folder import RunFolder
from tell.names import ARMS
from tell.readout.readout import Readout
from tell.rows.row_table import RowTable
from tell.rows.tokenize import tokenize
from tell.run.answer_loss import answer_loss_metric, answer_losses, kept_answer_losses
from tell.run.answers import (
    Prompting,
    adapter_folder,
    answer_costs,
    answer_limit,
    answer_rows,
    arm_numbers,
    eval_numbers,
    score_rows,
    scorer_of,
)
from tell.run.arms import Chosen, arm_config
from tell.run.benchmarks.run_benchmarks import run_benchmarks
from tell.run.computed import answering, keep_answering, kept_answering
from tell.run.constrained import constrains, session_grammar, task_constraint
from tell.run.forgetting import BASE, Forgetting, general_sets, losses_of, measure_arm
from tell.run.growing import growing
from tell.run.journal import Journal
from tell.run.neighbours import nearest_rows
from tell.run.prepare import Prepared
from tell.run.readouts import Decider, Guides, run_decider
from tell.run.session import Session
from tell.run.train_arms import Trained
from tell.score.label_table import baseline_numbers, label_numbers, label_scorer
from tell.score.scored import Metric, Scorer, primary_of

if TYPE_CHECKING:
    import numpy as np

    from tell.decode.grammar import Grammar
    from tell.decode.sampler import Decoding


@dataclass(frozen=True)
class Answers:
    """One arm's scored answers to the test rows.

    Attributes:
        rows: of ``predictions/<arm>.jsonl``.
        metrics: over these rows, by name.
        costs: as from `answer_costs`.
        shown: training examples in each prompt.
    """

    rows: list[dict]
    metrics: dict[str, Metric]
    costs: dict
    shown: int


@dataclass(frozen=True)
class Measured:
    """All measurements of a run.

    Attributes:
        answers: of each scored arm.
        forgetting: losses and answers on general rows; None where switched off.
        validation: mean validation loss by arm, empty without validation rows.
        benchmarks: of metrics.json; None where none is requested.
        primary: the metric of the verdict.
        readout: of the closed fields; None where nothing was decided.
    """

    answers: dict[str, Answers]
    forgetting: Forgetting | None
    validation: dict[str, float]
    benchmarks: dict | None
    primary: str
    readout: Readout | None = None


def measure_arms(prepared: Prepared, trained: Trained, session: Session, journal: Journal) -> Measured:
    """Measurements of every arm: answers to the test rows, general and validation loss, benchmarks."""
    config, arms, folder = prepared.task.config, trained.arms(prepared.arms), journal.folder
    journal.at("readout")
    decider = run_decider(prepared.task, session, folder) if any(ARMS[arm].decides for arm in arms) else None
    exam, validation = run_exam(prepared, session, decider), validation_table(prepared)
    weights = Weights(general_sets(config, session.chat, prepared.general), validation, exam.scorer, folder)
    answers = {}
    for arm in arms:
        journal.at(f"evaluate {arm}")
        adapter = adapter_folder(folder, arm)
        with session.adapter(adapter):
            answers[arm] = found = answer_arm(exam, arm, session, folder)
            prepared.task.notices.recall(arm, told := kept_answering(folder, arm))
            weights.measure(ARMS[arm].adapter or BASE, session)
            now = answering(session, tuned=adapter is not None)  # of a resumed run, answers to general rows alone
            prepared.task.notices.recall(f"{arm}, general rows", [note for note in now if note not in told])
        if ARMS[arm].in_context:
            prepared.task.notices.add(f"{arm}: {found.shown} examples fit into the context")
    weights.measure(BASE, session)  # what training changed needs a before
    benchmarks = None
    if config.eval.benchmarks:
        benchmarks = run_benchmarks(config, arms, prepared.anchor, session, folder, journal.at)
    primary = primary_of(exam.scorer, (found.metrics for found in answers.values()))
    readout = None if decider is None else decider.readout
    return Measured(answers, weights.general, weights.losses, benchmarks, primary, readout)


@dataclass(frozen=True)
class Exam:
    """The test rows of a run with their prompts, decoding and scorer, the same for every arm.

    Attributes:
        train: rows that examples in context come from.
        shots: examples in every prompt.
        guides: makes those of the test rows, for an arm that decides closed fields; None: nothing is decided.
        grammar: of the answers of an arm that is constrained; None: the task has none, or no arm is.
        chosen: settings that a search chose.
        nearest: training rows to show each test row, as from `nearest_rows`; None: the same ones for all.
    """

    config: Config
    anchor: Anchor
    test: Sequence[Example]
    train: Sequence[Example]
    shots: Sequence[Example]
    decoding: Decoding
    scorer: Scorer
    guides: Guides | None = None
    grammar: Grammar | None = None
    chosen: Chosen = field(default_factory=dict)
    nearest: np.ndarray | None = None

    def take(self, arm: str, session: Session, kept: list[dict] | None = None) -> Answers:
        """The arm's scored answers, its adapter applied; answers ``kept`` from an earlier session are reused."""
        config = self.config
        room = min(session.engine.max_positions - self.decoding.max_new_tokens, config.train.max_length * 2)
        most = config.eval.icl_examples
        prompting = Prompting(session.chat, self.anchor, self.shots, most, room, config.seed, self.nearest)
        prompts, shown = prompting.prompts(arm, self.test, self.train)
        more: dict[str, Metric] = {}
        generate = arm_config(config, arm, self.chosen).generate
        guides = self.guides(generate) if self.guides is not None and ARMS[arm].decides else None
        grammar = self.grammar if constrains(config, arm) else None
        rows = kept
        if rows is None:
            rows = answer_rows(session, prompts, self.test, self.decoding, arm, guides, grammar)
        if grammar is not None and (cut := sum(row["finish"] == "length" for row in rows)):
            limit = self.decoding.max_new_tokens
            what = f"{arm}: {cut} of {len(rows)} constrained answers are cut off at {limit} tokens"
            session.display.note(f"{what}; maxLength and maxItems in the schema keep strings and lists from going on")
        if config.eval.answer_loss:
            values = None if kept is None else kept_answer_losses(kept)
            if values is None:
                values = answer_losses(session, prompts, self.test, title=f"answer loss {arm}")
            more = answer_loss_metric(values)
        metrics = score_rows(self.scorer, rows, more)
        return Answers(rows, metrics, answer_costs(session.files.architecture, prompts, rows), shown)


def answer_arm(exam: Exam, arm: str, session: Session, folder: RunFolder) -> Answers:
    """The arm's scored answers, its adapter applied; answers already in the run's folder are reused."""
    path = folder.prediction(arm)
    kept = read_jsonl(path) if path.exists() else None
    with growing(folder.answering, arm, exam.test, session):
        found = exam.take(arm, session, kept)
    if kept is None:
        keep_answering(folder, arm, answering(session, tuned=adapter_folder(folder, arm) is not None))
    write_jsonl(path, found.rows)  # last: from here on the arm counts as answered
    return found


def run_exam(prepared: Prepared, session: Session, decider: Decider | None = None) -> Exam:
    """The `Exam` of a prepared run, no adapter applied."""
    from tell.decode.sampler import Decoding

    task, config = prepared.task, prepared.task.config
    limit = answer_limit(config, task.chat, task.train)
    decoding = Decoding.of(config.generate, max_new_tokens=limit, stop_ids=task.chat.stop_ids, seed=config.seed)
    scorer = scorer_of(config, task.kind)
    guides = decider.guides_of(session, task.test) if decider else None
    nearest = nearest_rows(session, prepared.arms, task.test, task.train)
    exam = Exam(config, prepared.anchor, task.test, task.train, task.shots, decoding, scorer, guides)
    grammar = session_grammar(session, task_constraint(task))
    return replace(exam, grammar=grammar, chosen=prepared.chosen, nearest=nearest)


def score_arms(answers: Mapping[str, Answers], config: Config, kind: Kind) -> dict:
    """``arms``, ``differences`` and ``eval`` of metrics.json: each metric with its interval, arms paired.

    Where answers are labels also ``labels``, and ``baseline`` unless the scorer is the user's own.
    """
    metrics = {arm: found.metrics for arm, found in answers.items()}
    values, gaps = arm_numbers(metrics, seed=config.seed, samples=config.eval.bootstrap)
    costs = eval_numbers({arm: found.costs for arm, found in answers.items()})
    rows = {arm: found.rows for arm, found in answers.items()}
    return {"arms": values, "differences": gaps, "eval": costs, **label_parts(rows, metrics, config, kind)}


def label_parts(
    rows: Mapping[str, Sequence[dict]], metrics: Mapping[str, Mapping[str, Metric]], config: Config, kind: Kind
) -> dict:
    """``labels`` and ``baseline`` of metrics.json, by arm's rows of predictions and metrics; empty for other tasks."""
    scorer = label_scorer(kind)
    if scorer is None:
        return {}
    pairs = {arm: ([r["answer"] for r in found], [r["reference"] for r in found]) for arm, found in rows.items()}
    parts = {"labels": label_numbers(scorer, pairs)}
    if config.task.scorer is None:
        _, references = next(iter(pairs.values()))
        draws = {"seed": config.seed, "samples": config.eval.bootstrap}
        parts["baseline"] = baseline_numbers(kind, scorer, metrics, references, **draws)
    return parts


def validation_table(prepared: Prepared) -> RowTable:
    """The validation rows, tokenised with the anchor; those that do not fit are left out with a notice."""
    task = prepared.task
    rules = replace(task.rules, too_long="drop", nothing_to_train="drop", misfit="drop")
    table = tokenize(task.validation, task.chat, source="validation", anchor=prepared.anchor, rules=rules)
    if lost := table.dropped:
        first = f"the first: {lost[0].origin}: {lost[0].reason}"
        task.notices.add(f"{len(lost)} of {len(task.validation)} validation rows are left out, {first}")
    return table


@dataclass
class Weights:
    """Losses of the untuned model and each adapter, measured once each.

    Attributes:
        general: general rows, and their losses and answers; None: they are not measured.
        losses: mean validation loss by arm; empty without validation rows.
    """

    general: Forgetting | None
    validation: RowTable
    scorer: Scorer
    folder: RunFolder
    losses: dict[str, float] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    def measure(self, arm: str, session: Session) -> None:
        """Measure the weights of an arm, its adapter applied, unless they have been measured."""
        if arm in self.done:
            return
        self.done.add(arm)
        if self.general is not None:
            measure_arm(self.general, arm, session, self.scorer)
            write_jsonl(self.folder.general_losses(arm), self.general.rows(arm))
        if len(self.validation):
            self.losses[arm] = round(float(losses_of(session, arm, self.validation).mean()), 6)
