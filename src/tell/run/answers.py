"""Test prompts of an arm, its answers, and their scores and costs for metrics.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.config import Config
from tell.data.example import Example, Message
from tell.data.kind import Kind
from tell.errors import TellError
from tell.folder import AdapterFolder, RunFolder
from tell.models.architecture import Architecture
from tell.models.flops import inference_flops
from tell.names import ARMS
from tell.parts import PARTS
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import unknown_token
from tell.run.constrained import check_masks
from tell.score.intervals import difference, estimate
from tell.score.scored import Metric, Scorer
from tell.score.scorers import make_scorer
from tell.seeds import permutation

if TYPE_CHECKING:
    from tell.decode.grammar import Grammar
    from tell.decode.guide import Guide
    from tell.decode.sampler import Decoding
    from tell.run.session import Session

MOST_NEW_TOKENS = 1024


def scorer_of(config: Config, kind: Kind) -> Scorer:
    """The scorer of a task: the user's own function, or by the kind of answers."""
    return make_scorer(
        kind.name,
        schema=kind.schema,
        labels=kind.labels,
        custom=config.task.scorer,
        bleurt=config.eval.bleurt,
        form=kind.form,
    )


def answer_limit(config: Config, chat: ChatTokenizer, examples: Sequence[Example]) -> int:
    """Most new tokens of an answer: 1.5 times the longest training answer, unless configured."""
    if config.generate.max_new_tokens:
        return config.generate.max_new_tokens
    longest = max(len(e.ids) for e in chat.backend.encode_batch([x.answer for x in examples], add_special_tokens=False))
    return int(min(MOST_NEW_TOKENS, max(16, np.ceil(1.5 * (longest + 1)))))


def check_prompts(
    chat: ChatTokenizer,
    anchor: Anchor,
    test: Sequence[Example],
    positions: int | None,
    shots: Sequence[Example] = (),
    vocab: int | None = None,
) -> None:
    """Refuse test rows whose prompt leaves no room for an answer, or that the model cannot read.

    Args:
        positions: longest row the model takes, in tokens; None where it does not say.
        shots: examples in every prompt.
        vocab: rows of the model's embedding; None where unknown.

    Raises:
        TellError: the first such row.
    """
    for example in test:
        prompt = _shot_prompt(chat, example, anchor, shots)
        if error := unknown_token(prompt, chat, vocab):
            raise TellError(error.what, where=example.origin, remedy=error.remedy)
        if positions and (length := len(prompt)) >= positions:
            raise TellError(
                f"the prompt has {length:,} tokens and the model takes {positions:,}",
                where=example.origin,
                remedy="Shorten that test row, or remove it" + (", or lower task.shots." if shots else "."),
            )


@dataclass(frozen=True)
class Prompting:
    """How the test rows become prompts.

    Attributes:
        shots: examples in every prompt of all arms but those with examples in context; the anchor comes once, before
            the first.
        examples: in-context examples wanted.
        room: tokens a prompt may have; as many examples are shown as fit with the longest test prompt.
        seed: draws which training rows are the examples, and their order, since a file may be sorted.
        nearest: (n, k) training rows to show each test row instead, the most similar first, as from
            `tell.run.neighbours.nearest_rows`; the most similar is shown last, next to the question.
    """

    chat: ChatTokenizer
    anchor: Anchor
    shots: Sequence[Example]
    examples: int
    room: int
    seed: int
    nearest: np.ndarray | None = None

    def prompts(self, arm: str, test: Sequence[Example], train: Sequence[Example]) -> tuple[list[list[int]], int]:
        """Token ids of the prompts of an arm, and how many training examples are put in context of each."""
        if not ARMS[arm].in_context:
            anchor = arm_anchor(arm, self.anchor)
            return [_shot_prompt(self.chat, example, anchor, self.shots) for example in test], 0
        if self.nearest is None:
            drawn = permutation(len(train), self.seed, "icl")[: self.examples]
            rows, step = np.tile(drawn, (len(test), 1)), 1
        else:
            rows, step = self.nearest[:, : self.examples], -1
        count = rows.shape[1]
        while True:
            prompts = [
                _shot_prompt(self.chat, example, self.anchor, [train[int(i)] for i in of[:count][::step]])
                for example, of in zip(test, rows, strict=True)
            ]
            if not count or max(map(len, prompts)) <= self.room:
                return prompts, count
            count -= 1


def _shot_prompt(chat: ChatTokenizer, example: Example, anchor: Anchor, shots: Sequence[Example]) -> list[int]:
    """Token ids of a test prompt after its examples, with the anchor once."""
    try:
        return chat.encode(chat.render(anchor.apply(shown_turns(example, shots)), add_generation_prompt=True))
    except TellError as error:
        raise TellError(error.what, where=example.origin or error.where, remedy=error.remedy) from error


def shown_turns(example: Example, shots: Sequence[Example]) -> list[Message]:
    """The turns of a prompt after its examples, without the anchor; the prompt's own system text comes first."""
    system = list(example.prompt[:1]) if shots and example.prompt and example.prompt[0].role == "system" else []
    return [*system, *_turns(shots, system), *example.prompt[len(system) :]]


def shots_by_system(shots: Sequence[Example]) -> dict[str | None, list[Message]]:
    """The turns of examples in a prompt as `shown_turns` has them, by the prompt's own system text; None: any other."""
    texts = dict.fromkeys(m.content for example in shots for m in example.messages if m.role == "system")
    return {None: _turns(shots, ()), **{text: _turns(shots, [Message("system", text)]) for text in texts}}


