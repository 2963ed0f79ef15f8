"""Closed fields of a run: their readout, fitted on the untuned model's states, and the guides that decide them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tell.config_sections import GenerateConfig
from tell.data.example import Example
from tell.decode.guide import Fields, Guide, Vocabulary
from tell.errors import TellError
from tell.files import DAMAGED
from tell.folder import RunFolder
from tell.readout.readout import FieldReadout, Readout, readout_layers
from tell.rows.tokenize import prompt_ids
from tell.run.memo import once
from tell.run.session import Session
from tell.run.task import Task
from tell.shown import brief

STATES: tuple[Literal["mean", "last"], ...] = ("mean", "last")  # in the order of `tell.readout.readout.POOLINGS`
MOST_KEPT = 4000  # prompts whose states are kept: 150 MB of SmolLM2-135M's
Guides = Callable[[GenerateConfig], "list[Guide] | None"]
"""Makes the guide of each prompt for one pass of answers, decided as the configuration says; None where it is off."""
_LIST_PRIOR = (0.3, 0.1)  # of a list's end and of further items, where they share a token with known ones
CERTAIN = 50.0  # log factor of a value that the readout alone decides on: no model outweighs it


def prompt_states(session: Session, examples: Sequence[Example], title: str) -> np.ndarray:
    """(n, poolings, d) states of prompts without the anchor; the untuned model's weights are to be applied.

    They are kept while the model is loaded: the arms and cells of a study ask for the same rows.
    """
    from tell.train.states import hidden_states

    layers = readout_layers(session.files.architecture.layers)
    prompts = [tuple(prompt_ids(session.chat, example)) for example in examples]
    known: dict[tuple[int, ...], np.ndarray] = once(session.model, "states of prompts", dict)
    fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if len(known) + len(fresh) > MOST_KEPT:
        known.clear()
        fresh = list(dict.fromkeys(prompts))
    with session.display.bar(title, len(fresh)) as advance:

        def moved(rows: int) -> None:
            advance(rows)
            session.check()

        if fresh:
            micro = session.config.train.micro_tokens
            found = hidden_states(session.model, fresh, layers, states=STATES, micro_tokens=micro, progress=moved)
            known.update(zip(fresh, found.transpose(2, 0, 1, 3).reshape(len(fresh), len(STATES), -1), strict=True))
    return np.stack([known[prompt] for prompt in prompts])


def fit_readout(task: Task, session: Session) -> Readout:
    """The readout of a task's closed fields, from its training rows and the words of their values."""
    longest = task.config.train.max_length  # rows that training leaves out, with a notice, are left out here too
    rows = [row for row in task.train if len(prompt_ids(task.chat, row)) <= longest]
    fields = [field for field in task.closed if any(field.target(row.answer) is not None for row in rows)]
    texts = {field.name: list(field.words.values()) for field in fields}
    named = [Example.pair(text, "") for words in texts.values() for text in words]
    states = prompt_states(session, [*rows, *named], "hidden states of the task rows")
    parts = iter(states[len(rows) :])
    names = {name: np.array([next(parts) for _ in words]) for name, words in texts.items() if words}
    layers = readout_layers(session.files.architecture.layers)
    made = Readout.fit(states[: len(rows)], [row.answer for row in rows], fields, layers=layers, names=names)
    return replace(made, opening=task.opening)


@dataclass(frozen=True)
class Decider:
    """Decides the closed fields of a task's answers.

    Attributes:
        fields: with the tokens of their values.
        readout: of the same fields.
    """

    fields: Fields
    readout: Readout

    @classmethod
    def of(cls, readout: Readout, session: Session) -> Decider:
        """The decider of a session's model.

        Raises:
            TellError: the readout is of another model.
        """
        chat = session.chat
        width = len(readout.layers) * session.model.config.get_text_config().hidden_size
        if readout.mean.shape != (len(STATES), width):
            raise TellError("is of another model", where="readout.safetensors", remedy=DAMAGED)
        vocabulary = once(session.model, ("vocabulary", chat.fingerprint), lambda: Vocabulary(chat))
        fields = Fields(vocabulary, [field.field for field in readout.fields], chat.stop_ids, readout.opening)
        return cls(fields, readout)

    def guides_of(self, session: Session, examples: Sequence[Example]) -> Guides:
        """Makes the guides of the prompts; the untuned model's weights are to be applied now."""
        states = prompt_states(session, examples, "hidden states of the prompts")
        pairs = zip(self.readout.fields, self.readout.scores(states), strict=True)
        scored = list(pairs)
        priors = [np.log([*field.prior, *_LIST_PRIOR[: 2 * field.field.is_set]]) for field in self.readout.fields]

        def make(config: GenerateConfig) -> list[Guide] | None:
            if config.closed == "off":
                return None
            evidence = [_evidence(field, scores, config) for field, scores in scored]
            return [Guide(self.fields, [of[i] for of in evidence], priors) for i in range(len(examples))]

        return make


def _evidence(field: FieldReadout, scores: np.ndarray, config: GenerateConfig) -> np.ndarray:
    """(n, classes) log factors of a field's values, by the readout's predictions; of a list also of its end, to which
    the others are relative, and of further items."""
    alone, new = config.closed == "readout", np.log(field.field.new)
    if config.closed == "likelihood" or not field.informed:
        found = np.zeros_like(scores)
    elif alone:
        holds = field.holds(scores)
        if field.field.separator:  # such a list has a label at least
            holds |= ~holds.any(axis=1, keepdims=True) & (scores == scores.max(axis=1, keepdims=True))
        found, new = np.where(holds, CERTAIN, -np.inf), -CERTAIN
    else:
        found = config.readout_weight * field.evidence(scores)
    if not field.field.is_set:
        return found
    return np.concatenate([found, np.tile([0.0, new if field.field.open else -np.inf], (len(found), 1))], axis=1)


def run_decider(task: Task, session: Session, folder: RunFolder) -> Decider | None:
    """The decider of a run, its readout fitted once and kept in the folder; None where nothing is decided."""
    if not task.decides:
        return None
    if not folder.readout.exists():
        fit_readout(task, session).save(folder.readout)
    readout = Readout.load(folder.readout)
    if unused := [field.field.name for field in readout.fields if not field.informed]:
        names = ", ".join(map(brief, unused))
        task.notices.add(f"the readout of {names} is not used: it tells no more than the shares of the values do")
    return Decider.of(readout, session)
