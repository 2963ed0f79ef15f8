"""Trained arms answer unlabelled prompts, for the arms that are trained on their answers (self-training)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from tell.data.example import Example, Message
from tell.errors import TellError
from tell.files import read_jsonl, write_jsonl
from tell.folder import RunFolder, reading
from tell.mix.manifest import write_manifest
from tell.mix.mixture import PSEUDO
from tell.names import ARMS
from tell.readout.confidence import confidence
from tell.rows.tokenize import RowRules, tokenize, unknown_token
from tell.run.answers import Prompting, answer_limit
from tell.run.journal import Journal
from tell.run.prepare import Prepared
from tell.run.pseudo_rows import LEAST_WEIGHT, Pseudo, labelled
from tell.run.readouts import prompt_states, run_decider
from tell.run.session import Session
from tell.run.task import Task
from tell.run.train_arms import Trained
from tell.run.written_blocks import keep_engine, written_by_engine
from tell.run.written_prompts import write_prompts
from tell.score.scorers import make_scorer

READOUT, TOKENS = "readout", "tokens"


def teach(prepared: Prepared, trained: Trained, session: Session, journal: Journal) -> Prepared:
    """The run with the answers of its teachers in place of their estimates; those in the folder are taken from there.

    An arm whose teacher failed, or has no valid answer, is left out.

    Raises:
        TellError: no arm is left to be scored.
    """
    folder, made, arms = journal.folder, dict(prepared.pseudo), prepared.arms
    taught = prepared.taught
    for declared in dict.fromkeys(ARMS[arm].teacher or "" for arm in taught):
        teacher = prepared.same.get(declared, declared)
        journal.at(f"pseudo-label by {teacher}")
        path, rows = folder.pseudo_labels(teacher), []
        if path.exists():
            rows = read_jsonl(path)
        elif teacher not in trained.failed:
            session.load()
            rows = _answers(prepared, prepared.pseudo[declared], teacher, session, folder)
            write_jsonl(path, rows)
        with reading(path):
            found = labelled(prepared.task, prepared.anchor, rows, prepared.pseudo[declared])
        made[declared] = found
        _say(prepared.task, teacher, found)
        if not len(found.table):
            why = (
                f"its teacher {teacher} failed"
                if teacher in trained.failed
                else f"{teacher} has no valid answer for it"
            )
            for arm in taught:
                if ARMS[arm].teacher == declared:
                    trained.failed[arm] = why
                    prepared.task.notices.add(f"the arm {arm} is left out: {why}")
    prepared = replace(prepared, pseudo=made)
    if arms and not trained.arms(prepared.arms):
        raise TellError(
            f"no answer to an unlabelled prompt can be trained on, and no arm but {', '.join(arms)} is requested",
            where=str(folder.pseudo),
            remedy="Give other prompts with --unlabelled, or request further arms; the answers are in that folder.",
        )
    for arm in prepared.taught:
        tables, mixture = prepared.mixtures[arm]
        write_manifest(folder.pseudo_manifest(arm), mixture, tables, prepared.task.config.train.batch_size)
    return prepared


def _say(task: Task, teacher: str, found: Pseudo) -> None:
    facts = found.facts
    if not facts["prompts"]:
        return
    by = " and ".join({READOUT: "the readout", TOKENS: "the answer's tokens"}[key] for key in facts["weighed_by"])
    text = f"{teacher} answered {facts['prompts']:,} unlabelled prompts, {facts['kept']:,} are trained on"
    text += f", with a mean weight of {facts['weight']:.2f} by {by}" if facts["kept"] else ""
    lost = ", ".join(f"{count:,} {reason}" for reason, count in facts["left_out"].items())
    task.notices.add(text + (f"; left out: {lost}" if lost else ""))


def _answers(prepared: Prepared, planned: Pseudo, teacher: str, session: Session, folder: RunFolder) -> list[dict]:
    """Rows of ``pseudo/<teacher>.jsonl``: prompt, greedy answer, weight, and why it is left out."""
    from tell.decode.sampler import Decoding

    task, config = prepared.task, prepared.task.config
    asked = list(_prompts(prepared, planned, session, folder))
    prompting = Prompting(session.chat, prepared.anchor, task.shots, 0, 0, config.seed)
    rows = [_row(example) for example in asked]
    ids, fits = [], []
    limit = answer_limit(config, task.chat, task.train)
    for i, example in enumerate(asked):
        try:
            (prompt,), _ = prompting.prompts(teacher, [example], [])
            error = unknown_token(prompt, task.chat, task.files.architecture.vocab)
        except TellError as fault:
            prompt, error = [], fault
        if error or len(prompt) + limit > session.engine.max_positions or len(prompt) >= config.train.max_length:
            rows[i]["why"] = f"cannot be read: {error.what}" if error else "too long"
            continue
        ids.append(prompt)
        fits.append(i)
    examples = [asked[i] for i in fits]
    if not examples:
        return rows
    decider = run_decider(task, session, folder)
    guides = decider.guides_of(session, examples)(prepared.task_of(teacher).config.generate) if decider else None
    states = prompt_states(session, examples, "hidden states of the prompts") if decider else None
    generate = config.generate.model_copy(update={"greedy": True, "repetition_penalty": 1.0})
    decoding = Decoding.of(generate, max_new_tokens=limit, stop_ids=task.chat.stop_ids, seed=config.seed)
    with session.adapter(folder.adapter_of(teacher).root):
        answers = session.answer(ids, decoding, f"pseudo-label by {teacher}", guides)
        texts = [session.chat.answer(answer.ids) for answer in answers]
        check = _Checks(task)
        faults = [check.fault(text, answer.finish) for text, answer in zip(texts, answers, strict=True)]
        weights = np.full(len(texts), np.nan)
        if decider is not None and states is not None:
            weights = confidence(decider.readout, states, texts)
        unread = [k for k, fault in enumerate(faults) if fault is None and np.isnan(weights[k])]
        sure = _token_probabilities(prepared, [examples[k] for k in unread], [texts[k] for k in unread], session)
    told = dict(zip(unread, sure, strict=True))
    for k, i in enumerate(fits):
        by, weight = (TOKENS, told[k]) if k in told else (READOUT, weights[k])
        rows[i] |= {"answer": texts[k], "why": faults[k]}
        if faults[k] is None:
            rows[i] |= {"weight": max(LEAST_WEIGHT, round(float(weight), 6)), "by": by}
    return rows


def _row(example: Example) -> dict:
    always = ("role", "content")  # a turn of tool calls alone has no content
    turns = [{k: value for k, value in asdict(turn).items() if value != "" or k in always} for turn in example.prompt]
    return {"origin": example.origin, "prompt": turns, "answer": None, "weight": None, "by": None, "why": None}


def _prompts(prepared: Prepared, planned: Pseudo, session: Session, folder: RunFolder) -> Sequence[Example]:
    """The prompts of the user's file, or those that the model writes, with a notice of their number."""
    if planned.prompts is not None:
        return planned.prompts
    task = prepared.task
    # All that any teacher is to answer, at once: they are then of one engine, also where another decodes later.
    wanted = max(one.wanted for one in prepared.pseudo.values())
    found, facts = write_prompts(session, task, wanted, written_by_engine(folder, "prompts"))
    keep_engine(folder, "prompts", facts["engine"])
    found = found[: planned.wanted]
    thrown = ", ".join(f"{count:,} {reason}" for reason, count in facts["thrown"].items())
    few = f", fewer than the {planned.wanted:,} requested" if len(found) < planned.wanted else ""
    task.notices.add(
        f"the model wrote {len(found):,} prompts in the style of the task's{few}, in {facts['asked']:,} tries"
        + (f" ({thrown})" if thrown else "")
    )
    return found


