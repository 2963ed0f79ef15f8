"""One thread that decodes for all clients: requests that wait for the same weights and decoding form one batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from tell.decode.engine_rows import Answer, Request
from tell.decode.guide import Guide
from tell.decode.sampler import Decoding
from tell.errors import TellError, first_line
from tell.serve.chat_request import STOPPING, TOO_MANY, ApiError
from tell.serve.served_models import Prepared, ServedModel

MOST_WAITING = 256
"""Requests that wait or are being answered; more are refused with 429."""


class Client(Protocol):
    """Who waits for an answer; called by the decoding thread."""

    def token(self, token: int) -> bool:
        """Take a token; True: the client needs no more."""
        ...

    def end(self, answer: Answer | Exception) -> None:
        """The answer is complete, or failed."""
        ...

    @property
    def gone(self) -> bool:
        """Nobody waits any more."""
        ...


@dataclass(frozen=True, eq=False)
class Job:
    """A request with its model and its client."""

    model: ServedModel
    prepared: Prepared
    client: Client

    @property
    def batch(self) -> tuple[Path | None, Decoding]:
        """What jobs that are decoded together share."""
        return self.model.adapter, self.prepared.decoding

    def end(self, answer: Answer) -> None:
        """Hand over the answer, unless its grammar grew too complex while it was decoded."""
        mask = self.prepared.mask
        failed = f"the grammar gives up on the answer ({mask.failed})" if mask is not None and mask.failed else ""
        self.client.end(TellError(failed) if failed else answer)

    @property
    def guided(self) -> bool:
        """Its closed fields are decided by states of the untuned model, so that it cannot join a running batch."""
        return self.model.decider is not None


def _fail(jobs: Sequence[Job], error: BaseException) -> None:
    for job in jobs:
        job.client.end(error if isinstance(error, Exception) else RuntimeError(first_line(error)))


def _like_the_first(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.batch == jobs[0].batch]


class DecodeThread:
    """Decodes the jobs that are submitted, the oldest first.

    A batch takes all waiting jobs of its kind, and those of its kind that arrive while it runs, up to the first that
    cannot join it: no job can starve another.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running = 0
        self._closing: Callable[[], object] | None = None
        self._dead = False
        self._stack, self._applied = ExitStack(), False
        self._adapter: Path | None = None
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            ApiError: too many wait, or the server is stopping.
        """
        with self._changed:
            if self._closing is not None:
                raise ApiError(STOPPING, "the server is stopping")
            if len(self._waiting) + self._running >= MOST_WAITING:
                raise ApiError(TOO_MANY, f"{MOST_WAITING} requests wait already; try again")
            self._waiting.append(job)
            self._changed.notify()

    @property
    def stopping(self) -> bool:
        return self._closing is not None

    def close(self, done: Callable[[], object]) -> None:
        """Take no more jobs; ``done`` is called once the last is answered, by the decoding thread while it lives."""
        with self._changed:
            dead = self._dead
            self._closing = self._closing or done
            self._changed.notify()
        if dead:
            done()

    def join(self) -> None:
        """Wait for the end that `close` has asked for."""
        self._thread.join()

    def _work(self) -> None:
        try:
            self._answer_all()
            self._release()
        except BaseException as error:  # the weights are not those of the model any more: no answer would be right
            self._die(error)
        assert self._closing is not None
        self._closing()

    def _die(self, error: BaseException) -> None:
        """Fail all that wait, and refuse what comes."""
        with self._changed:
            jobs, self._waiting, self._running = self._waiting, [], 0
            self._dead, self._closing = True, self._closing or (lambda: None)
        _fail(jobs, error)

    def _answer_all(self) -> None:
        while True:
            with self._changed:
                self._running = 0
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                jobs = self._take(_like_the_first)
            if not jobs:
                continue
            taken = list(jobs)
            try:
                self._answer(jobs, taken)
            except BaseException as error:  # of one batch, be it a panic of a library; the server goes on
                _fail(taken, error)
                self._release()

    def _take(self, chosen: Callable[[Sequence[Job]], list[Job]]) -> list[Job]:
        """Those chosen of the waiting jobs, oldest first; jobs whose client has gone are dropped. The lock is held."""
        self._waiting = [job for job in self._waiting if not job.client.gone]
        taken = chosen(self._waiting)
        self._waiting = [job for job in self._waiting if job not in taken]
        self._running += len(taken)
        return taken

    def _answer(self, jobs: Sequence[Job], taken: list[Job]) -> None:
        """Answer a batch; ``taken`` has the jobs of it, and what joins it, that are not yet answered."""
        model, decoding = jobs[0].model, jobs[0].prepared.decoding
        if any(job.guided for job in jobs):
            self._release()  # the readout looks at states of the untuned model
        guides: dict[int, Guide | None] = {}
        for owner in {id(job.model): job.model for job in jobs}.values():
            own = [job for job in jobs if job.model is owner]
            made = owner.guides([job.prepared.example for job in own])
            guides |= {id(job): guide for job, guide in zip(own, made, strict=True)}
        self._apply(model)

        def end(job: Job, answer: Answer) -> None:
            taken.remove(job)
            job.end(answer)

        def request(job: Job) -> Request:
            made, ends = job.prepared, partial(end, job)
            return Request(made.prompt, made.limit, made.seed, job.client.token, ends, guides.get(id(job)), made.mask)

        def arrivals(free: int, fits: Callable[[Request], bool]) -> Sequence[Request]:
            def joins(job: Job) -> bool:
                return job.batch == jobs[0].batch and not job.guided and fits(request(job))

            with self._changed:
                self._running = sum(not job.client.gone for job in taken)
                joined = self._take(lambda waiting: list(takewhile(joins, waiting[:free])))
            taken.extend(joined)
            return [request(job) for job in joined]

        model.engine.serve([request(job) for job in jobs], decoding, arrivals, prefix=model.prefix)

    def _apply(self, model: ServedModel) -> None:
        """Apply a model's adapter, unless the last batch had the same."""
        if self._applied and self._adapter == model.adapter:
            return
        self._release()
        self._stack.enter_context(model.session.adapter(model.adapter))
        self._stack.enter_context(model.engine.fixed_weights())
        self._adapter, self._applied = model.adapter, True

    def _release(self) -> None:
        """The untuned weights again."""
        self._stack.close()
        self._applied = False
