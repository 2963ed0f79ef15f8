"""The anchor written by the model itself: candidates from a seeded sample of examples, scored, the best kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tell.anchor.anchor import Anchor
from tell.anchor.derive import derived_anchor
from tell.config import Config
from tell.data.example import Example, Message
from tell.data.kind import Kind
from tell.generate.sampler import Decoding
from tell.mix.seeds import permutation
from tell.progress import Display
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, tokenize
from tell.train.step import row_losses

MOST_TOKENS = 120
SHOWN_CHARACTERS = 600
SCORED_ROWS = 16
ASK = (
    "Below are examples of a task. Each has an input and the right output. Write the instruction for this task: "
    "two or three sentences that tell an assistant what to do with an input and exactly how the output must look. "
    "Write only the instruction."
)


def write_anchor_candidates(
    config: Config,
    chat: ChatTokenizer,
    model: Any,
    engine: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    kind: Kind,
    display: Display,
    check: Callable[[], None] = lambda: None,
) -> tuple[Anchor, list[dict]]:
    """Let the untuned model write instructions and keep the one under which it finds the right answers likeliest.

    Args:
        model, engine: the untuned model and its decoder.
        train: examples shown; each candidate sees a seeded sample of its own.
        validation: rows the candidates are scored on (training rows where there are none).
        kind: a candidate composed from the schema or labels competes too.

    Returns:
        The anchor and all candidates, best first: text, origin, ``score`` (mean nll in nats a token of the
        right answers under the untuned model with this anchor; lower is better), or ``reason`` where thrown away.
    """
    texts: list[tuple[str, str]] = []
    thrown: list[dict] = []
    derived = derived_anchor(kind, config.anchor.place)
    if derived:
        texts.append((derived.text, "derived"))
    prompts = [_prompt(chat, train, config, i, engine.max_positions) for i in range(config.anchor.candidates)]
    decoding = Decoding(
        max_new_tokens=MOST_TOKENS,
        stop_ids=chat.stop_ids,
        temperature=0.7,
        top_k=0,
        top_p=0.9,
        repetition_penalty=1.05,
        seed=config.seed,
    )
    with display.bar("anchor: the model writes candidates", len(prompts), "candidates") as advance:

        def progress(_: int, finished: int) -> None:
            advance(finished)
            check()

        answers = engine.generate(prompts, decoding, progress=progress)
    for answer in answers:
        text = _clean(chat.decode(answer.ids))
        reason = _unusable(text, answer.finish, [t for t, _ in texts])
        if reason:
            thrown.append({"text": text, "origin": "self", "score": None, "reason": reason})
        else:
            texts.append((text, "self"))
    if not texts:  # free text and nothing usable written: the plainest instruction that is true
        texts.append(("Answer in the way of this task.", "derived"))
    rows = list(validation)[:SCORED_ROWS] or list(train)[:SCORED_ROWS]
    scored: list[dict] = []
    rules = RowRules(config.train.max_length, "drop", "drop")
    with display.bar("anchor: score candidates", len(texts), "candidates") as advance:
        for text, origin in texts:
            table = tokenize(rows, chat, source="task", anchor=Anchor(text, config.anchor.place), rules=rules)
            losses = row_losses(model, table, micro_tokens=config.train.micro_tokens, device=engine.device)
            score = round(float(np.mean(losses)), 6) if len(losses) else None
            scored.append({"text": text, "origin": origin, "score": score})
            advance(1)
            check()
    scored.sort(key=lambda c: (c["score"] is None, c["score"]))
    best = scored[0]
    return Anchor(best["text"], config.anchor.place, best["origin"]), [*scored, *thrown]


def _prompt(chat: ChatTokenizer, train: Sequence[Example], config: Config, number: int, positions: int) -> list[int]:
    """The question for one candidate, with as many of its examples as the context holds."""
    order = permutation(len(train), config.seed, "anchor", number)[: config.anchor.examples]
    parts = [f"Input:\n{_short(train[int(i)].question)}\nOutput:\n{_short(train[int(i)].answer)}" for i in order]
    while True:
        text = "\n\n".join([ASK, *parts, "Instruction:"])
        ids = chat.encode(chat.render([Message("user", text)], add_generation_prompt=True))
        if len(ids) + MOST_TOKENS <= positions or not parts:
            return ids
        parts.pop()


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def _clean(text: str) -> str:
    text = text.strip().removeprefix("Instruction:").strip()
    return text.strip('"“”').strip()


def _unusable(text: str, finish: str, have: Sequence[str]) -> str | None:
    if finish != "stop":
        return "longer than an instruction should be"
    if len(text.split()) < 4:
        return "too short"
    if text in have:
        return "written before"
    return None
