"""`tell eval`: score the arms of a finished run again, on its own test rows or on others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tell.arm import CONSTRAINTS, KindName
from tell.config import Config, make_config
from tell.data.constraint import check_choice
from tell.data.example import Example
from tell.data.kind import Kind, misfits
from tell.data.label_text import FORMS
from tell.data.sources import load
from tell.data.subset import take_rows
from tell.errors import TellError
from tell.files import write_jsonl
from tell.names import ARMS
from tell.nested import merge
from tell.overrides import parse_overrides
from tell.progress import Display, Silent
from tell.rows.ends import without_ends
from tell.run.answers import adapter_ready, check_prompts, scorer_of
from tell.run.arms import Chosen, twins
from tell.run.claim import Trust, check_trust
from tell.run.constrained import any_constrained, kept_constraint, session_grammar
from tell.run.measure import Exam, score_arms
from tell.run.neighbours import nearest_rows
from tell.run.session import Session, check_engine
from tell.score.scored import primary_of
from tell.shown import left_out
from tell.verbs.open_run import CELL_ADAPTER, OpenRun, open_run

EVAL_KEYS = ("answer_loss", "arms", "bleurt", "bootstrap", "icl_examples", "icl_select")
"""Keys of ``eval`` that scoring reads; the others belong to a run, or to ``--benchmarks``."""
KEPT = ("forgetting", "mixture", "train", "failed", "same")
"""Parts of metrics.json that are shown next to new scores as the run measured them."""
WITHOUT = {"test": ", or give test rows with --test", "training": ", or leave the arm icl out"}


def evaluate(
    run: str | Path,
    *,
    arms: Sequence[str] | None = None,
    test: str | None = None,
    rows: int | None = None,
    overrides: Sequence[str] = (),
    trust: Trust = Trust(),  # noqa: B008  (frozen)
    display: Display | None = None,
) -> dict:
    """Scores of a run's arms, in the shape of metrics.json.

    Args:
        run: a run folder with its adapters.
        arms: default: those of the run that can answer.
        test: another test file; default: the run's own test rows.
        rows: score at most this many test rows, drawn by seed.
        overrides: ``generate.x=y``, some of ``eval.x=y``, and ``seed=n`` of decoding and of ``rows``, as for ``--set``.
        trust: third-party code that may run. The folder may be somebody else's, so run.yaml alone does not allow it.
        display: shows progress.

    Returns:
        The shape of metrics.json: ``task``, ``arms``, ``differences`` and ``eval`` as scored now; ``forgetting``,
        ``mixture``, ``train``, ``failed`` and ``same`` as the run measured them. The run's own metrics and answers
        stay as they are; the new answers go to ``predictions/eval/``.

    Raises:
        TellError: no run, no adapter for an arm, bad test file, rows that are gone.
    """
    display = display or Silent()
    opened = open_run(run, trust_remote_code=trust.code)
    check_trust(opened.folder, opened.config, code=trust.code, scorer=trust.scorer)
    config, seed = changed_config(opened, overrides)
    facts = opened.folder.read_as(opened.folder.findings, Findings)
    kind = run_kind(opened, facts.kind)
    decides, choice = opened.decides(config), config.generate.constrain
    check_choice(choice, kind.name)
    wanted = list(dict.fromkeys(arms or (a for a in config.eval.arms if adapter_ready(opened.folder, a))))
    if not arms:
        same = twins(wanted, decides=decides, constrains=kind.name in CONSTRAINTS and choice == "off")
        wanted = [arm for arm in wanted if arm not in same]
    adapters = {arm: opened.adapter(arm) for arm in wanted}
    if free := [arm for arm in wanted if ARMS[arm].constrained and kind.name not in CONSTRAINTS]:
        what = f"answers of kind {kind.name} have no schema or labels that they could be constrained to"
        raise TellError(what, where=f"--arms {free[0]}", remedy="Leave the arm out.")
    constrained = any_constrained(config, kind.name, wanted)
    check_engine(config, decides=decides, constrains=constrained)
    session = opened.session(config, display, stream=decides or constrained)
    if not wanted:
        raise TellError(
            "has no adapter left",
            where=str(opened.folder.root),
            remedy=f"Run `tell tune` again; {CELL_ADAPTER}",
        )
    opened.folder.read_as(opened.folder.metrics, Metrics)  # damage is reported now, not after the arms have answered
    metrics = opened.folder.read(opened.folder.metrics)
    train, examples, shots = run_examples(opened, test, display, need_train=any(ARMS[arm].in_context for arm in wanted))
    if rows is not None and rows < len(examples):
        examples = [examples[i] for i in sorted(take_rows(len(examples), rows, seed))]
    exam = exam_of(opened, session, seed, facts, test=examples, train=train, shots=shots)
    nearest = nearest_rows(session, wanted, examples, train)
    grammar = session_grammar(session, kept_constraint(opened.folder, kind)) if constrained else None
    exam = replace(exam, grammar=grammar, chosen=_still_chosen(opened, overrides), nearest=nearest)
    if said := misfits(kind, examples):
        display.note(said)
    answers = {}
    for arm in wanted:
        with session.adapter(adapters[arm]):
            answers[arm] = exam.take(arm, session)
        write_jsonl(opened.folder.evaluated(arm), answers[arm].rows)
    kept = {key: metrics.get(key) for key in KEPT}
    also = ("benchmarks", *(("readout",) if exam.guides else ()), "pseudo")
    kept |= {key: metrics[key] for key in also if key in metrics}
    task = {"kind": facts.kind.name, "primary": primary_of(exam.scorer, (found.metrics for found in answers.values()))}
    return {"task": task, **score_arms(answers, config.model_copy(update={"seed": seed}), kind), **kept}


def exam_of(
    opened: OpenRun,
    session: Session,
    seed: int,
    facts: Findings,
    *,
    test: list[Example],
    train: list[Example],
    shots: list[Example],
) -> Exam:
    """The test rows with prompts, decoding and scorer; ``seed`` is of decoding."""
    from tell.decode.sampler import Decoding

    arch, config = opened.files.architecture, session.config
    check_prompts(opened.chat, opened.anchor, test, arch.max_positions, shots, arch.vocab)
    limit = config.generate.max_new_tokens or facts.answer_limit
    decoding = Decoding.of(config.generate, max_new_tokens=limit, stop_ids=opened.chat.stop_ids, seed=seed)
    scorer = scorer_of(config, run_kind(opened, facts.kind))
    decider = opened.decider(session)
    guides = decider.guides_of(session, test) if decider else None
    return Exam(config, opened.anchor, test, train, shots, decoding, scorer, guides)


def _still_chosen(opened: OpenRun, overrides: Sequence[str]) -> Chosen:
    """What the run's search chose, without what is typed now."""
    typed = {f"generate.{key}" for key in parse_overrides(overrides).get("generate", {})}
    return {arm: {k: v for k, v in keys.items() if k not in typed} for arm, keys in opened.chosen.items()}