class _Checks:
    """Whether an answer is one of the task's."""

    def __init__(self, task: Task) -> None:
        kind = task.kind  # of the schema of the training answers: what test rows add must not be learned
        self.labels = kind.labels
        self.scorer = make_scorer(kind.name, schema=kind.shown or kind.schema, labels=kind.labels, form=kind.form)

    def fault(self, text: str, finish: str) -> str | None:
        """Why an answer is not trained on; None where it is."""
        if finish != "stop":
            return "cut off by the limit"
        if not text.strip():
            return "empty"
        explain = getattr(self.scorer, "why_invalid", None)
        if explain and (why := explain(text)):
            return why if why.startswith("not JSON") else f"against the schema: {why}"
        if self.labels and not self.scorer.is_task_format(text):
            return "no label"
        return None


def _token_probabilities(
    prepared: Prepared, examples: Sequence[Example], texts: Sequence[str], session: Session
) -> list[float]:
    """The geometric mean of the probabilities of each answer's tokens, its end included, by the applied adapter.

    0 for rows that cannot be tokenised; they are left out of training, too.
    """
    if not examples:
        return []
    rows = [
        Example.of((*e.prompt, Message("assistant", text)), source=PSEUDO, origin=e.origin)
        for e, text in zip(examples, texts, strict=True)
    ]
    rules = RowRules(prepared.task.config.train.max_length, "drop", "drop", misfit="drop")
    table = tokenize(rows, prepared.task.chat, source=PSEUDO, anchor=prepared.anchor, rules=rules)
    losses = dict(zip(map(str, table.hashes), session.row_losses(table), strict=True))
    return [float(np.exp(-losses.get(row.hash, np.inf))) for row in rows]
