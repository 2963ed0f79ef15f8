"""`tell eval --endpoint`: a model behind an OpenAI-compatible server, scored on a run's test rows next to its arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tell.anchor.anchor import NO_ANCHOR
from tell.chat_client import AnswerCache, ChatClient, Completion, Endpoint, Messages, Refused, digest
from tell.config import Config
from tell.config_sections import GenerateConfig
from tell.data.example import Example
from tell.data.kind import misfits
from tell.data.subset import take_rows
from tell.errors import TellError
from tell.files import read_jsonl, write_jsonl
from tell.progress import Display, Silent
from tell.run.answer_loss import answer_loss_metric, kept_answer_losses
from tell.run.answers import arm_numbers, score_rows, scorer_of, shown_turns
from tell.run.claim import Trust, check_trust
from tell.run.measure import label_parts
from tell.score.scored import Metric, Scorer, primary_of
from tell.shown import brief, one_line
from tell.verbs.evaluate import KEPT, Findings, Metrics, changed_config, run_examples, run_kind
from tell.verbs.open_run import OpenRun, open_run

ENDPOINT = "endpoint"
"""The arm of the server's answers."""
ROOMIER = 2  # times as many tokens for a foreign model: another tokenizer may write an answer in more of them
MOST_NAMES = 10  # of models in a message


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server and how it is asked.

    Attributes:
        url: e.g. ``http://localhost:8000/v1``.
        model: its name of the model; None: the only one that it lists, or the run's own name.
        anchored: whether the anchor is put on the prompts; None: unless the server is `tell serve`, which does so.
            Where it is False, the fixed examples are left out too: the model's own template may have both.
        key_name: the environment variable of the API key.
        concurrency: requests at once.
        retries: of a request, as of `Endpoint`.
        fresh: ask again for what an earlier command was answered.
        arms: of the run, to compare with; None: all that it has answers of.
    """

    url: str
    model: str | None = None
    anchored: bool | None = None
    key_name: str = "OPENAI_API_KEY"
    concurrency: int = 16
    retries: int = 6
    fresh: bool = False
    arms: Sequence[str] | None = None


def evaluate_endpoint(
    run: str | Path,
    server: Server,
    *,
    test: str | None = None,
    rows: int | None = None,
    overrides: Sequence[str] = (),
    trust: Trust = Trust(),  # noqa: B008  (frozen)
    display: Display | None = None,
) -> dict:
    """Scores of a server's answers next to those of the run's arms, in the shape of metrics.json.

    The arms' answers are those that the run recorded: no model is loaded.

    Args:
        run: a run folder.
        test, rows, overrides, trust, display: as of `tell.verbs.evaluate.evaluate`.

    Returns:
        As `evaluate`; the server's arm is ``endpoint``. Its answers go to ``predictions/eval/endpoint.jsonl``.

    Raises:
        TellError: no run, rows that are gone, or the server cannot be reached, rejects the key, or keeps failing.
    """
    display = display or Silent()
    opened = open_run(run, trust_remote_code=trust.code)
    check_trust(opened.folder, opened.config, code=trust.code, scorer=trust.scorer)
    config, seed = changed_config(opened, overrides)
    for key in ("closed", "constrain"):
        if getattr(config.generate, key) != getattr(opened.config.generate, key):
            what = "has no effect on a server, which decides for itself"
            raise TellError(what, where=f"generate.{key}", remedy="Leave it out, or name the model of another arm.")
    opened.folder.read_as(opened.folder.metrics, Metrics)
    metrics = opened.folder.read(opened.folder.metrics)
    facts = opened.folder.read_as(opened.folder.findings, Findings)
    _, examples, shots = run_examples(opened, test, display, need_train=False)
    if rows is not None and rows < len(examples):
        examples = [examples[i] for i in sorted(take_rows(len(examples), rows, seed))]
    kind = run_kind(opened, facts.kind)
    if said := misfits(kind, examples):
        display.note(said)
    scorer = scorer_of(config, kind)
    recorded = _recorded(opened, server.arms, examples, list(metrics.get("arms") or {}))
    questions = _Questions.of(opened, server, config, display)
    limit = config.generate.max_new_tokens or facts.answer_limit
    answered = questions.ask(examples, shots, limit, seed, display)
    answers = {**recorded, ENDPOINT: answered}
    scored = {arm: _score(scorer, found, config) for arm, found in answers.items()}
    write_jsonl(opened.folder.evaluated(ENDPOINT), answered)
    values, gaps = arm_numbers(scored, seed=seed, samples=config.eval.bootstrap)
    drawn = config.model_copy(update={"seed": seed})
    return {
        "task": {"kind": facts.kind.name, "primary": primary_of(scorer, scored.values())},
        "arms": values,
        "differences": gaps,
        "eval": {"arms": {ENDPOINT: {key: sum(row[key] for row in answered) for key in ("prompt_tokens", "tokens")}}},
        **label_parts(answers, scored, drawn, kind),
        **{key: metrics.get(key) for key in KEPT},
        ENDPOINT: questions.about,
    }


def _sampling(rule: GenerateConfig, knows_all: bool) -> dict[str, float]:
    """The sampler as a request says it; with what is not part of OpenAI's API where the server knows that."""
    said: dict[str, float] = {"temperature": 0.0} if rule.greedy else {"temperature": rule.temperature}
    more: dict[str, float] = {"repetition_penalty": rule.repetition_penalty} if rule.repetition_penalty != 1 else {}
    if not rule.greedy:
        said["top_p"] = rule.top_p
        more |= {"top_k": rule.top_k} if rule.top_k else {}
    return said | (more if knows_all else {})


