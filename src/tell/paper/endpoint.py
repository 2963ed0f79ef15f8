"""A teacher behind any OpenAI-compatible endpoint: retried, resumable, with its cost."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tell.errors import TellError, first_line
from tell.paper.halueval import HaluRow
from tell.paper.teacher import Prices, Progress, Thought, Usage, contradicts
from tell.shown import without_secrets

_SYSTEM = """\
You write training data for a hallucination detector. You are given a user's query, a chatbot's response, the label \
that human annotators gave it ("yes": the response contains a hallucination; "no": it does not) and, for "yes", the \
passages they marked. Write the analysis that leads to this label: one to three factual sentences that say what the \
query asked, then what is wrong in the marked passages, or what was checked and found sound. Do not mention the \
annotators. Answer with one JSON object and nothing else: \
{"thought": "<the analysis>", "hallucination": "yes" or "no"}."""
_GIVE_UP_AFTER = 20  # rows dropped without one kept: the endpoint cannot do the task, and continuing costs money
_Messages = list[dict[str, str]]
_Key = tuple[str, str, str]  # ID of the row, model, hash of the messages


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on requests to an endpoint.

    Attributes:
        concurrency: most requests in flight at once.
        attempts: most answers per row.
        retries: repetitions of one request after 429, 5xx or a lost connection.
        timeout: seconds for one request.
    """

    concurrency: int = 4
    attempts: int = 3
    retries: int = 6
    timeout: float = 120.0


