"""Chat with a tuned model: anchor and adapter applied, answers streamed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tell.arm import Constrain
from tell.data.constraint import check_choice
from tell.data.example import Example, Message
from tell.decode.answer_text import AnswerText
from tell.errors import TellError
from tell.names import ARMS
from tell.run.answers import arm_anchor, shown_turns
from tell.run.arms import arm_config
from tell.run.constrained import check_masks, kept_constraint, session_grammar
from tell.verbs.evaluate import Findings, run_kind, run_shots
from tell.verbs.open_run import OpenRun, open_run

if TYPE_CHECKING:
    from tell.decode.grammar import Grammar
    from tell.decode.guide import Guide

MOST_NEW_TOKENS = 512


def asked(turns: Sequence[Message]) -> Example:
    """A conversation that waits for its answer, as a test row is."""
    return Example.of([*turns, Message("assistant", "")], source="chat", origin="")


class _ReaderLeft(Exception):
    """Raised when the reader has stopped reading the answer."""


class ChatSession:
    """A conversation with one arm of a run, which streams its answers.

    Args:
        opened: the run, model loaded.
        arm: whose adapter answers; ``base`` is the untuned model without the anchor.
        greedy: overrides the run's decoding; a seed alone asks to sample.
        seed: of the first answer; each later answer adds 1.
        constrain: overrides ``generate.constrain`` of the run.

    Attributes:
        cut: the last answer reached the limit of tokens before it ended.
    """

    def __init__(
        self,
        opened: OpenRun,
        *,
        arm: str,
        greedy: bool | None,
        seed: int | None,
        constrain: Constrain | None = None,
    ) -> None:
        from tell.decode.engine import Engine

        self.opened, self.arm = opened, arm
        self._adapter = opened.adapter(arm)
        self.session = opened.session(stream=True)
        engine = self.session.engine
        assert isinstance(engine, Engine)  # as every session that streams has
        self._engine = engine
        self._decider = opened.decider(self.session) if ARMS[arm].decides else None
        self._generate = arm_config(opened.config, arm, opened.chosen).generate
        self._grammar = self._constraint(constrain or self._generate.constrain)
        self._stack = ExitStack()
        self._apply()
        self.anchor = arm_anchor(arm, opened.anchor)
        self.greedy = False if greedy is None and seed is not None else greedy
        self.seed = opened.config.seed if seed is None else seed
        self.shots, self.lost = self._shots()
        self.history: list[Message] = []
        self.cut = False

    def _constraint(self, choice: Constrain) -> Grammar | None:
        if choice == "off" and not ARMS[self.arm].constrained:
            return None
        kind = run_kind(self.opened, self.opened.folder.read_as(self.opened.folder.findings, Findings).kind)
        check_choice(choice, kind.name)
        return session_grammar(self.session, kept_constraint(self.opened.folder, kind))

    def _apply(self) -> None:
        """Apply the adapter, for all answers until the stack is closed."""
        self._stack.enter_context(self.session.adapter(self._adapter))
        self._stack.enter_context(self._engine.fixed_weights())

    def _guides(self, turns: list[Message]) -> list[Guide] | None:
        """The guide of the next answer; its readout needs the untuned weights for a moment."""
        if self._decider is None:
            return None
        self._stack.close()
        try:
            return self._decider.guides_of(self.session, [asked(turns)])(self._generate)
        finally:
            self._apply()

    def _shots(self) -> tuple[list[Example], bool]:
        """The run's fixed examples (``task.shots``), and whether they can no longer be found."""
        try:
            return run_shots(self.opened), False
        except TellError:
            return [], True

    def reset(self) -> None:
        """Forget the conversation."""
        self.history.clear()

    def close(self) -> None:
        """Restore the base weights."""
        self._stack.close()

    def describe(self) -> str:
        """One line: model, arm, anchor."""
        text = self.anchor.text if len(self.anchor.text) <= 100 else self.anchor.text[:100] + " …"
        anchor = f"anchor ({self.anchor.place}): {text}" if self.anchor else "no anchor"
        count = self.opened.config.task.shots
        shots = f", {count} fixed examples" + (" (no longer in the task's file: left out)" if self.lost else "")
        return f"{self.opened.files.name}, arm {self.arm}, {anchor}{shots if count else ''}"

    def stream(self, text: str) -> Iterator[str]:
        """Answer a message; yields pieces of text as they come, and keeps both turns.

        The turn that is kept has the tag of a thought that the prompt opened, known only once the thought ends.
        """
        from tell.decode.sampler import Decoding

        chat, config = self.opened.chat, self.opened.config
        turns = [*self.history, Message("user", text)]
        shown = self.anchor.apply(shown_turns(asked(turns), self.shots))
        prompt = chat.encode(chat.render(shown, add_generation_prompt=True))
        rule = config.generate
        if self.greedy is not None:
            rule = rule.model_copy(update={"greedy": self.greedy})
        decoding = Decoding.of(
            rule, max_new_tokens=MOST_NEW_TOKENS, stop_ids=chat.stop_ids, seed=self.seed + len(turns)
        )
        guides = self._guides(turns)
        masks = None if self._grammar is None else [self._grammar.mask()]
        tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        left = threading.Event()

        def hand_over(_: int, token: int) -> None:
            if left.is_set():
                raise _ReaderLeft
            tokens.put(token)

        def work() -> None:
            try:
                (answer,) = self._engine.generate([prompt], decoding, on_token=hand_over, guides=guides, masks=masks)
                check_masks(masks or (), ["chat"] if masks else ())
                self.cut = answer.finish == "length"
                tokens.put(None)
            except BaseException as error:  # passed to the reader
                tokens.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        answer = AnswerText(chat)
        try:
            while (item := tokens.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if piece := answer.add(item):
                    yield piece
            if piece := answer.end():
                yield piece
        finally:  # on Ctrl-C, or when the reader stops early, the engine must be free for the next answer
            left.set()
            thread.join()
        self.history += [turns[-1], Message("assistant", answer.whole)]


def chat(
    run: str | Path,
    *,
    arm: str = "tell",
    seed: int | None = None,
    greedy: bool | None = None,
    constrain: Constrain | None = None,
    trust_remote_code: bool = False,
) -> ChatSession:
    """A `Conversation` with an arm of a finished run, its model loaded.

    Args:
        run: a run folder.
        arm: ``tell``, ``base`` (untuned, no anchor) or another arm of the run.
        constrain: what answers are constrained to, ``off``, ``schema`` or ``labels``; default: as the run says.
        trust_remote_code: run code that comes with the model, as the run did; run.yaml alone does not allow it.

    Raises:
        TellError: no such run or arm, or the run's task has no such constraint.
    """
    opened = open_run(run, trust_remote_code=trust_remote_code)
    return ChatSession(opened, arm=arm, greedy=greedy, seed=seed, constrain=constrain)
