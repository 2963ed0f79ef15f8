"""One prompt to the untuned model, to it with examples in context, and to the tuned one: from `tell serve`, streamed.

The models are in a process of their own, so that the page needs no torch, answers while they load and compute, and
gives all their memory back when chatting ends; its address is read from its log, as everything else of the page.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tell.data.json_text import parse_strict
from tell.data.schema import Schema, SlowPattern
from tell.errors import TellError
from tell.files import read_json
from tell.folder import RunFolder
from tell.report.read_run import get, rows_of
from tell.run.claim import read_run_config
from tell.run.task_rows import read_task
from tell.shown import brief, one_line
from tell.ui.choices import positional
from tell.ui.jobs import Job
from tell.ui.ui_root import UiRoot

COLUMNS = {
    "base": ("Untuned", "the model as published"),
    "context": ("In context", "the untuned model with training examples in its prompt"),
    "tell": ("Tuned", "by TELL"),
}
MOST_EXAMPLES, MOST_CHARACTERS = 8, 6000  # in the prompt of the second column
MOST_PROMPT = 100_000
STOPPING = 20.0  # seconds until a server that was told to stop has ended
_ADDRESS = re.compile(r"serving at (http://127\.0\.0\.1:\d+/v1) ")


def serving(root: UiRoot) -> Job:
    """The process that answers; one at a time, since it holds a model."""
    return Job(root, "serve")


def served(root: UiRoot) -> tuple[str, str]:
    """The run that is being served, and its address once the model is loaded; empty where none is."""
    job = serving(root)
    command = job.record().get("command")
    if job.process() is None or not isinstance(command, list) or len(command) < 3:
        return "", ""
    found = next((match for line in job.lines(50) if (match := _ADDRESS.search(line))), None)
    return str(command[2]).removeprefix("./"), found[1] if found else ""


def serve_run(root: UiRoot, name: str) -> None:
    """Serve a run in place of the one that is served."""
    job = serving(root)
    if served(root)[0] == name:
        return
    if (process := job.process()) is not None:
        job.stop()
        with suppress(psutil.Error):
            try:
                process.wait(STOPPING)
            except psutil.TimeoutExpired:
                process.kill()
    job.start(["serve", positional(name), "--port=0"])


def examples(folder: RunFolder) -> list[tuple[str, str]]:
    """Training rows as (prompt, answer): the first that fit."""
    config = read_run_config(folder)
    train = set(map(str, rows_of(read_json(folder.split, remedy=""), "train")))
    found, left = [], MOST_CHARACTERS
    for example in read_task(config, bad_rows="drop")[0].examples:
        turns = example.messages
        if example.hash in train and len(turns) == 2 and (left := left - sum(len(m.content) for m in turns)) > 0:
            found.append((turns[0].content, turns[1].content))
        if len(found) == MOST_EXAMPLES or left <= 0:
            break
    return found


@dataclass
class Check:
    """Whether an answer has the form that the run's answers have.

    Attributes:
        schema: None: none is known.
        labels: the possible answers; empty: not known.
    """

    schema: Schema | None = None
    labels: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, folder: RunFolder) -> Check:
        """From the files of the run; damaged ones check nothing."""
        found: dict[str, Any] = {}
        for path in (folder.findings, folder.schema):
            with suppress(FileNotFoundError, TellError):
                found[path.name] = read_json(path, remedy="")
        labels = rows_of(found.get(folder.findings.name), "kind", "labels")
        schema = found.get(folder.schema.name)
        try:
            checked = Schema(schema) if schema is not None else None
        except TellError:
            checked = None
        return cls(checked, frozenset(map(str, labels)))

    def doubt(self, text: str) -> str:
        """Why an answer that begins so cannot have that form any more; empty where it still can."""
        begun = text.lstrip()
        if self.schema is not None and begun and isinstance(self.schema.schema, dict):
            kind = self.schema.schema.get("type")
            return "not JSON" if {"object": "{", "array": "["}.get(str(kind), begun[0]) != begun[0] else ""
        if self.labels and not any(label.startswith(begun.rstrip()) for label in self.labels):
            return "no label of the task"
        return ""

    def __call__(self, text: str) -> tuple[bool, str] | None:
        """Whether it has that form, and in words; None where nothing is known of it."""
        if self.schema is not None:
            try:
                error = next(self.schema.validator.iter_errors(parse_strict(text)), None)
            except (ValueError, RecursionError):
                return False, "not JSON"
            except SlowPattern:
                return None
            return (True, "follows the schema") if error is None else (False, brief(error.message, 120))
        if self.labels:
            return (True, "a label of the task") if text.strip() in self.labels else (False, "no label of the task")
        return None


async def answers(root: UiRoot, name: str, prompt: str) -> AsyncIterator[bytes]:
    """Lines of JSON: ``{"at", "text"}`` as the answers come, and of each ``{"at", "end", "ok"}``, how it ended.

    An answer that cannot have its form any more has both while it still comes.
    """
    folder, (run, address) = root.run(name), served(root)
    if run != name or not address:
        yield _line(at="tell", end="the model is not loaded", ok=False)
        return
    check = await asyncio.to_thread(Check.of, folder)
    try:
        shots = await asyncio.to_thread(examples, folder)
        missing = "" if shots else "no training rows are short enough"
    except (TellError, OSError) as error:
        shots, missing = [], one_line(str(error))
    own = {"role": "user", "content": prompt}
    context = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in zip(("user", "assistant"), shot, strict=True)
    ]
    wanted = {"tell": (folder.root.name, [own]), "base": ("base", [own]), "context": ("base", [*context, own])}
    lines: asyncio.Queue[bytes | None] = asyncio.Queue()
    async with httpx.AsyncClient(timeout=None, trust_env=False) as client:

        async def ask(at: str) -> None:
            try:
                if at == "context" and missing:
                    lines.put_nowait(_line(at=at, end=f"no examples: {missing}", ok=False))
                    return
                end, ok = await _stream(client, address, at, *wanted[at], lines, check)
                lines.put_nowait(_line(at=at, end=end, ok=ok))
            except (httpx.HTTPError, ValueError) as error:
                lines.put_nowait(_line(at=at, end=f"the server does not answer ({type(error).__name__})", ok=False))

        async def all_of_them() -> None:
            await asyncio.gather(*map(ask, wanted))
            lines.put_nowait(None)

        task = asyncio.ensure_future(all_of_them())
        try:
            while (line := await lines.get()) is not None:
                yield line
        finally:
            task.cancel()


async def _stream(
    client: httpx.AsyncClient,
    address: str,
    at: str,
    model: str,
    messages: list[dict[str, str]],
    lines: asyncio.Queue[bytes | None],
    check: Check,
) -> tuple[str, bool | None]:
    """Pass one answer on; how it ended, and whether it has the form of the task's answers."""
    text, finish = "", ""
    body = {"model": model, "messages": messages, "stream": True}
    async with client.stream("POST", f"{address}/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            found = json.loads(await answer.aread())
            return one_line(str(get(found, "error", "message"))), False
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return one_line(str(get(event, "error", "message"))), False
            for choice in event.get("choices", []):
                piece = choice["delta"].get("content", "")
                finish = choice["finish_reason"] or finish
                if piece:
                    text += piece
                    doubt = check.doubt(text)
                    lines.put_nowait(_line(at=at, text=piece, **({"end": doubt, "ok": False} if doubt else {})))
    found = await asyncio.to_thread(check, text)
    cut = "cut at the limit of tokens" if finish == "length" else ""
    if found is None:
        return cut, None
    return ", ".join(filter(None, (found[1], cut))), found[0]


def _line(**event: object) -> bytes:
    return json.dumps(event).encode() + b"\n"