class OpenAITeacher:
    """Asks a chat completions endpoint for each thought.

    After an answer that is not the JSON described, or that concludes against the human label, the request is
    repeated with the fault named; after `Limits.attempts` answers the row is dropped and counted. 429, 5xx
    and lost connections are retried by the client with exponential backoff, as Retry-After says. Every
    finished row is appended to the cache at once, under its ID, the model and a hash of the messages.

    Args:
        base_url: e.g. ``https://api.openai.com/v1`` or ``http://localhost:8000/v1``.
        model: the endpoint's name of the model.
        api_key: default ``$OPENAI_API_KEY``; endpoints without keys take any.
        limits: on requests, retries and time.
        prices: of tokens; without them only tokens are counted.
        temperature, max_tokens: sent along; left out where the endpoint refuses them. None: never sent.

    Raises:
        TellError: the package openai is not installed, a limit below 1, no key, or a base URL that is not one.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        api_key: str | None = None,
        *,
        limits: Limits | None = None,
        prices: Prices | None = None,
        temperature: float | None = 0.7,
        max_tokens: int | None = 600,
    ) -> None:
        self._limits = limits = limits or Limits()
        for name, value in (("concurrency", limits.concurrency), ("attempts", limits.attempts)):
            if value < 1:
                raise TellError(f"{name} is {value}", where="teacher", remedy="Set it to 1 or more.")
        key = api_key or os.environ.get("OPENAI_API_KEY")
        if not key and base_url is None:
            remedy = "Set OPENAI_API_KEY, or name a base URL that needs none."
            raise TellError("no API key is given", where="teacher", remedy=remedy)
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            what = f"base URL {without_secrets(base_url)!r} is not an http address"
            raise TellError(what, where="teacher", remedy="Write http://host:port/v1.")
        try:
            import openai  # importing it takes half a second
        except ImportError as error:
            remedy = 'pip install "tell-llm[teacher]"'
            raise TellError("openai is not installed", where="teacher", remedy=remedy) from error

        self.name = self._model = model
        self.usage: Usage = Usage(prices=prices or Prices())
        self._client = openai.OpenAI(
            base_url=base_url, api_key=key or "none", max_retries=limits.retries, timeout=limits.timeout
        )
        options = {"temperature": temperature, "max_tokens": max_tokens}
        self._options: dict[str, Any] = {"response_format": {"type": "json_object"}}
        self._options |= {name: value for name, value in options.items() if value is not None}
        self._key = key
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def write(self, rows: Sequence[HaluRow], *, cache: Path, progress: Progress | None = None) -> list[Thought]:
        """A thought for each row, in order; rows found in the cache are not requested again.

        Raises:
            TellError: the endpoint cannot be reached, refuses the key or model, keeps failing after all
                retries, or gives nothing usable. Finished rows stay in the cache.
        """
        self._stop.clear()
        stored = _Cache(cache)
        messages = [_messages(row) for row in rows]
        keys = [(row.id, self._model, _hash(sent)) for row, sent in zip(rows, messages, strict=True)]
        out = {i: stored.known[key] for i, key in enumerate(keys) if key in stored.known}
        self.usage.reused += len(out)
        if progress:
            progress(len(out), len(rows))
        if len(out) == len(rows):
            return [out[i] for i in range(len(rows))]
        kept, dropped = 0, 0
        with stored, ThreadPoolExecutor(self._limits.concurrency) as pool:
            asked = [i for i in range(len(rows)) if i not in out]
            waiting = {pool.submit(self._row, rows[i], messages[i], keys[i], stored): i for i in asked}
            try:
                for future in as_completed(waiting):
                    thought = out[waiting[future]] = future.result()
                    kept, dropped = kept + (thought.text is not None), dropped + (thought.text is None)
                    if progress:
                        progress(len(out), len(rows))
                    if dropped >= _GIVE_UP_AFTER and not kept:
                        what = f"none of the first {dropped} rows got a usable answer (the last: {thought.reason})"
                        remedy = "Use a stronger model, or --teacher offline."
                        raise TellError(what, where=f"teacher {self._model}", remedy=remedy)
            finally:  # on success nothing is left to cancel
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        return [out[i] for i in range(len(rows))]

    def _row(self, row: HaluRow, messages: _Messages, key: _Key, cache: _Cache) -> Thought:
        """The thought of the first answer that agrees with the label."""
        messages = list(messages)
        reason = ""
        for _ in range(self._limits.attempts):
            if self._stop.is_set():  # another row failed permanently: leave this one for the next run
                return Thought(None, "stopped")
            try:
                content = self._ask(messages)
            except _Refused as error:  # too long, or a content filter; costs nothing, so it is not kept
                return Thought(None, f"the endpoint rejects the request ({error})")
            text, reason = _judge(content, row)
            if text is not None:
                thought = Thought(text)
                break
            fault = f'This cannot be used: {reason}. The label is "{row.label}". Answer again.'
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": fault}]
        else:
            thought = Thought(None, f"{self._limits.attempts} answers, the last {reason}")
        cache.append(key, thought)
        return thought

    def _ask(self, messages: _Messages) -> str:
        """Content of one answer, its tokens counted."""
        import openai

        while True:
            options = dict(self._options)
            try:
                answer = self._client.chat.completions.create(model=self._model, messages=messages, **options)  # type: ignore[arg-type]
                break
            except openai.BadRequestError as error:
                if not self._do_without(options, error):
                    raise _Refused(self._message(error)) from error
            except (openai.OpenAIError, ValueError) as error:  # ValueError: no JSON where JSON was promised
                raise self._failure(error) from error
        choices = getattr(answer, "choices", 0)  # a page of HTML with status 200 is a text here
        if not isinstance(choices, list | None):
            remedy = "Check the base URL: it usually ends in /v1."
            raise TellError("does not answer like a chat completions endpoint", where=self._where, remedy=remedy)
        with self._lock:
            self.usage.answers += 1
            for count in ("prompt_tokens", "completion_tokens"):
                tokens = getattr(getattr(answer, "usage", None), count, None)
                if isinstance(tokens, int) and tokens > 0:
                    setattr(self.usage, count, getattr(self.usage, count) + tokens)
        return _content(choices[0]) if choices else ""

    @property
    def _where(self) -> str:
        return without_secrets(f"{self._client.base_url} ({self._model})", self._key)

    def _failure(self, error: Exception) -> TellError:
        """The error that ends the run; finished rows stay in the cache."""
        import openai

        cause: BaseException = error
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            what, remedy = "rejects the key", "Set OPENAI_API_KEY to a valid key."
        elif isinstance(error, openai.NotFoundError):
            what, remedy = "is not found", "Check the base URL (it usually ends in /v1) and the model's name."
        elif isinstance(error, openai.APIConnectionError):
            what, cause = "cannot be reached", error.__cause__ or error
            remedy = "Check the base URL, then run the same command again: finished rows are kept."
        else:
            what, remedy = "keeps failing", "Wait, then run the same command again: finished rows are kept."
        return TellError(f"{what} ({self._message(cause)})", where=self._where, remedy=remedy)

    def _message(self, error: BaseException) -> str:
        """The first line of the endpoint's message, without the key that it may repeat."""
        return without_secrets(first_line(error), self._key)[:200]

    def _do_without(self, sent: dict[str, Any], error: Exception) -> bool:
        """Drop the option that a 400 complains about; returns whether there was one."""
        text = str(error)
        for name in ("response_format", "temperature", "max_tokens"):
            if name in sent and name in text:
                with self._lock:
                    if (value := self._options.pop(name, None)) is not None and "max_completion_tokens" in text:
                        self._options["max_completion_tokens"] = value
                return True
        return False


