"""Anchors written by the model itself: candidates from seeded samples of examples, scored, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tell.anchor.anchor import Anchor, Origin
from tell.anchor.derive import derived_anchor
from tell.config import Config
from tell.data.example import Example, Message
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, tokenize
from tell.run.session import Session
from tell.run.task import Task
from tell.seeds import permutation

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
    """A candidate anchor with its score: how likely the reference answers are under it.

    Attributes:
        origin: ``hand``, ``self`` or ``derived``.
        losses: (rows,) nll in nats a token of each row scored under the untuned model, NaN where the row with this
            anchor is too long; None where it was rejected.
        reason: why it was rejected.
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
        """As in ``anchor.json``."""
        out = {"text": self.text, "origin": self.origin, "score": self.score}
        return {**out, "reason": self.reason} if self.reason else out


def write_anchor_candidates(task: Task, session: Session, compare: Sequence[str] = ()) -> list[Candidate]:
    """Scored candidate anchors: the untuned model writes instructions, and reference answers score them.

    Args:
        task: its training rows are shown, a seeded sample to each candidate; its validation rows are what candidates
            are scored on (training rows where there are none). A candidate composed from its kind competes too.
        compare: hand-written texts that compete with them.

    Returns:
        All candidates, best score first, rejected ones last.
    """
    place = task.config.anchor.place
    texts: list[tuple[str, Origin]] = [(text, "hand") for text in compare]
    derived = derived_anchor(task.kind, place)
    if derived and derived.text not in compare:
        texts.append((derived.text, "derived"))
    thrown: list[Candidate] = []
    for text, finish in _written(task, session):
        if reason := _unusable(text, finish, [t for t, _ in texts]):
            thrown.append(Candidate(text, "self", reason=reason))
        else:
            texts.append((text, "self"))
    if not texts:  # free text, and the model wrote nothing usable: fall back to the plainest true instruction
        texts.append(("Answer in the way of this task.", "derived"))
    rows = task.validation[:SCORED_ROWS] or task.train[:SCORED_ROWS]
    scored: list[Candidate] = []
    with session.display.bar("anchor: score candidates", len(texts), "candidates") as advance:
        for text, origin in texts:
            scored.append(Candidate(text, origin, anchor_losses(session, rows, Anchor(text, place))))
            advance(1)
            session.check()
    scored.sort(key=lambda c: np.inf if c.score is None else c.score)
    return [*scored, *thrown]


def anchor_losses(session: Session, rows: Sequence[Example], anchor: Anchor) -> np.ndarray:
    """(rows,) mean nll in nats a token of each row's answer after the anchor; NaN where the row is too long."""
    rules = RowRules(session.config.train.max_length, "drop", "drop")
    table = tokenize(rows, session.chat, source="task", anchor=anchor, rules=rules)
    out = np.full(len(rows), np.nan)
    dropped = {lost.origin for lost in table.dropped}
    kept = [i for i, row in enumerate(rows) if row.origin not in dropped]
    out[kept] = session.row_losses(table)
    return out


def _written(task: Task, session: Session) -> list[tuple[str, str]]:
    """The texts the model writes, and why each one stopped."""
    from tell.decode.sampler import Decoding

    config, chat, positions = task.config, session.chat, session.engine.max_positions
    prompts = [_prompt(chat, task.train, config, i, positions) for i in range(config.anchor.candidates)]
    decoding = Decoding(
        max_new_tokens=MOST_TOKENS,
        stop_ids=chat.stop_ids,
        temperature=0.7,
        top_k=0,
        top_p=0.9,
        repetition_penalty=1.05,
        seed=config.seed,
    )
    answers = session.answer(prompts, decoding, "anchor: the model writes candidates")
    return [(_clean(chat.decode(answer.ids)), answer.finish) for answer in answers]


def _prompt(chat: ChatTokenizer, train: Sequence[Example], config: Config, number: int, positions: int) -> list[int]:
    """The prompt for one candidate, with as many of its examples as fit into the context."""
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
