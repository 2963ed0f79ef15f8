"""A teacher behind any OpenAI-compatible endpoint: retried, resumable, its cost counted."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tell.errors import TellError, first_line
from tell.paper.halueval import HaluRow
from tell.paper.teacher import Progress, Thought, Usage, contradicts
from tell.shown import without_secrets

_SYSTEM = """\
You write training data for a hallucination detector. You are given a user's query, a chatbot's response, the label \
that human annotators gave it ("yes": the response contains a hallucination; "no": it does not) and, for "yes", the \
passages they marked. Write the analysis that leads to this label: one to three factual sentences that say what the \
query asked, then what is wrong in the marked passages, or what was checked and found sound. Do not mention the \
annotators. Answer with one JSON object and nothing else: \
{"thought": "<the analysis>", "hallucination": "yes" or "no"}."""
_GIVE_UP_AFTER = 20  # rows dropped with not one kept: the endpoint cannot do it, and going on costs money
_Messages = list[dict[str, str]]


class OpenAITeacher:
    """Asks a chat completions endpoint for each thought.

    An answer that is not the JSON asked for, or comes to another conclusion than the people's label, is
    asked for again with the fault named; after `attempts` answers the row is dropped and counted. 429, 5xx
    and lost connections are retried by the client with exponential backoff, as Retry-After says. Every
    finished row is appended to the cache at once, under its ID, the model and a hash of the messages.

    Args:
        base_url: e.g. ``https://api.openai.com/v1`` or ``http://localhost:8000/v1``.
        model: the endpoint's name of the model.
        api_key: default ``$OPENAI_API_KEY``; endpoints without keys take any.
        concurrency: requests under way at most.
        attempts: answers asked for per row at most.
        retries: repetitions of one request after 429, 5xx or a lost connection.
        timeout: seconds for one request.
        temperature, max_tokens: sent along; left out where the endpoint refuses them. None: never sent.
        price_in, price_out: price of a million tokens in and out; without them only tokens are counted.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        api_key: str | None = None,
        *,
        concurrency: int = 4,
        attempts: int = 3,
        retries: int = 6,
        timeout: float = 120.0,
        temperature: float | None = 0.7,
        max_tokens: int | None = 600,
        price_in: float | None = None,
        price_out: float | None = None,
    ) -> None:
        import openai  # half a second, so only where it is used

        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            if value < 1:
                raise TellError(f"{name} is {value}", where="teacher", remedy="Set it to 1 or more.")
        key = api_key or os.environ.get("OPENAI_API_KEY")
        if not key and base_url is None:
            raise TellError(
                "no API key is given", where="teacher", remedy="Set OPENAI_API_KEY, or name a base URL that needs none."
            )
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise TellError(
                f"base URL {without_secrets(base_url)!r} is no http address",
                where="teacher",
                remedy="Write http://host:port/v1.",
            )
        self.name = model
        self.usage = Usage(price_in=price_in, price_out=price_out)
        self._client = openai.OpenAI(base_url=base_url, api_key=key or "none", max_retries=retries, timeout=timeout)
        self._model, self._concurrency, self._attempts = model, concurrency, attempts
        self._options: dict[str, Any] = {"response_format": {"type": "json_object"}}
        if temperature is not None:
            self._options["temperature"] = temperature
        if max_tokens is not None:
            self._options["max_tokens"] = max_tokens
        self._key = key
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def write(self, rows: Sequence[HaluRow], *, cache: Path, progress: Progress | None = None) -> list[Thought]:
        """A thought for each row, in order; rows found in the cache are not asked again.

        Raises:
            TellError: the endpoint cannot be reached, refuses the key or model, keeps failing after all
                retries, or gives nothing usable. Finished rows stay in the cache.
        """
        self._stop.clear()
        known = _read_cache(cache)
        messages = [_messages(row) for row in rows]
        keys = [(row.id, self._model, _hash(asked)) for row, asked in zip(rows, messages, strict=True)]
        out: dict[int, Thought] = {i: known[key] for i, key in enumerate(keys) if key in known}
        self.usage.reused += len(out)
        if progress:
            progress(len(out), len(rows))
        if len(out) == len(rows):
            return [out[i] for i in range(len(rows))]
        kept, dropped = 0, 0
        with _Appender(cache) as appender, ThreadPoolExecutor(self._concurrency) as pool:
            waiting: dict[Future[Thought], int] = {
                pool.submit(self._row, rows[i], messages[i], keys[i], appender): i
                for i in range(len(rows))
                if i not in out
            }
            try:
                for future in as_completed(waiting):
                    thought = out[waiting[future]] = future.result()
                    kept, dropped = kept + (thought.text is not None), dropped + (thought.text is None)
                    if progress:
                        progress(len(out), len(rows))
                    if dropped >= _GIVE_UP_AFTER and not kept:
                        raise TellError(
                            f"none of the first {dropped} rows got a usable answer (the last: {thought.reason})",
                            where=f"teacher {self._model}",
                            remedy="Use a stronger model, or --teacher offline.",
                        )
            finally:  # on success nothing is left to cancel
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        return [out[i] for i in range(len(rows))]

    def _row(self, row: HaluRow, messages: _Messages, key: tuple[str, str, str], appender: _Appender) -> Thought:
        """Ask until an answer agrees with the label, then keep it."""
        messages = list(messages)
        reason = ""
        for _ in range(self._attempts):
            if self._stop.is_set():  # another row failed for good: this one is left for the next run
                return Thought(None, "stopped")
            try:
                content = self._ask(messages)
            except _Refused as error:  # too long, or a content filter; costs nothing, so it is not kept
                return Thought(None, f"the endpoint refuses the request ({error})")
            text, reason = _judge(content, row)
            if text is not None:
                thought = Thought(text)
                break
            messages += [
                {"role": "assistant", "content": content},
                {
                    "role": "user",
                    "content": f'This cannot be used: {reason}. The label is "{row.label}". Answer again.',
                },
            ]
        else:
            thought = Thought(None, f"{self._attempts} answers, the last {reason}")
        appender.append(key, thought)
        return thought

    def _ask(self, messages: _Messages) -> str:
        """Content of one answer, its tokens counted."""
        import openai

        where = without_secrets(f"{self._client.base_url} ({self._model})", self._key)
        while True:
            options = dict(self._options)
            try:
                answer = self._client.chat.completions.create(model=self._model, messages=messages, **options)  # type: ignore[arg-type]
                break
            except openai.BadRequestError as error:
                if not self._do_without(options, error):
                    raise _Refused(self._message(error)) from error
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise TellError(
                    f"refuses the key ({self._message(error)})",
                    where=where,
                    remedy="Set OPENAI_API_KEY to a valid key.",
                ) from error
            except openai.NotFoundError as error:
                raise TellError(
                    f"is not found ({self._message(error)})",
                    where=where,
                    remedy="Check the base URL (it mostly ends in /v1) and the model's name.",
                ) from error
            except openai.APIConnectionError as error:
                raise TellError(
                    f"cannot be reached ({self._message(error.__cause__ or error)})",
                    where=where,
                    remedy="Check the base URL, then run the same command again: finished rows are kept.",
                ) from error
            except (openai.OpenAIError, ValueError) as error:  # ValueError: no JSON where JSON was promised
                raise TellError(
                    f"keeps failing ({self._message(error)})",
                    where=where,
                    remedy="Wait, then run the same command again: finished rows are kept.",
                ) from error
        choices = getattr(answer, "choices", 0)  # a page of HTML with status 200 is a text here
        if not isinstance(choices, list | None):
            raise TellError(
                "does not answer as a chat completions endpoint does",
                where=where,
                remedy="Check the base URL: it mostly ends in /v1.",
            )
        with self._lock:
            self.usage.answers += 1
            for count in ("prompt_tokens", "completion_tokens"):
                tokens = getattr(getattr(answer, "usage", None), count, None)
                if isinstance(tokens, int) and tokens > 0:
                    setattr(self.usage, count, getattr(self.usage, count) + tokens)
        return _content(choices[0]) if choices else ""

    def _message(self, error: BaseException) -> str:
        """The first line of what the endpoint said, without the key that it may repeat."""
        return without_secrets(first_line(error), self._key)[:200]

    def _do_without(self, sent: dict[str, Any], error: Exception) -> bool:
        """Leave out the option that a 400 complains of; whether there was one."""
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


