"""Trains the arms of a run; finished ones are kept, a control that diverges is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tell.errors import Diverged, Interrupted
from tell.files import remove_folder, write_json
from tell.folder import AdapterFolder
from tell.mix.mixture import GENERAL, Mixture
from tell.progress import Advance
from tell.run.costs import arm_costs
from tell.run.journal import Journal
from tell.run.prepare import Prepared
from tell.run.processes import free_shards, load_shared, start_job
from tell.run.record import write_adapter_notes
from tell.run.session import Session
from tell.run.speed import keep_speed
from tell.run.task import Notices, Task

if TYPE_CHECKING:
    import torch

    from tell.models.load import Loaded
    from tell.train.parallel import Processes
    from tell.train.soft_targets import SoftTargets
    from tell.train.trainer import StepReport
    from tell.train.training_job import TrainingHooks, TrainResult

ENOUGH_STEPS = 10  # steps of a training whose speed is saved


@dataclass
class Trained:
    """Results of the arms.

    Attributes:
        results: what each arm's training reported, as in its ``result.json``.
        failed: control arms that diverged, and how.
        now: arms trained in this session of the run.
    """

    results: dict[str, dict] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    now: list[str] = field(default_factory=list)

    def add(self, other: Trained) -> None:
        self.results |= other.results
        self.failed |= other.failed
        self.now += other.now

    def arms(self, arms: Sequence[str]) -> list[str]:
        """Those of ``arms`` that can be scored."""
        return [arm for arm in arms if arm not in self.failed]


def train_arms(
    prepared: Prepared, arms: Sequence[str], session: Session, journal: Journal, processes: Processes | None = None
) -> Trained:
    """Results of training each arm from the base model; resumes where an earlier session stopped.

    Raises:
        Diverged: the leading arm's loss is no longer a number; without it the run cannot continue.
        Interrupted: a signal was received; the folder can be resumed.
    """
    trained = Trained()
    for arm in arms:
        journal.at(f"train {arm}")
        adapter = journal.folder.adapter_of(arm)
        if adapter.result.exists():
            trained.results[arm] = kept = journal.folder.read(adapter.result)
            told = kept.pop("computed", None)
            prepared.task.notices.recall(arm, map(str, told) if isinstance(told, list) else ())
            continue
        if adapter.failed.exists():
            _leave_out(prepared, trained, arm, str(journal.folder.read(adapter.failed).get("error")))
            continue
        try:
            result = _train_and_free(prepared, arm, session, journal, processes)
        except Interrupted as error:
            raise journal.stop.interrupted(f"{arm}: {error.what}") from error
        except Diverged as error:
            if arm == prepared.lead:
                raise
            _remove_state(adapter)
            write_json(adapter.failed, {"error": error.what})  # a resumed run need not find out again
            _leave_out(prepared, trained, arm, error.what)
            continue
        write_adapter_notes(journal.folder, prepared.task, adapter)
        if arm == "tell" and result.steps >= ENOUGH_STEPS and result.seconds > 0 and processes is None:
            computed = arm_costs(prepared.task_of(arm), prepared.mixtures[arm][1])["computed_tokens"]
            keep_speed(prepared.task, session.loaded, computed / result.seconds)
        trained.results[arm] = result.to_dict()
        trained.now.append(arm)
        computed_by = {"computed": prepared.task.notices.heard.get(arm, [])}
        write_json(adapter.result, trained.results[arm] | computed_by)  # last: from here on the arm counts as trained
        _remove_state(adapter)
    return trained


def _remove_state(adapter: AdapterFolder) -> None:
    """Remove what only a stopped training needs."""
    remove_folder(adapter.checkpoint)
    adapter.targets.unlink(missing_ok=True)


def _leave_out(prepared: Prepared, trained: Trained, arm: str, why: str) -> None:
    trained.failed[arm] = why
    prepared.task.notices.add(f"the arm {arm} failed and is left out: {why}")


def _train(
    prepared: Prepared, arm: str, session: Session, journal: Journal, processes: Processes | None
) -> TrainResult:
    from tell.train.trainer import Trainer
    from tell.train.training_job import TrainingJob

    tables, mixture = prepared.mixtures[arm]
    task = prepared.task_of(arm)
    place = journal.folder.adapter_of(arm)
    targets = arm_targets(task, mixture, session, place.targets)
    log = journal.folder.losses(arm)
    job = TrainingJob(tables, mixture, task.training(mixture), task.config.seed, place.root, log, targets)
    base, device = _trainee(session, processes)
    total = int(mixture.column("tokens").sum(dtype=np.int64))
    with _bar(prepared.task.notices, arm, total, journal) as hooks:
        if processes:
            start_job(processes, task.files, base, job)
        return Trainer(base.model, job, device=device, hooks=hooks, processes=processes).run(resume=True)


def _train_and_free(
    prepared: Prepared, arm: str, session: Session, journal: Journal, processes: Processes | None
) -> TrainResult:
    """Train an arm; afterwards the shards of a model that several processes share have left all GPUs."""
    try:
        return _train(prepared, arm, session, journal, processes)
    finally:
        if processes is not None and processes.sharded and not processes.busy:
            free_shards(processes)


def arm_targets(task: Task, mixture: Mixture, session: Session, path: Path) -> SoftTargets | None:
    """The untuned model's distributions over the general rows of a mixture, kept in a file.

    None where the mixture has no such row, or is trained on their text.
    """
    from tell.train.soft_targets import TOP_K, cached_targets, untuned_targets

    if GENERAL not in mixture.sources or task.general_target != "untuned":
        return None
    table = mixture.tables[GENERAL]
    rows = np.unique(mixture.row[mixture.source == mixture.sources.index(GENERAL)])

    def make() -> SoftTargets:
        with session.display.bar("targets of the general rows", len(rows)) as advance:

            def moved(done: int) -> None:
                advance(done)
                session.check()

            micro = session.config.train.forward_tokens
            return untuned_targets(session.model, table, rows, micro_tokens=micro, progress=moved)

    targets = cached_targets(path, table, rows, make)
    session.display.note(
        f"general rows are distilled: the {TOP_K} likeliest tokens hold {targets.mass():.1%} of the untuned model's "
        "probability on average, the others are one bucket"
    )
    return targets


def _trainee(session: Session, processes: Processes | None) -> tuple[Loaded, torch.device]:
    """The base model to train and its device; a sharded model may not fit next to a whole one."""
    if processes is not None and processes.sharded:
        session.release()
        return load_shared(session.files, session.config)
    return session.loaded, session.loaded.device


@contextmanager
def _bar(notices: Notices, arm: str, tokens: int, journal: Journal) -> Iterator[TrainingHooks]:
    """A progress bar over training tokens, advanced within steps and corrected after each."""
    from tell.train.training_job import TrainingHooks

    with notices.display.bar(f"train {arm}", tokens, "tokens") as advance:
        counter = _Counter(advance)
        note = partial(notices.hear, arm)
        yield TrainingHooks(stopped=journal.stop, progress=counter.step, moved=counter.moved, note=note)


@dataclass
class _Counter:
    advance: Advance
    counted: int = 0

    def step(self, report: StepReport) -> None:
        losses = ", ".join(f"{k} {v:.3f}" for k, v in report.by_source.items())
        # the report of a GPU's step comes while the next is computed, whose tokens may be counted already
        late = report.tokens_total - self.counted
        late = late if late > 0 or report.step == report.steps else 0
        self.advance(late, f"step {report.step}/{report.steps}, loss {losses}")
        self.counted += late

    def moved(self, tokens: int) -> None:
        self.counted += tokens
        self.advance(tokens)
