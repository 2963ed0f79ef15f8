"""The OpenAI-compatible HTTP interface: chat completions, models, health."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tell.serve.chat_request import (
    BAD,
    BAD_METHOD,
    FAILED,
    MOST_BODY,
    NO_JSON,
    NO_MODEL,
    NO_PATH,
    NO_TOKEN,
    STOPPING,
    TOO_LARGE,
    TOO_MANY,
    ApiError,
    ChatRequest,
    parse_request,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

RETRY_AFTER = 2  # seconds that a client waits after 429


class AnswerStream(Protocol):
    """An answer as it comes: `tell.serve.reply.Reply`, or that of another engine."""

    finish: str

    def pieces(self) -> AsyncIterator[str]: ...

    async def whole(self) -> str: ...

    def leave(self) -> None: ...

    @property
    def usage(self) -> dict[str, int]: ...


class Answerer(Protocol):
    """What answers the requests of a server."""

    @property
    def stopping(self) -> bool: ...

    def cards(self) -> Mapping[str, dict[str, object]]:
        """The models by name, each with what ``/v1/models`` says of it."""
        ...

    async def answer(self, request: ChatRequest) -> AnswerStream:
        """Begin to answer a request for one of the models.

        Raises:
            ApiError: it cannot be answered.
        """
        ...


class Gate:
    """Refuses requests for another host, which a web page may send here (DNS rebinding), and without the token.

    Args:
        hosts: names in the Host header that are this server; None: any.
        token: that all requests but those of health carry; None: none.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, token: str | None) -> None:
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._fault(Request(scope)) if scope["type"] == "http" else None
        await (self.app if error is None else _respond(error))(scope, receive, send)

    def _fault(self, request: Request) -> ApiError | None:
        if self.hosts is not None:
            host = None
            with suppress(ValueError):
                host = urlsplit(f"//{request.headers.get('host', '')}").hostname
            if host not in self.hosts:
                return ApiError(BAD, f"this server is {' or '.join(sorted(self.hosts))}, not {host}")
        if self.token is None or request.scope["path"] == "/health":  # not `url`, which begins with the Host header
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode()):
            return None
        return ApiError(NO_TOKEN, "the token is missing or wrong; send it as the API key (Authorization: Bearer TOKEN)")


def _respond(error: ApiError) -> Response:
    headers = {"retry-after": str(RETRY_AFTER)} if error.refusal == TOO_MANY else {}
    if error.refusal == NO_TOKEN:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body, error.refusal.status, headers)


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page can send other kinds without asking (CSRF)
        raise ApiError(NO_JSON, "the content type is not application/json")
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        if (size := size + len(part)) > MOST_BODY:
            raise ApiError(TOO_LARGE, f"the body has more than {MOST_BODY:,} bytes")
    return b"".join(parts)


def make_app(answerer: Answerer, *, hosts: frozenset[str] | None, token: str | None) -> Starlette:
    """The application.

    Args:
        hosts, token: as of `Gate`.
    """
    started = int(time.time())

    def entry(name: str, card: Mapping[str, object]) -> dict[str, object]:
        return {"id": name, "object": "model", "created": started, "owned_by": "tell", **card}

    def find(name: str) -> Mapping[str, object]:
        cards = answerer.cards()
        if name not in cards:
            raise ApiError(NO_MODEL, f"there is no model {name!r}; the models are {', '.join(cards)}", "model")
        return cards[name]

    async def health(_: Request) -> Response:
        if answerer.stopping:
            return JSONResponse({"status": "stopping"}, STOPPING.status)
        return JSONResponse({"status": "ok"})

    async def models(_: Request) -> Response:
        data = [entry(name, card) for name, card in answerer.cards().items()]
        return JSONResponse({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(entry(name, find(name)))

    async def complete(request: Request) -> Response:
        if answerer.stopping:
            raise ApiError(STOPPING, "the server is stopping")
        asked = await run_in_threadpool(parse_request, await _body(request))
        find(asked.model)
        answer = await answerer.answer(asked)
        if asked.stream:
            return StreamingResponse(_events(asked, answer), media_type="text/event-stream", headers=NOT_KEPT)
        text = await _unless_gone(request, answer)
        if text is None:
            return Response(status_code=499)  # nobody reads it
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": answer.finish}
        body = {**_head(asked, "chat.completion"), "choices": [{**choice, "logprobs": None}], "usage": answer.usage}
        return JSONResponse(body)

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", complete, methods=["POST"]),
    ]
    handlers: dict[Any, Callable[[Request, Any], Any]] = {ApiError: _refused, HTTPException: _no_route, 500: _failed}
    return Starlette(routes=routes, middleware=[Middleware(Gate, hosts, token)], exception_handlers=handlers)


NOT_KEPT = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second: nginx passes events on at once


async def _refused(_: Request, error: ApiError) -> Response:
    return _respond(error)


async def _no_route(request: Request, error: HTTPException) -> Response:
    kinds = {404: (NO_PATH, f"there is no {request.scope['path']}"), 405: (BAD_METHOD, f"not for {request.method}")}
    refusal, what = kinds.get(error.status_code, (FAILED, error.detail))
    return _respond(ApiError(refusal, what))


async def _failed(_: Request, error: Exception) -> Response:
    return _respond(ApiError(FAILED, f"unexpected {type(error).__name__}"))


def _head(asked: ChatRequest, kind: str) -> dict[str, object]:
    made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}
    return {**made, "system_fingerprint": None}


async def _unless_gone(request: Request, answer: AnswerStream) -> str | None:
    """The whole answer; None where the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    whole, left = asyncio.ensure_future(answer.whole()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({whole, left}, return_when=asyncio.FIRST_COMPLETED)
        return await whole if whole.done() else None
    finally:
        answer.leave()
        for task in (whole, left):
            task.cancel()


async def _events(asked: ChatRequest, answer: AnswerStream) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer."""
    head = _head(asked, "chat.completion.chunk")
    usage = {"usage": None} if asked.stream_options.include_usage else {}

    def event(choices: list[dict], **more: object) -> str:
        return f"data: {json.dumps({**head, 'choices': choices, **usage, **more}, ensure_ascii=False)}\n\n"

    def choice(delta: dict[str, str], finish: str | None = None) -> list[dict]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]

    try:
        yield event(choice({"role": "assistant", "content": ""}))
        async for piece in answer.pieces():
            yield event(choice({"content": piece}))
        yield event(choice({}, answer.finish))
        if usage:
            yield event([], usage=answer.usage)
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status has been sent
        yield f"data: {json.dumps(error.body)}\n\n"
    finally:
        answer.leave()
