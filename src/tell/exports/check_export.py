"""The proof of an export: the run's test prompts and answers against those of the artefact in another runtime."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tell.data.example import Example
from tell.data.subset import take_rows
from tell.errors import TellError
from tell.exports.target import Reader, Source, Target
from tell.models.base import check_planned_model
from tell.run.answers import Prompting, scorer_of
from tell.run.session import own_engine
from tell.score.intervals import difference, estimate
from tell.score.scored import primary_of
from tell.verbs.evaluate import Findings, run_examples, run_kind

ANSWERS = 32  # test rows that are answered: enough to notice other weights, a minute for a small model on a CPU


@dataclass(frozen=True)
class Rows:
    """The test rows of the run with the token ids of their prompts."""

    test: Sequence[Example]
    prompts: list[list[int]]


def check_export(target: Target, source: Source, folder: Path, *, required: bool) -> dict:
    """Prompts compared token by token, then answers of a sample by their score.

    Args:
        folder: what the target wrote.
        required: the check was asked for; what prevents it is an error.

    Returns:
        ``check`` of export.json: ``passed`` (None where nothing was compared), ``prompts``, ``answers``; ``why`` in
        their place where nothing was compared, or the runtime failed (``passed`` is False).

    Raises:
        TellError: the check is required, and the test rows are gone, there is no runtime, or this machine cannot
            compute over the run's base weights.
    """
    reader = target.reopen(source, folder)
    try:
        if isinstance(reader, str):
            raise TellError(reader, where="--check", remedy="Leave it out, or install that runtime.")
        check_planned_model(source.opened.config.model)  # the run's own answers need its base weights here
        rows = _rows(source)
    except TellError as error:
        if required:
            raise
        source.notices.add(f"not checked: {error}")
        return {"passed": None, "why": str(error)}
    try:
        return _compare(reader, source, rows)
    except TellError as error:  # what was exported is kept, though not published
        source.notices.add(f"the check failed: {error}")
        return {"passed": False, "why": str(error)}


def _rows(source: Source) -> Rows:
    opened = source.opened
    _, test, shots = run_examples(opened, None, source.notices.display, need_train=False)
    prompting = Prompting(opened.chat, source.anchor, shots, 0, 0, opened.config.seed)
    return Rows(test, prompting.prompts(source.arm, test, [])[0])


def _compare(held: AbstractContextManager[Reader], source: Source, rows: Rows) -> dict:
    picked = sorted(take_rows(len(rows.test), min(ANSWERS, len(rows.test)), source.opened.config.seed))
    ours = _run_answers(source, [rows.prompts[i] for i in picked])  # first: the two models need not fit together
    display = source.notices.display
    with held as reader:
        runtime, different = reader.runtime, []
        with display.bar(f"compare prompts ({runtime})", len(rows.test)) as advance:
            for example, ids in zip(rows.test, rows.prompts, strict=True):
                if (found := reader.prompt_ids(example.prompt)) != ids:
                    different.append(example.origin)
                    if len(different) == 1:
                        _show_first(source, example, ids, found)
                advance(1)
        theirs = []
        with display.bar(f"answer ({runtime})", len(picked), "answers") as advance:
            for i in picked:
                theirs.append(reader.answer(rows.prompts[i], source))
                advance(1)
    answers = _scores(source, [rows.test[i] for i in picked], ours, theirs)
    prompts = {
        "n": len(rows.test),
        "equal": len(rows.test) - len(different),
        "first_different": next(iter(different), None),
    }
    passed = not different and answers["within"]
    return {"passed": passed, "runtime": runtime, "prompts": prompts, "answers": answers}


def _run_answers(source: Source, prompts: list[list[int]]) -> list[str]:
    """The run's own greedy answers, without its readout."""
    from tell.decode.sampler import Decoding

    opened = source.opened
    session = opened.session(own_engine(opened.config), source.notices.display, stream=True)
    rule = source.generate.model_copy(update={"greedy": True})
    decoding = Decoding.of(
        rule, max_new_tokens=source.most_tokens, stop_ids=opened.chat.stop_ids, seed=opened.config.seed
    )
    try:
        with session.adapter(source.adapter.root):
            answers = session.answer(prompts, decoding, f"answer {source.arm}")
    finally:
        session.release()
    return [opened.chat.answer(answer.ids) for answer in answers]


def _scores(source: Source, test: Sequence[Example], ours: list[str], theirs: list[str]) -> dict:
    """Both scores and their paired difference; ``within``: its interval holds zero."""
    opened = source.opened
    config = opened.config
    facts = opened.folder.read_as(opened.folder.findings, Findings)
    scorer = scorer_of(config, run_kind(opened, facts.kind))
    references = [example.answer for example in test]
    run, exported = scorer.score(ours, references), scorer.score(theirs, references)
    name = primary_of(scorer, [run])
    how = {"seed": config.seed, "samples": config.eval.bootstrap}
    gap = difference(exported[name], run[name], **how)
    low, high = gap["ci"]
    return {
        "n": len(test),
        "same": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "metric": name,
        "run": estimate(run[name], **how),
        "exported": estimate(exported[name], **how),
        "difference": gap,
        "within": low is None or low <= 0 <= high,
    }


def _show_first(source: Source, example: Example, ours: list[int], theirs: list[int]) -> None:
    """Say where the first differing prompt differs, with some text around that token."""
    chat = source.chat
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(ours), len(theirs)) if at is None else at

    def around(ids: list[int]) -> str:
        return repr(chat.backend.decode(ids[max(0, at - 12) : at + 12], skip_special_tokens=False))

    source.notices.add(
        f"{example.origin}: the exported prompt differs from token {at} on: the run has {around(ours)} "
        f"({len(ours)} tokens), the export {around(theirs)} ({len(theirs)} tokens)"
    )
