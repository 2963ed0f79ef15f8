"""The models that a server answers as: arms of runs, all over one base model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.arm import CONSTRAINTS
from tell.config_sections import GenerateConfig
from tell.data.constraint import Constraint
from tell.data.example import Example, Message
from tell.decode.engine import Engine, shared_prefix
from tell.decode.grammar import Mask
from tell.decode.guide import Guide
from tell.decode.sampler import Decoding
from tell.errors import TellError
from tell.names import ARMS
from tell.progress import Display, Silent
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import unknown_token
from tell.run.answers import adapter_ready, arm_anchor, shown_turns
from tell.run.arms import arm_config
from tell.run.constrained import constrains, kept_constraint, session_grammar
from tell.run.readouts import Decider
from tell.run.session import ModelCache, Session
from tell.serve.chat_request import BAD, ApiError, ChatRequest
from tell.verbs.chat import MOST_NEW_TOKENS, asked
from tell.verbs.evaluate import Findings, run_kind, run_shots
from tell.verbs.open_run import OpenRun, open_run

BASE = "base"
"""The untuned model, with nothing of any run but the decoding of the first."""


@dataclass(frozen=True)
class Prepared:
    """A request, ready to be decoded.

    Attributes:
        prompt: token ids, anchor and fixed examples included.
        example: the conversation without them, for the readout.
        decoding: the same for requests that are decoded together; limit and seed are those of this request alone.
        mask: what the answer may be; None: any text.
    """

    prompt: list[int]
    example: Example
    decoding: Decoding
    limit: int
    seed: int
    stops: tuple[str, ...]
    mask: Mask | None = None


@dataclass(frozen=True)
class ServedModel:
    """One model name: an arm of a run.

    Attributes:
        name: by which requests ask for it.
        run: name of the run; empty for the base model.
        session: holds the base model, the same one for all.
        adapter: merged while this model answers; None for the untuned model.
        shots: examples in every prompt (``task.shots``).
        decider: of its closed fields; None where they are written as other text.
        constraint: of its answers, where a request has no schema of its own; None: any text.
        generate: how it decodes where a request says nothing.
        guided: the same, as this arm decides closed fields.
        limit: most new tokens where a request says nothing: as `tell eval` has it, or `tell chat` for `BASE`.
    """

    name: str
    run: str
    arm: str
    session: Session
    adapter: Path | None
    anchor: Anchor
    shots: Sequence[Example]
    decider: Decider | None
    constraint: Constraint | None
    generate: GenerateConfig
    guided: GenerateConfig
    seed: int
    limit: int

    @property
    def chat(self) -> ChatTokenizer:
        return self.session.chat

    @property
    def engine(self) -> Engine:
        engine = self.session.engine
        assert isinstance(engine, Engine)  # as every session that streams has
        return engine

    @cached_property
    def prefix(self) -> list[int]:
        """Token ids that the prompts of one user turn begin with: header, anchor, examples."""
        one, other = (self._prompt(asked([Message("user", text)])) for text in ("0", "x"))
        return one[: shared_prefix([one, other])]

    def _prompt(self, example: Example, *, bare: bool = False) -> list[int]:
        """Token ids of a conversation, with anchor and fixed examples unless it shall stay ``bare``."""
        turns = example.prompt if bare else self.anchor.apply(shown_turns(example, self.shots))
        return self.chat.encode(self.chat.render(turns, add_generation_prompt=True))

    def prepare(self, request: ChatRequest) -> Prepared:
        """The request as token ids and decoding, as `tell chat` would have them.

        Raises:
            ApiError: the template refuses the conversation, it does not fit into the context, or no grammar can follow
                the schema.
        """
        example = asked(request.turns())
        try:
            prompt = self._prompt(example, bare=not request.chat_template_kwargs.tell_anchor)
        except TellError as error:
            raise ApiError(BAD, f"messages: {error.what}", "messages") from error
        architecture = self.session.files.architecture
        if unknown := unknown_token(prompt, self.chat, architecture.vocab):
            raise ApiError(BAD, f"messages: {unknown.what}", "messages")
        limit = request.limit or self.limit
        most = self.engine.max_positions
        request.check_room(len(prompt), most)
        mask = self._mask(request.response_format.schema_of_answers)
        rule = request.rule(self.generate, constrained=mask is not None)
        return Prepared(
            prompt,
            example,
            Decoding.of(rule, max_new_tokens=1, stop_ids=self.chat.stop_ids, seed=0),
            min(limit, most - len(prompt)),
            ((self.seed if request.seed is None else request.seed) + len(example.prompt)) % 2**64,
            tuple(request.stop),
            mask,
        )

    def _mask(self, schema: dict[str, Any] | bool | None) -> Mask | None:
        """What an answer may be: by the request's schema, else by the model's own constraint."""
        try:
            constraint = self.constraint if schema is None else Constraint.of_schema(schema)
            grammar = session_grammar(self.session, constraint)
        except TellError as error:
            raise ApiError(BAD, f"response_format: {error.what}", "response_format") from error
        return None if grammar is None else grammar.mask()

    def guides(self, examples: Sequence[Example]) -> Sequence[Guide | None]:
        """What decides the closed fields of the answers; the untuned model's weights are to be applied."""
        made = None if self.decider is None else self.decider.guides_of(self.session, examples)(self.guided)
        return made or [None] * len(examples)

    @property
    def card(self) -> dict[str, object]:
        """What ``/v1/models`` says of it."""
        about = {"run": self.run, "arm": self.arm, "anchor": bool(self.anchor), "decides": self.decider is not None}
        return {"max_model_len": self.engine.max_positions, "tell": about}


