"""A teacher behind any OpenAI-compatible endpoint: retried, resumable, with its cost."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tell.chat_client import AnswerCache, ChatClient, Endpoint, Refused, digest
from tell.errors import TellError
from tell.paper.halueval import HaluRow
from tell.paper.teacher import Prices, Progress, Thought, Usage, contradicts

_SYSTEM = """\
You write training data for a hallucination detector. You are given a user's query, a chatbot's response, the label \
that human annotators gave it ("yes": the response contains a hallucination; "no": it does not) and, for "yes", the \
passages they marked. Write the analysis that leads to this label: one to three factual sentences that say what the \
query asked, then what is wrong in the marked passages, or what was checked and found sound. Do not mention the \
annotators. Answer with one JSON object and nothing else: \
{"thought": "<the analysis>", "hallucination": "yes" or "no"}."""
_GIVE_UP_AFTER = 20  # rows dropped without one kept: the endpoint cannot do the task, and continuing costs money
_Messages = list[dict[str, str]]
_KEY = ("id", "model", "messages")  # of a row in the cache; the last is a hash


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
        given = {"temperature": temperature, "max_tokens": max_tokens}
        options: dict[str, Any] = {"response_format": {"type": "json_object"}}
        options |= {name: value for name, value in given.items() if value is not None}
        endpoint = Endpoint(base_url, model, api_key, retries=limits.retries, timeout=limits.timeout)
        self.name = self._model = model
        self.usage: Usage = Usage(prices=prices or Prices())
        self._client = ChatClient(endpoint, options)
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def write(self, rows: Sequence[HaluRow], *, cache: Path, progress: Progress | None = None) -> list[Thought]:
        """A thought for each row, in order; rows found in the cache are not requested again.

        Raises:
            TellError: the endpoint cannot be reached, refuses the key or model, keeps failing after all
                retries, or gives nothing usable. Finished rows stay in the cache.
        """
        self._stop.clear()
        stored = AnswerCache(cache, _KEY, remedy="Free disk space or choose another folder with --out.")
        messages = [_messages(row) for row in rows]
        keys = [(row.id, self._model, digest(sent)) for row, sent in zip(rows, messages, strict=True)]
        found = {i: stored.known[key] for i, key in enumerate(keys) if key in stored.known}
        out = {
            i: Thought(row["thought"], row["reason"]) for i, row in found.items() if {"thought", "reason"} <= set(row)
        }
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

    def _row(self, row: HaluRow, messages: _Messages, key: tuple[str, str, str], cache: AnswerCache) -> Thought:
        """The thought of the first answer that agrees with the label."""
        messages = list(messages)
        reason = ""
        for _ in range(self._limits.attempts):
            if self._stop.is_set():  # another row failed permanently: leave this one for the next run
                return Thought(None, "stopped")
            try:
                content = self._ask(messages)
            except Refused as error:  # too long, or a content filter; costs nothing, so it is not kept
                return Thought(None, f"the endpoint rejects the request ({error})")
            text, reason = _judge(content, row)
            if text is not None:
                thought = Thought(text)
                break
            fault = f'This cannot be used: {reason}. The label is "{row.label}". Answer again.'
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": fault}]
        else:
            thought = Thought(None, f"{self._limits.attempts} answers, the last {reason}")
        cache.append(dict(zip(_KEY, key, strict=True)) | {"thought": thought.text, "reason": thought.reason})
        return thought

    def _ask(self, messages: _Messages) -> str:
        """Content of one answer, its tokens counted."""
        answer = self._client.ask(messages)
        with self._lock:
            self.usage.answers += 1
            self.usage.prompt_tokens += answer.prompt_tokens
            self.usage.completion_tokens += answer.completion_tokens
        return answer.text


def _messages(row: HaluRow) -> _Messages:
    task = {"query": row.query, "response": row.response, "label": row.label, "marked_passages": list(row.spans)}
    return [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": json.dumps(task, ensure_ascii=False, indent=1)},
    ]


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
