"""The anchor written by the model itself: candidates from a seeded sample of examples, scored, the best kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tell.anchor.anchor import Anchor, Origin
from tell.anchor.derive import derived_anchor
from tell.config import Config
from tell.data.example import Example, Message
from tell.data.kind import Kind
from tell.decode.sampler import Decoding
from tell.progress import Display
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, tokenize
from tell.seeds import permutation
from tell.train.step import row_losses

MOST_TOKENS = 120
SHOWN_CHARACTERS = 600
SCORED_ROWS = 16
ASK = (
    "Below are examples of a task. Each has an input and the right output. Write the instruction for this task: "
    "two or three sentences that tell an assistant what to do with an input and exactly how the output must look. "
    "Write only the instruction."
)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One instruction and how likely it makes the right answers.

    Attributes:
        origin: ``hand``, ``self`` or ``derived``.
        losses: (rows,) nll in nats a token of each row scored under the untuned model, NaN where the row with this
            anchor is too long; None where it was thrown away.
        reason: why it was thrown away.
    """

    text: str
    origin: Origin
    losses: np.ndarray | None = None
    reason: str | None = None

    @property
    def score(self) -> float | None:
        """Mean loss, lower is better; None where no row was scored."""
        if self.losses is None or np.isnan(self.losses).all():
            return None
        return round(float(np.nanmean(self.losses)), 6)

    def to_dict(self) -> dict:
        """As it stands in ``anchor.json``."""
        out = {"text": self.text, "origin": self.origin, "score": self.score}
        return {**out, "reason": self.reason} if self.reason else out


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
    compare: Sequence[str] = (),
) -> list[Candidate]:
    """Let the untuned model write instructions, and score each by how likely the right answers are under it.

    Args:
        model, engine: the untuned model and its decoder.
        train: examples shown; each candidate sees a seeded sample of its own.
        validation: rows the candidates are scored on (training rows where there are none).
        kind: a candidate composed from the schema or labels competes too.
        compare: texts written by hand, which compete with them.

    Returns:
        All candidates, the best score first, those thrown away last.
    """
    texts: list[tuple[str, Origin]] = [(text, "hand") for text in compare]
    derived = derived_anchor(kind, config.anchor.place)
    if derived and derived.text not in compare:
        texts.append((derived.text, "derived"))
    thrown: list[Candidate] = []
    for text, finish in _written(config, chat, engine, train, display, check):
        if reason := _unusable(text, finish, [t for t, _ in texts]):
            thrown.append(Candidate(text, "self", reason=reason))
        else:
            texts.append((text, "self"))
    if not texts:  # free text and nothing usable written: the plainest instruction that is true
        texts.append(("Answer in the way of this task.", "derived"))
    rows = list(validation)[:SCORED_ROWS] or list(train)[:SCORED_ROWS]
    scored: list[Candidate] = []
    with display.bar("anchor: score candidates", len(texts), "candidates") as advance:
        for text, origin in texts:
            losses = anchor_losses(config, chat, model, rows, Anchor(text, config.anchor.place), engine.device)
            scored.append(Candidate(text, origin, losses))
            advance(1)
            check()
    scored.sort(key=lambda c: np.inf if c.score is None else c.score)
    return [*scored, *thrown]


def anchor_losses(
    config: Config, chat: ChatTokenizer, model: Any, rows: Sequence[Example], anchor: Anchor, device: Any
) -> np.ndarray:
    """(rows,) mean nll in nats a token of each row's answer behind the anchor; NaN where the row is too long."""
    rules = RowRules(config.train.max_length, "drop", "drop")
    table = tokenize(rows, chat, source="task", anchor=anchor, rules=rules)
    out = np.full(len(rows), np.nan)
    dropped = {lost.origin for lost in table.dropped}
    kept = [i for i, row in enumerate(rows) if row.origin not in dropped]
    out[kept] = row_losses(model, table, micro_tokens=config.train.micro_tokens)
    return out


def _written(
    config: Config,
    chat: ChatTokenizer,
    engine: Any,
    train: Sequence[Example],
    display: Display,
    check: Callable[[], None],
) -> list[tuple[str, str]]:
    """What the model writes, and how each text came to its end."""
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

        def progress(_: int, further: float) -> None:
            advance(further)
            check()

        answers = engine.generate(prompts, decoding, progress=progress)
    return [(_clean(chat.decode(answer.ids)), answer.finish) for answer in answers]


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
