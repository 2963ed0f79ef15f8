"""`tell serve`: opens the models, binds the port, serves until a signal asks it to stop."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.concurrency import run_in_threadpool

from tell.decode.answer_text import AnswerText
from tell.progress import Display
from tell.serve.chat_request import ChatRequest
from tell.serve.decode_thread import DecodeThread, Job
from tell.serve.gguf_answers import GgufAnswers
from tell.serve.http_app import Answerer, AnswerStream, make_app
from tell.serve.listen import LOCAL, bind, is_local
from tell.serve.reply import Reply
from tell.serve.served_models import ServedModel, open_models
from tell.verbs.open_run import open_run

MOST_CONNECTIONS = 1024


class Stoppable(Answerer, Protocol):
    """Answers requests until it is told to stop."""

    def close(self, done: Callable[[], object]) -> None:
        """Take no more requests; call ``done`` once all are answered."""
        ...

    def free(self) -> None:
        """Free the model."""
        ...


class OwnAnswerer:
    """Answers by TELL's own engine."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.models, self.thread = models, DecodeThread()

    @property
    def stopping(self) -> bool:
        return self.thread.stopping

    def cards(self) -> dict[str, dict[str, object]]:
        return {name: model.card for name, model in self.models.items()}

    async def answer(self, request: ChatRequest) -> AnswerStream:
        model = self.models[request.model]
        prepared = await run_in_threadpool(model.prepare, request)
        reply = Reply(AnswerText(model.chat, prepared.stops), len(prepared.prompt))
        self.thread.submit(Job(model, prepared, reply))
        return reply

    def close(self, done: Callable[[], object]) -> None:
        self.thread.close(done)

    def free(self) -> None:
        self.models = {}


class Server(uvicorn.Server):
    """Stops by a signal: requests that are being answered end first, new ones get 503; a second signal ends at once."""

    def __init__(self, config: uvicorn.Config, answerer: Stoppable) -> None:
        super().__init__(config)
        self.answerer = answerer

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.answerer.stopping:
            self.force_exit = self.should_exit = True
        self.answerer.close(self.stop)

    def stop(self) -> None:
        """Close the connections, once their answers are sent."""
        self.should_exit = True


def make_server(answerer: Stoppable, listening: socket.socket, token: str | None) -> Server:
    """The server of a socket that is bound."""
    host = str(listening.getsockname()[0])
    app = make_app(answerer, hosts=LOCAL | {host} if is_local(host) else None, token=token)
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        limit_concurrency=MOST_CONNECTIONS,
    )
    return Server(config, answerer)


def serve(
    runs: Sequence[Path],
    display: Display,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    gguf: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serve the arms of some runs, or a GGUF file, until SIGINT or SIGTERM.

    Args:
        runs: over one base model; with ``gguf`` at most one, whose decoding is used.
        host: other addresses than this machine's own need a token; it is made and shown where none is given.
        port: 0 takes a free one.

    Raises:
        TellError: the address is in use, or a run cannot be served.
    """
    token = token or (None if is_local(host) else secrets.token_urlsafe(24))
    with bind(host, port) as listening:
        if gguf is None:
            answerer: Stoppable = OwnAnswerer(open_models(runs, display, trust_remote_code=trust_remote_code))
        else:
            answerer = GgufAnswers(gguf, open_run(runs[0], trust_remote_code=trust_remote_code) if runs else None)
        server = make_server(answerer, listening, token)
        shown = f"[{host}]" if ":" in host else host
        display.note(f"models: {', '.join(answerer.cards())}")
        if token:
            display.note(f"token (API key): {token}")
        display.note(f"serving at http://{shown}:{listening.getsockname()[1]}/v1 (Ctrl-C stops)")
        server.run(sockets=[listening])
    answerer.free()
