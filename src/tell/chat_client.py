"""A client of OpenAI-compatible endpoints: retried, with errors in one line; and a cache of what was answered."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tell.errors import TellError, first_line
from tell.shown import without_secrets

Messages = Sequence[Mapping[str, Any]]
MOST_CHARACTERS = 1 << 20  # of an answer


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Attributes:
        base_url: e.g. ``https://api.openai.com/v1`` or ``http://localhost:8000/v1``; None: OpenAI's.
        model: the endpoint's name of the model.
        key: default: that of the environment variable ``key_name``; endpoints without keys take any.
        where: in error messages.
        extra: of tell-llm, which installs the client.
        retries: repetitions of one request after 429, 5xx or a lost connection, with exponential backoff, or as
            Retry-After says.
        timeout: seconds for one request.
    """

    base_url: str | None
    model: str
    key: str | None = field(default=None, repr=False)
    where: str = "teacher"
    extra: str = "teacher"
    key_name: str = "OPENAI_API_KEY"
    retries: int = 6
    timeout: float = 120.0


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer.

    Attributes:
        text: empty where there is none.
        finish: ``finish_reason`` of the endpoint; empty where it says none.
        prompt_tokens, completion_tokens: as the endpoint counted them; 0 where it did not.
    """

    text: str
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Refused(Exception):
    """The endpoint rejects one request (400): it is too long, or a content filter."""


class ChatClient:
    """Asks a chat completions endpoint. Several threads may ask at once.

    Args:
        options: sent along with each request; those that the endpoint refuses are left out from then on.

    Raises:
        TellError: the package openai is not installed, no key, or a base URL that is not one.
    """

    def __init__(self, endpoint: Endpoint, options: Mapping[str, Any]) -> None:
        self.endpoint, self.options = endpoint, dict(options)
        url, where = endpoint.base_url, endpoint.where
        key = endpoint.key or os.environ.get(endpoint.key_name)
        if not key and url is None:
            remedy = f"Set {endpoint.key_name}, or name a base URL that needs none."
            raise TellError("no API key is given", where=where, remedy=remedy)
        if url is not None and not url.startswith(("http://", "https://")):
            what = f"base URL {without_secrets(url)!r} is not an http address"
            raise TellError(what, where=where, remedy="Write http://host:port/v1.")
        try:
            import openai  # importing it takes half a second
        except ImportError as error:
            remedy = f'pip install "tell-llm[{endpoint.extra}]"'
            raise TellError("openai is not installed", where=where, remedy=remedy) from error
        self._client = openai.OpenAI(
            base_url=url, api_key=key or "none", max_retries=endpoint.retries, timeout=endpoint.timeout
        )
        self._key = key
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """The base URL, without a password."""
        return without_secrets(str(self._client.base_url), self._key).rstrip("/")

    @property
    def where(self) -> str:
        """Address and model, for messages."""
        return without_secrets(f"{self._client.base_url} ({self.endpoint.model})", self._key)

    def ask(self, messages: Messages) -> Completion:
        """The answer to a conversation.

        Raises:
            Refused: the endpoint rejects it; another may be answered.
            TellError: it cannot be reached, refuses the key or model, or keeps failing after all retries.
        """
        import openai

        while True:
            options = dict(self.options)
            try:
                answer = self._client.chat.completions.create(
                    model=self.endpoint.model,
                    messages=messages,  # type: ignore[arg-type]
                    **options,
                )
                break
            except openai.BadRequestError as error:
                if not self._do_without(options, error):
                    raise Refused(self._message(error)) from error
            except (openai.OpenAIError, ValueError) as error:  # ValueError: no JSON where JSON was promised
                raise self._failure(error) from error
        choices = getattr(answer, "choices", 0)  # a page of HTML with status 200 is a text here
        if not isinstance(choices, list | None):
            remedy = "Check the base URL: it usually ends in /v1."
            raise TellError("does not answer like a chat completions endpoint", where=self.where, remedy=remedy)
        prompt, new = (_count(answer, name) for name in ("prompt_tokens", "completion_tokens"))
        if not choices:
            return Completion("", "", prompt, new)
        finish = getattr(choices[0], "finish_reason", None)
        text = _content(choices[0])[:MOST_CHARACTERS]
        return Completion(text, finish if isinstance(finish, str) else "", prompt, new)

    def models(self) -> dict[str, dict[str, Any]]:
        """What ``/models`` lists, by name; empty where the endpoint has no list.

        Raises:
            TellError: it cannot be reached, or refuses the key.
        """
        import openai

        try:
            found = self._client.models.list().data
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.APIConnectionError) as error:
            raise self._failure(error) from error
        except (openai.OpenAIError, ValueError, AttributeError):  # no such path, or a page of HTML
            return {}
        return {m.id: m.model_dump() for m in found or [] if isinstance(getattr(m, "id", None), str)}

    def _failure(self, error: Exception) -> TellError:
        """The error that ends the work; what was answered before is kept."""
        import openai

        cause: BaseException = error
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            what, remedy = "rejects the key", f"Set {self.endpoint.key_name} to a valid key."
        elif isinstance(error, openai.NotFoundError):
            what, remedy = "is not found", "Check the base URL (it usually ends in /v1) and the model's name."
        elif isinstance(error, openai.APIConnectionError):
            what, cause = "cannot be reached", error.__cause__ or error
            remedy = "Check the base URL, then run the same command again: finished rows are kept."
        else:
            what, remedy = "keeps failing", "Wait, then run the same command again: finished rows are kept."
        return TellError(f"{what} ({self._message(cause)})", where=self.where, remedy=remedy)

    def _message(self, error: BaseException) -> str:
        """The first line of the endpoint's message, without the key that it may repeat."""
        return without_secrets(first_line(error), self._key)[:200]

    def _do_without(self, sent: dict[str, Any], error: Exception) -> bool:
        """Drop the option that a 400 names, ``max_tokens`` for its successor; returns whether there was one.

        The successor itself is never dropped: without a limit an answer may go on for ever.
        """
        text = str(error)
        for name in sent:
            if name == "max_completion_tokens" or not re.search(rf"\b{re.escape(name)}\b", text):
                continue
            with self._lock:
                value = self.options.pop(name, None)
                if name == "max_tokens" and value is not None and "max_completion_tokens" in text:
                    self.options["max_completion_tokens"] = value
            return True
        return False


