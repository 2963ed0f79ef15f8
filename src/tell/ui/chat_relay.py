"""One prompt to the untuned model, to it with examples in context, and to the tuned one: from `tell serve`, streamed.

The models are in a process of their own, so that the page needs no torch, answers while they load and compute, and
gives all their memory back when chatting ends; its address is read from its log, as everything else of the page.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import httpx

from tell.chat_client import stream_chat
from tell.child_process import wait_ended
from tell.errors import TellError
from tell.run.answer_check import Check
from tell.run.training_turns import training_turns
from tell.shown import one_line
from tell.ui.choices import positional
from tell.ui.jobs import Job
from tell.ui.ui_root import UiRoot

COLUMNS = {
    "base": ("Untuned", "the model as published"),
    "context": ("In context", "the untuned model with training examples in its prompt"),
    "tell": ("Tuned", "by TELL"),
}
_ADDRESS = re.compile(rb"serving at (http://127\.0\.0\.1:\d+/v1) ")
Messages = list[dict[str, str]]


def serving(root: UiRoot) -> Job:
    """The process that answers; one at a time, since it holds a model."""
    return Job(root, "serve")


def asked_for(root: UiRoot) -> str:
    """The run of the last server; empty where there was none."""
    return "".join(serving(root).command[2:3]).removeprefix("./")


def served(root: UiRoot) -> tuple[str, str]:
    """The run that is being served, and its address once the model is loaded; empty where none is."""
    job = serving(root)
    if job.process() is None:
        return "", ""
    found = _ADDRESS.search(job.log())
    return asked_for(root), found[1].decode() if found else ""


def serve_run(root: UiRoot, name: str) -> None:
    """Serve a run in place of the one that is served."""
    with (job := serving(root)).alone():  # nor does it come between another tab's stop and its end
        if served(root)[0] != name:
            free_model(root)
            job.start(["serve", positional(name), "--port=0"])


def free_model(root: UiRoot) -> None:
    """End the server; its memory is free then."""
    with (job := serving(root)).alone():
        if job.stop() is not None:
            wait_ended(job.record(), kill=True)
        job.forget()  # else it would seem to have ended by itself


async def answer(root: UiRoot, name: str, prompt: str, at: str) -> AsyncIterator[bytes]:
    """Lines of JSON, of one of `COLUMNS`: ``text`` as it comes, ``end`` and ``ok``, what is known so far, ``gone``."""
    folder, (run, address) = root.run(name), served(root)
    messages: Messages = [{"role": "user", "content": prompt}]
    try:
        if run != name or not address:
            yield _line(end="the model is not loaded", ok=False, gone=True)
            return
        check = await asyncio.to_thread(Check.of, folder)
        if at == "context":
            messages = await asyncio.to_thread(training_turns, folder) + messages
        text, finish = "", ""
        async for piece, reason in stream_chat(address, folder.root.name if at == "tell" else "base", messages):
            text, finish = text + piece, reason or finish
            ok, said = check(text, whole=False)
            yield _line(text=piece, end=said, ok=ok)
        ok, said = await asyncio.to_thread(check, text)
        cut = "cut at the limit of tokens" if finish == "length" else ""
        yield _line(end=", ".join(filter(None, (said, cut))), ok=ok)
    except (TellError, OSError) as error:
        yield _line(end=one_line(str(error)), ok=False)
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        said, gone = f"the server does not answer ({type(error).__name__})", isinstance(error, httpx.TransportError)
        yield _line(end=said, ok=False, gone=gone)


def _line(**event: object) -> bytes:
    return json.dumps(event).encode() + b"\n"