class _Refused(Exception):
    """400 for one row."""


def _messages(row: HaluRow) -> _Messages:
    task = {"query": row.query, "response": row.response, "label": row.label, "marked_passages": list(row.spans)}
    return [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": json.dumps(task, ensure_ascii=False, indent=1)},
    ]


def _hash(messages: _Messages) -> str:
    text = json.dumps(messages, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _content(choice: object) -> str:
    """Text of an answer; of parts, as some servers send it, the texts; empty where there is none."""
    content = getattr(getattr(choice, "message", None), "content", None)
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else getattr(part, "text", None) for part in content]
        content = "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _judge(content: str, row: HaluRow) -> tuple[str | None, str]:
    """(thought, "") of a usable answer, or (None, what is wrong with it)."""
    text = content.strip()
    if text.startswith("```"):  # many models fence JSON despite instructions
        text = text.removeprefix("```json").strip("`").strip()
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None, "is not JSON"
    if not isinstance(answer, dict) or not isinstance(answer.get("thought"), str) or not answer["thought"].strip():
        return None, "has no thought"
    label = str(answer.get("hallucination")).strip().lower()
    if label != row.label:
        return None, f"has hallucination {label!r}, against the label"
    thought = " ".join(answer["thought"].split())
    if any("\ud800" <= char <= "\udfff" for char in thought):
        return None, "has half a character in its thought"
    if contradicts(thought, row.label):
        return None, "has a thought that concludes against the label"
    return thought, ""


class _Cache:
    """Finished rows on disk, one per line, by ID, model and hash of the messages.

    The file is opened for the first row that is added; the incomplete line of a killed run is skipped.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._file: TextIO | None = None
        self._before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        self.known: dict[_Key, Thought] = {}
        for line in self._before.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                self.known[row["id"], row["model"], row["messages"]] = Thought(row["thought"], row["reason"])

    def __enter__(self) -> _Cache:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, key: _Key, thought: Thought) -> None:
        row = {"id": key[0], "model": key[1], "messages": key[2], "thought": thought.text, "reason": thought.reason}
        with self._lock:
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = self._path.open("a", encoding="utf-8")
                    if self._before and not self._before.endswith("\n"):
                        self._file.write("\n")
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._file.flush()
            except OSError as error:
                remedy = "Free disk space or choose another folder with --out."
                what = f"cannot be written ({error.strerror or error})"
                raise TellError(what, where=str(self._path), remedy=remedy) from error