def _score(scorer: Scorer, rows: list[dict], config: Config) -> dict[str, Metric]:
    """Metrics of an arm's rows, with the answer losses that the run measured."""
    losses = kept_answer_losses(rows) if config.eval.answer_loss else None
    return score_rows(scorer, rows, None if losses is None else answer_loss_metric(losses))


def _recorded(
    opened: OpenRun, wanted: Sequence[str] | None, examples: Sequence[Example], arms: Sequence[str]
) -> dict[str, list[dict]]:
    """The run's own answers of each arm to the test rows.

    Raises:
        TellError: an arm that is asked for has none.
    """
    found = {}
    for arm in wanted or arms:
        path = opened.folder.prediction(arm)
        rows = {row["hash"]: row for row in read_jsonl(path)} if path.exists() else {}
        if all(example.hash in rows for example in examples):
            found[arm] = [rows[example.hash] for example in examples]
        elif wanted:
            what = f"the run has no answers of the arm {arm} to all of these rows"
            remedy = "Choose others, or score it by `tell eval` without --endpoint."
            raise TellError(what, where="--arms", remedy=remedy)
    return found


@dataclass(frozen=True)
class _Questions:
    """Asks a server the questions of test rows.

    Attributes:
        client: of the server and model.
        card: what the server says of the model; empty where it lists none.
        applies: whether the server is `tell serve`, and puts anchor and fixed examples on prompts itself.
        said: sampling that is sent along.
    """

    opened: OpenRun
    server: Server
    client: ChatClient
    card: dict[str, Any]
    anchored: bool
    said: dict[str, Any]

    @property
    def applies(self) -> bool:
        return isinstance(self.card.get("tell"), dict)

    @property
    def shows(self) -> bool:
        """Whether the fixed examples are put before the prompts."""
        return not self.applies and self.server.anchored is not False

    @property
    def about(self) -> dict[str, Any]:
        """``endpoint`` of the scores."""
        anchor = "prompts" if self.anchored else "server" if self._server_anchors else "none"
        return {"url": self.client.address, "model": self.client.endpoint.model, "anchor": anchor}

    @property
    def _server_anchors(self) -> bool:
        return self.applies and bool(self.card["tell"].get("anchor"))

    @classmethod
    def of(cls, opened: OpenRun, server: Server, config: Config, display: Display) -> _Questions:
        endpoint = Endpoint(
            server.url,
            server.model or "",
            where="--endpoint",
            extra="serve",
            key_name=server.key_name,
            retries=server.retries,
        )
        listed = ChatClient(endpoint, {}).models()
        model = server.model or _only(listed, opened.folder.root.resolve().name)
        card = listed.get(model, {})
        applies = isinstance(card.get("tell"), dict)
        own = applies and card["tell"].get("run") == opened.folder.root.resolve().name
        said = {} if own and config.generate == opened.config.generate else _sampling(config.generate, applies)
        if not applies and (lost := _sampling(config.generate, True).keys() - said.keys()):
            display.note(f"not sent, since only `tell serve` knows them: {', '.join(sorted(lost))}")
        anchored = (not applies if server.anchored is None else server.anchored) and bool(opened.anchor)
        made = cls(opened, server, ChatClient(replace(endpoint, model=model), {}), card, anchored, said)
        told = {"prompts": "the anchor is in the prompts", "server": "the server puts the anchor on the prompts itself"}
        display.note(
            f"endpoint: {one_line(model)} at {made.about['url']}; {told.get(made.about['anchor'], 'no anchor')}"
        )
        return made

    def messages(self, example: Example, shots: Sequence[Example]) -> Messages:
        """The conversation of a test row as the server gets it."""
        shown = shown_turns(example, shots) if self.shows else list(example.prompt)
        turns = (self.opened.anchor if self.anchored else NO_ANCHOR).apply(shown)
        if any(turn.extra or turn.tools for turn in turns):
            remedy = "Score rows without tools, by --test."
            raise TellError("has tools, which are not sent to an endpoint", where=example.origin, remedy=remedy)
        return [turn.to_dict() for turn in turns]

    def ask(
        self, examples: Sequence[Example], shots: Sequence[Example], limit: int, seed: int, display: Display
    ) -> list[dict]:
        """Rows of predictions: the server's answers, those of an earlier command reused."""
        self.client.options = {**self.said, "max_tokens": limit if self.applies else ROOMIER * limit}
        if not self.applies or seed != self.opened.config.seed:
            self.client.options["seed"] = seed
        if shots and self.shows:
            display.note(
                "the fixed examples are in the prompts (--no-anchor leaves anchor and examples to the server: a model "
                "by `tell export` adds its examples itself, and would show them twice)"
            )
        sent = dict(self.client.options)
        asked = [self.messages(example, shots) for example in examples]
        # a server of ours may have another model under the same name after a new start
        version = self.card.get("created") if self.applies else None
        keys = [(digest(self.client.address, self.client.endpoint.model, version, sent, turns),) for turns in asked]
        remedy = "Free disk space, then run the same command again: finished rows are kept."
        with AnswerCache(self.opened.folder.endpoint_answers, ("request",), remedy=remedy) as cache:
            known = {} if self.server.fresh else {key: kept for key in keys if (kept := _kept(cache.known.get(key)))}
            todo = {key: turns for key, turns in zip(keys, asked, strict=True) if key not in known}
            if known:
                display.note(f"{len(known):,} answers of an earlier command are reused (--fresh asks again)")
            refused: list[str] = []

            def one(key: tuple[str]) -> Completion | None:
                try:
                    answer = self.client.ask(todo[key])
                except Refused as error:
                    refused.append(str(error))
                    return None
                cache.append({"request": key[0], "model": self.client.endpoint.model, **_row(answer)})
                return answer

            with display.bar(f"ask {one_line(self.client.endpoint.model, 60)}", len(todo), "answers") as advance:
                known |= _at_once(one, list(todo), self.server.concurrency, advance)
        answers = [known.get(key) or Completion("", "refused") for key in keys]
        self._note(answers, refused, sent, display)
        return [
            {
                "hash": example.hash,
                "origin": example.origin,
                "prompt": example.question,
                "reference": example.answer,
                "answer": answer.text,
                "finish": answer.finish,
                "tokens": answer.completion_tokens,
                "prompt_tokens": answer.prompt_tokens,
            }
            for example, answer in zip(examples, answers, strict=True)
        ]

    def _note(
        self, answers: Sequence[Completion], refused: Sequence[str], sent: dict[str, Any], display: Display
    ) -> None:
        """Say what was refused, cut or left out.

        Raises:
            TellError: nothing was answered.
        """
        rejected = sum(answer.finish == "refused" for answer in answers)
        why = brief(refused[0], 200) if refused else ""
        if rejected == len(answers):
            remedy = "Check the model's name, and that its context is long enough."
            raise TellError(f"rejects every request ({why})", where=self.client.where, remedy=remedy)
        if rejected:
            display.note(f"{rejected:,} of {len(answers):,} prompts are rejected and count as wrong (the first: {why})")
        renamed = {"max_tokens"} & set(sent) if "max_completion_tokens" in self.client.options else set()
        dropped = set(sent) - set(self.client.options) - renamed
        if cut := sum(answer.finish == "length" for answer in answers):
            most = "server's limit" if "max_tokens" in dropped else f"limit of {sent['max_tokens']:,} tokens"
            more = "--set generate.max_new_tokens=N raises it"
            display.note(f"{cut:,} of {len(answers):,} answers are cut at the {most}; {more}")
        if dropped:
            display.note(f"the endpoint takes no {', '.join(sorted(dropped))}, so its own setting is used")