def _content(choice: Any) -> str:
    """Text of an answer; of parts, as some servers send it, the texts; empty where there is none."""
    content = getattr(getattr(choice, "message", None), "content", None)
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else getattr(part, "text", None) for part in content]
        content = "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _judge(content: str, row: HaluRow) -> tuple[str | None, str]:
    """(thought, "") of a usable answer, or (None, what is wrong with it)."""
    text = content.strip()
    if text.startswith("```"):  # many models fence JSON whatever they are told
        text = text.removeprefix("```json").strip("`").strip()
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None, "is no JSON"
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


class _Appender:
    """Appends finished rows to the cache, a line at a time, opened with the first of them."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._file = path, threading.Lock(), None

    def __enter__(self) -> _Appender:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, key: tuple[str, str, str], thought: Thought) -> None:
        row = {"id": key[0], "model": key[1], "messages": key[2], "thought": thought.text, "reason": thought.reason}
        with self._lock:
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    before = self._path.read_bytes() if self._path.exists() else b""
                    self._file = self._path.open("a", encoding="utf-8")
                    if before and not before.endswith(b"\n"):  # the torn line of a killed run
                        self._file.write("\n")
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._file.flush()
            except OSError as error:
                raise TellError(
                    f"cannot be written ({error.strerror or error})",
                    where=str(self._path),
                    remedy="Free disk space or choose another folder with --out.",
                ) from error


def _read_cache(path: Path) -> dict[tuple[str, str, str], Thought]:
    """Finished rows of earlier runs; the torn line of a killed one is skipped."""
    known: dict[tuple[str, str, str], Thought] = {}
    if not path.exists():
        return known
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            known[row["id"], row["model"], row["messages"]] = Thought(row["thought"], row["reason"])
        except (ValueError, KeyError, TypeError):
            continue
    return known