def changed_config(opened: OpenRun, overrides: Sequence[str]) -> tuple[Config, int]:
    """The configuration with overrides of keys that can change after training, and the seed of decoding."""
    config, changes = opened.config, parse_overrides(overrides)
    seed = changes.pop("seed", config.seed)
    if lost := set(changes) - {"generate", "eval"}:
        raise TellError(
            f"--set {next(iter(lost))} has no effect on scoring",
            remedy="Only generate.*, eval.* and seed can be changed after training.",
        )
    asked = changes.get("eval")
    if isinstance(asked, dict) and (idle := [key for key in asked if key not in EVAL_KEYS]):
        raise TellError(
            f"--set eval.{idle[0]} has no effect on scoring",
            remedy=f"Of eval, {', '.join(EVAL_KEYS)} can be set; benchmarks have their own flags (--benchmarks).",
        )
    # Only the seed of decoding changes: examples in context are those of the run.
    seed = make_config({"seed": seed}, where="--seed").seed
    made = make_config(merge(config.model_dump(by_alias=True, mode="json"), changes), where="--set")
    how, changed = made.generate.closed, changes.get("generate")
    if isinstance(changed, dict) and "closed" in changed and how != "off" and not opened.folder.readout.exists():
        raise TellError(
            f"--set generate.closed={how} needs a readout, and this run has none",
            where=str(opened.folder.root),
            remedy="Make the run again with generate.closed=fused.",
        )
    return made, seed


class KindFacts(BaseModel):
    """``kind`` of findings.json."""

    name: KindName
    why: str
    schema_inferred: bool
    labels: list[str] | None = None
    form: str | None = None
    shown: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_its_form(self) -> KindFacts:
        if (self.form in FORMS) != (self.name == "labels") or (self.form and not self.labels):
            raise ValueError(f"kind {self.name} with the form {self.form!r}")
        return self