def _only(listed: dict[str, Any], run: str) -> str:
    """The model that is asked for where none is named.

    Raises:
        TellError: the server lists none, or several.
    """
    if run in listed and isinstance(listed[run].get("tell"), dict):
        return run
    if len(listed) == 1:
        return next(iter(listed))
    names = ", ".join(brief(name, 60) for name in list(listed)[:MOST_NAMES]) + (", ..." * (len(listed) > MOST_NAMES))
    what = f"the server has {len(listed):,} models ({names})" if listed else "the server does not list its models"
    raise TellError(what, where="--endpoint", remedy="Name one with --model.")


def _row(answer: Completion) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.completion_tokens,
    }


def _kept(row: dict[str, Any] | None) -> Completion | None:
    """An answer in the cache; None where there is none, or a damaged one."""
    kinds = {"answer": str, "finish": str, "prompt_tokens": int, "tokens": int}
    if row is None or not all(type(row.get(key)) is kind for key, kind in kinds.items()):
        return None
    return Completion(row["answer"], row["finish"], row["prompt_tokens"], row["tokens"])


def _at_once(
    one: Callable[[tuple[str]], Completion | None],
    keys: Sequence[tuple[str]],
    concurrency: int,
    advance: Callable[..., None],
) -> dict[tuple[str], Completion]:
    """The answers of several requests at a time; the first that fails for good ends all."""
    found = {}
    with ThreadPoolExecutor(max(1, concurrency)) as pool:
        waiting = {pool.submit(one, key): key for key in keys}
        try:
            for future in as_completed(waiting):
                if (answer := future.result()) is not None:
                    found[waiting[future]] = answer
                advance(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return found