def _count(answer: object, name: str) -> int:
    tokens = getattr(getattr(answer, "usage", None), name, None)
    return tokens if isinstance(tokens, int) and tokens > 0 else 0


def _content(choice: object) -> str:
    """Text of an answer; of parts, as some servers send it, the texts; empty where there is none."""
    content = getattr(getattr(choice, "message", None), "content", None)
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else getattr(part, "text", None) for part in content]
        content = "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def digest(*values: object) -> str:
    """16 hexadecimal digits over JSON values."""
    parts = (json.dumps(value, ensure_ascii=False) for value in values)
    return hashlib.blake2b("\x00".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class AnswerCache:
    """Answers on disk, a JSON object a line, so that a command that was stopped asks for none of them again.

    The file is opened for the first row that is added; the incomplete line of a killed command is skipped.

    Args:
        keys: the entries of a row that identify it.
        remedy: what to do where the file cannot be written.
    """

    def __init__(self, path: Path, keys: Sequence[str], *, remedy: str) -> None:
        self._path, self._keys, self._remedy, self._lock = path, tuple(keys), remedy, threading.Lock()
        self._file: TextIO | None = None
        self._before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        self.known: dict[tuple, dict[str, Any]] = {}
        for line in self._before.splitlines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                row = json.loads(line)
                self.known[tuple(row[key] for key in self._keys)] = row

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        """Write a row at once.

        Raises:
            TellError: the file cannot be written.
        """
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
                what = f"cannot be written ({error.strerror or error})"
                raise TellError(what, where=str(self._path), remedy=self._remedy) from error


async def stream_chat(address: str, model: str, messages: Messages) -> AsyncIterator[tuple[str, str]]:
    """Text of an answer as a local server sends it and, at the end, why it ended. Any of ``httpx.HTTPError`` may come.

    Raises:
        TellError: the server says why it does not answer.
    """
    import httpx  # of the extra serve

    body = {"model": model, "messages": messages, "stream": True}
    async with (
        httpx.AsyncClient(timeout=None, trust_env=False) as client,
        client.stream("POST", f"{address}/chat/completions", json=body) as reply,
    ):
        async for line in reply.aiter_lines():
            if line in ("", "data: [DONE]"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise TellError(str(event["error"]["message"]))
            for choice in event["choices"]:
                yield choice["delta"].get("content") or "", choice["finish_reason"] or ""