class Findings(BaseModel):
    """The part of findings.json that is read back."""

    kind: KindFacts
    answer_limit: int = Field(ge=1, le=1_000_000)


class Number(BaseModel):
    """A score with its interval; metrics.json has further keys."""

    model_config = ConfigDict(extra="allow")
    value: float | None = None
    ci: tuple[float | None, float | None] | None = None


class ForgettingSet(BaseModel):
    """A set of rows that forgetting was measured on."""

    model_config = ConfigDict(extra="allow")
    in_mix_source: bool = False


class Forgetting(BaseModel):
    """``forgetting`` of metrics.json."""

    model_config = ConfigDict(extra="allow")
    sets: dict[str, ForgettingSet] | None = None
    arms: dict[str, dict[str, dict[str, Number | None]] | None] = {}


class Metrics(BaseModel):
    """The part of metrics.json that is kept: the run's own measurements, shown next to the new scores."""

    forgetting: Forgetting | None = None
    mixture: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    failed: dict[str, Any] | None = None
    same: dict[str, str] | None = None
    benchmarks: dict[str, Any] = {}


class Split(BaseModel):
    """split.json: content hashes."""

    train: list[str]
    test: list[str]
    validation: list[str] = []
    shots: list[str] | None = None


def run_kind(opened: OpenRun, facts: KindFacts) -> Kind:
    """The kind of task as the run found it."""
    folder = opened.folder
    schema = folder.read(folder.schema) if folder.schema.exists() else None
    labels = tuple(facts.labels) if facts.labels else None
    return Kind(facts.name, schema, facts.schema_inferred, labels, facts.why, facts.shown, facts.form)


def run_examples(
    opened: OpenRun, test: str | None, display: Display, *, need_train: bool
) -> tuple[list[Example], list[Example], list[Example]]:
    """Training rows (for in-context examples only), test rows and fixed examples, found again by their hashes."""
    task = opened.config.task
    parts = opened.folder.read_as(opened.folder.split, Split)
    shown = parts.shots or []
    needed = [task.data] * bool(need_train or shown) + [task.test or task.data] * (test is None)
    by_hash = rows_by_hash(opened, needed)
    train = pick_rows(parts.train, by_hash, task.data, "training") if need_train else []
    shots = pick_rows(shown, by_hash, task.data, "fixed example")
    if test:
        given = load(test, name="task", columns=opened.read_by, lists=lists_labels(opened))
        for notice in (*left_out(given.dropped), *given.notices):
            display.note(notice)
        return train, without_ends(given.examples, opened.chat)[0], shots
    return train, pick_rows(parts.test, by_hash, task.test or task.data, "test"), shots


def run_shots(opened: OpenRun) -> list[Example]:
    """The fixed examples of the run's prompts (``task.shots``), found again by their content hashes.

    Raises:
        TellError: they are no longer in the task's file.
    """
    hashes = opened.folder.read_as(opened.folder.split, Split).shots or []
    data = opened.config.task.data
    return pick_rows(hashes, rows_by_hash(opened, [data] * bool(hashes)), data, "fixed example")


def lists_labels(opened: OpenRun) -> bool:
    """Whether the run's answers are JSON lists of labels, so that a row with one label is such a list too."""
    return opened.folder.read_as(opened.folder.findings, Findings).kind.form == "json"


def rows_by_hash(opened: OpenRun, paths: Iterable[str | None]) -> dict[str, Example]:
    """The rows of task files, each file read once."""
    columns = opened.read_by
    files = dict.fromkeys(path for path in paths if path)
    lists = bool(files) and lists_labels(opened)
    rows = (load(path, name="task", columns=columns, lists=lists).examples for path in files)
    return {e.hash: e for examples in rows for e in without_ends(examples, opened.chat)[0]}


def pick_rows(hashes: Sequence[str], by_hash: dict[str, Example], path: str | None, what: str) -> list[Example]:
    missing = sum(h not in by_hash for h in hashes)
    if missing:
        raise TellError(
            f"{missing} of the run's {len(hashes)} {what} rows are no longer in the file",
            where=str(path),
            remedy=f"Put the file back as it was{WITHOUT.get(what, '')}.",
        )
    return [by_hash[h] for h in hashes]