def _turns(examples: Sequence[Example], system: Sequence[Message]) -> list[Message]:
    """The turns of examples; a system text that differs from ``system`` is prepended to their first user turn."""
    turns: list[Message] = []
    for example in examples:
        own = [m for m in example.messages if m.role == "system" and m not in system]
        rest = [m for m in example.messages if m.role != "system"]
        text = "\n\n".join(m.content for m in own if m.content.strip())
        turns += Anchor(text).apply(rest) if text else rest
    return turns


def answer_rows(
    session: Session,
    prompts: Sequence[Sequence[int]],
    test: Sequence[Example],
    decoding: Decoding,
    arm: str,
    guides: Sequence[Guide] | None = None,
    grammar: Grammar | None = None,
) -> list[dict]:
    """Rows of predictions/<arm>.jsonl without scores: one answer per test row.

    Raises:
        TellError: the grammar gives up on an answer.
    """
    masks = None if grammar is None else [grammar.mask() for _ in prompts]
    answers = session.answer(prompts, decoding, f"answer {arm}", guides, masks)
    check_masks(masks or (), [row.origin for row in test] if masks else ())
    return [
        {
            "hash": example.hash,
            "origin": example.origin,
            "prompt": example.question,
            "reference": example.answer,
            "answer": session.chat.answer(answer.ids),
            "finish": answer.finish,
            "tokens": len(answer.ids),
        }
        for example, answer in zip(test, answers, strict=True)
    ]


def score_rows(scorer: Scorer, rows: list[dict], more: Mapping[str, Metric] | None = None) -> dict[str, Metric]:
    """Metrics over the rows by name; each row receives its scores, and why it is invalid.

    Args:
        more: metrics over the same rows that the answers do not give; they follow the scorer's.
    """
    metrics = scorer.score([r["answer"] for r in rows], [r["reference"] for r in rows]) | dict(more or {})
    explain = getattr(scorer, "why_invalid", None)
    for i, row in enumerate(rows):
        values = {name: float(metric.per_row[i]) for name, metric in metrics.items()}
        row["scores"] = {name: round(v, 6) for name, v in values.items() if np.isfinite(v)}
        if explain and (why := explain(row["answer"])):
            row["why"] = why
    return metrics


def arm_numbers(arms: Mapping[str, Mapping[str, Metric]], *, seed: int, samples: int) -> tuple[dict, dict]:
    """``arms`` and ``differences`` of metrics.json: TELL against each arm, each against the untuned model, and `PARTS`.

    Where neither of the two is among the arms, each is compared with the first.
    """
    values = {
        arm: {name: estimate(metric, seed=seed, samples=samples) for name, metric in metrics.items()}
        for arm, metrics in arms.items()
    }
    pairs = [("tell", arm) for arm in arms if arm != "tell"] if "tell" in arms else []
    pairs += [(arm, "base") for arm in arms if arm not in ("base", "tell")] if "base" in arms else []
    if "tell" not in arms and "base" not in arms:
        first, *others = arms
        pairs = [(arm, first) for arm in others]
    pairs += [pair for part in PARTS for pair in part.pairs if set(pair) <= set(arms)]
    gaps = {
        f"{a} - {b}": {
            name: difference(arms[a][name], arms[b][name], seed=seed, samples=samples)
            for name in arms[a]
            if name in arms[b]
        }
        for a, b in dict.fromkeys(pairs)
    }
    return values, gaps


def answer_costs(arch: Architecture, prompts: Sequence[Sequence[int]], rows: Sequence[dict]) -> dict:
    """Tokens and FLOPs of answering; every prompt counts in full, even where the engine shared its prefix.

    Args:
        prompts: token ids, one for each of ``rows``.
        rows: as from `answer_rows`.
    """
    new = [row["tokens"] + (row["finish"] == "stop") for row in rows]  # the end of turn is sampled too, but not kept
    fed = [len(prompt) + max(0, n - 1) for prompt, n in zip(prompts, new, strict=True)]  # the last token is never fed
    flops = inference_flops(arch, sum(fed), output_tokens=sum(new), lengths=fed)
    return {"prompt_tokens": sum(map(len, prompts)), "new_tokens": sum(new), "flops": flops}


def eval_numbers(costs: Mapping[str, dict]) -> dict:
    """``eval`` of metrics.json, from `answer_costs` of each arm."""
    return {"flops": sum(c["flops"] for c in costs.values()), "arms": dict(costs)}


def arm_anchor(arm: str, anchor: Anchor) -> Anchor:
    """The run's anchor, or none for an arm that is prompted without it."""
    return anchor if ARMS[arm].anchored else NO_ANCHOR


def adapter_arm(arm: str) -> str | None:
    """The trained arm whose adapter an arm answers with; None also for an arm of another version of TELL."""
    return ARMS[arm].adapter if arm in ARMS else None


def adapter_folder(root: RunFolder, arm: str) -> Path | None:
    """The folder of the adapter an arm answers with, in a run folder; None for the untuned model."""
    trained = adapter_arm(arm)
    return None if trained is None else root.adapter_of(trained).root


def adapter_ready(root: RunFolder, arm: str) -> bool:
    """Whether an arm can answer: it needs no adapter, or its adapter exists."""
    place = adapter_folder(root, arm)
    return place is None or AdapterFolder(place).weights.exists()