def open_models(runs: Sequence[Path], display: Display, *, trust_remote_code: bool = False) -> dict[str, ServedModel]:
    """Every model of some runs by its name: ``RUN`` for what `tell` trained, ``RUN/ARM``, and ``base``.

    Arms with training examples in their prompts are left out, and those whose adapter is gone.

    Raises:
        TellError: no such run, two of one name, or two over different base models.
    """
    models: dict[str, ServedModel] = {}
    cache, first = ModelCache(), None
    for path in runs:
        opened = open_run(path, trust_remote_code=trust_remote_code)
        name = opened.folder.root.resolve().name
        if name in models or name == BASE:
            what = f"has the name {name}, as another model"
            raise TellError(what, where=str(path), remedy="Rename one of the folders.")
        session = replace(opened.session(opened.config, display, stream=True), models=cache, announce=first is None)
        if first is None:
            session.load()
            first = session
        _check_base(first, session, path)
        session = replace(session, files=first.files, display=Silent())  # no bar for each answer
        models |= _models_of(opened, name, session, display)
    assert first is not None
    first = replace(first, display=Silent())
    rule, seed = first.config.generate, first.config.seed
    limit = rule.max_new_tokens or MOST_NEW_TOKENS
    models[BASE] = ServedModel(BASE, "", BASE, first, None, NO_ANCHOR, (), None, None, rule, rule, seed, limit)
    return models


def _check_base(first: Session, session: Session, path: Path) -> None:
    def base(of: Session) -> tuple[str, str, str, str, str]:
        files, model = of.files, of.config.model
        return files.name, model.dtype, model.device, files.fingerprint, files.weights

    if base(first)[1:] != base(session)[1:]:
        there, here = (f"{name} ({dtype}, {device})" for name, dtype, device, *_ in map(base, (first, session)))
        what = f"is a run over {here}, and the first one over {there}"
        raise TellError(what, where=str(path), remedy="Serve runs over different base models by several `tell serve`.")


def _models_of(opened: OpenRun, name: str, session: Session, display: Display) -> dict[str, ServedModel]:
    """The models of one run."""
    facts = opened.folder.read_as(opened.folder.findings, Findings)
    kind = run_kind(opened, facts.kind)
    arms = [arm for arm, about in ARMS.items() if not about.in_context and adapter_ready(opened.folder, arm)]
    constraint = None
    if kind.name in CONSTRAINTS:
        constraint = kept_constraint(opened.folder, kind)
    else:
        arms = [arm for arm in arms if not ARMS[arm].constrained]
    try:
        shots = run_shots(opened)
    except TellError as error:
        display.note(f"{name}: served without its fixed examples: {error}")
        shots = []
    decider = opened.decider(session)
    made = {}
    for arm in arms:
        generate = opened.config.generate
        made[f"{name}/{arm}"] = ServedModel(
            f"{name}/{arm}",
            name,
            arm,
            session,
            opened.adapter(arm),
            arm_anchor(arm, opened.anchor),
            shots,
            decider if ARMS[arm].decides else None,
            constraint if constrains(opened.config, arm) else None,
            generate,
            arm_config(opened.config, arm, opened.chosen).generate,
            opened.config.seed,
            generate.max_new_tokens or facts.answer_limit,
        )
    if f"{name}/tell" in made:
        made[name] = replace(made[f"{name}/tell"], name=name)
    return dict(sorted(made.items(), key=lambda item: item[0] != name))  # RUN first
