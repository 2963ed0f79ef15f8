"""Answers of a GGUF file through llama.cpp; anchor, fixed examples and date are in the template of an exported one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from starlette.concurrency import run_in_threadpool

from tell.config_sections import GenerateConfig
from tell.decode.grammar import check_schema
from tell.errors import TellError, first_line
from tell.exports.llama_cpp import MOST_CONTEXT, LlamaCpp, Wanted
from tell.exports.to_gguf import context_of
from tell.rows.prelude import SWITCH
from tell.serve.chat_request import BAD, STOPPING, TOO_MANY, ApiError, ChatRequest
from tell.serve.decode_thread import MOST_WAITING
from tell.serve.reply import TextReply
from tell.verbs.chat import MOST_NEW_TOKENS
from tell.verbs.evaluate import Findings
from tell.verbs.open_run import OpenRun

ROWS = 4
"""Answers that llama.cpp decodes at once; each has its own room of `context_of` or `MOST_CONTEXT` tokens."""


class GgufAnswers:
    """Answers the requests of a server with a GGUF file, as the model named like the file.

    Args:
        run: whose decoding and room are used where a request says nothing; None: greedy.

    Raises:
        TellError: xllamacpp is missing, or it cannot open the file.
    """

    def __init__(self, file: Path, run: OpenRun | None = None) -> None:
        self.name = file.stem
        self.generate = GenerateConfig(greedy=True, repetition_penalty=1.0)
        self.seed, self.limit, context = 42, MOST_NEW_TOKENS, MOST_CONTEXT
        if run is not None:
            self.generate, self.seed, context = run.config.generate, run.config.seed, context_of(run)
            facts = run.folder.read_as(run.folder.findings, Findings)
            self.limit = self.generate.max_new_tokens or facts.answer_limit
        self.llama = LlamaCpp(file, context=context, rows=ROWS)
        self._pool = ThreadPoolExecutor(ROWS, thread_name_prefix="llama.cpp")
        self._lock = threading.RLock()  # `close` is called by a signal too, in the thread that may hold it
        self._under_way = 0
        self._closing: Callable[[], object] | None = None

    @property
    def stopping(self) -> bool:
        return self._closing is not None

    def cards(self) -> dict[str, dict[str, object]]:
        """The one model; its anchor is in the template of a file that `tell export` wrote."""
        card: dict[str, object] = {"max_model_len": self.llama.context}
        if SWITCH in self.llama.template:
            card["tell"] = {"run": "", "arm": "gguf", "anchor": True, "decides": False}
        return {self.name: card}

    async def answer(self, request: ChatRequest) -> TextReply:
        """Begin to answer a request.

        Raises:
            ApiError: the template refuses it, it does not fit into the context, or too many wait.
        """
        ids = await run_in_threadpool(self._prompt, request)
        reply, wanted = TextReply(len(ids)), self._wanted(request, len(ids))
        with self._lock:
            if self._closing is not None:
                raise ApiError(STOPPING, "the server is stopping")
            if self._under_way >= MOST_WAITING:
                raise ApiError(TOO_MANY, f"{MOST_WAITING} requests wait already; try again")
            self._under_way += 1
        self._pool.submit(self._work, ids, request, wanted, reply)
        return reply

    def close(self, done: Callable[[], object]) -> None:
        """Take no more requests; call ``done`` once all are answered."""
        with self._lock:
            self._closing = self._closing or done
            idle = not self._under_way
        if idle:
            self._closing()

    def free(self) -> None:
        """Free the model, once all is answered."""
        self._pool.shutdown(wait=True)
        self.llama.close()

    def _prompt(self, request: ChatRequest) -> list[int]:
        turns = [turn.to_dict() for turn in request.turns()]
        try:
            return self.llama.prompt_ids(turns, request.chat_template_kwargs.model_dump())
        except TellError as error:
            raise ApiError(BAD, f"messages: {error.what}", "messages") from error

    def _wanted(self, request: ChatRequest, prompt: int) -> Wanted:
        request.check_room(prompt, self.llama.context)
        schema = request.response_format.schema_of_answers
        try:
            if schema is not None:
                check_schema(schema)
        except TellError as error:
            raise ApiError(BAD, f"response_format: {error.what}", "response_format") from error
        seed = self.seed if request.seed is None else request.seed
        return Wanted(request.limit or self.limit, seed, tuple(request.stop), cast("dict[str, Any] | None", schema))

    def _work(self, ids: list[int], request: ChatRequest, wanted: Wanted, reply: TextReply) -> None:
        try:
            if not reply.gone:
                rule = request.rule(self.generate, constrained=wanted.schema is not None)
                reply.end(self.llama.answer(ids, rule, wanted, reply.piece))
        except Exception as error:
            reply.end(error if isinstance(error, TellError) else RuntimeError(first_line(error)))
        finally:
            with self._lock:
                self._under_way -= 1
                done = self._closing if not self._under_way else None
            if done is not None:
                with suppress(RuntimeError):  # the server has ended
                    done()
