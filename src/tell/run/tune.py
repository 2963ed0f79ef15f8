"""The main job: from a file of examples to an adapter, its scores and a report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tell.anchor.anchor import Anchor
from tell.config import Config
from tell.errors import Diverged, Interrupted, TellError
from tell.files import write_json
from tell.folder import RunFolder
from tell.mix.amount import Draw
from tell.mix.orderings import get_ordering
from tell.progress import Display, Silent
from tell.rows.row_table import RowTable
from tell.run.answers import check_prompts, scorer_of
from tell.run.arms import arm_mixtures, lead_arm, same_runs, trained_arms, wanted_arms
from tell.run.benchmarks.run_benchmarks import check_benchmarks
from tell.run.choose_anchor import choose_anchor
from tell.run.claim import claim, open_folder, with_full_paths
from tell.run.general_rows import General, draw_general, general_source, load_general
from tell.run.in_time import InTime
from tell.run.measure import measure_arms
from tell.run.plan import arm_costs, describe_plan
from tell.run.prepare import Task, anchor_of, limit_task, load_task, place_anchor, stand_in_anchor, task_table
from tell.run.processes import decoding_beside, load_spread, start_job, with_processes
from tell.run.record import train_numbers, write_adapter_notes, write_decided, write_findings
from tell.run.self_written import write_self_data
from tell.run.speed import keep_speed, measure_pace
from tell.run.stop import Checked, Stop
from tell.run.time_budget import Extent
from tell.verbs.open_run import load_engine

if TYPE_CHECKING:
    from tell.train.parallel import Processes


def tune(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    command: str = "",
) -> RunFolder:
    """Tune a model by TELL, score it against its controls, and write the report.

    Args:
        config: see `tell.load_config`.
        resume: go on with the run in the output folder; it ends as if it had never been stopped.
        overwrite: replace the run in the output folder.
        display: shows progress.
        command: kept in the report.

    Returns:
        The run folder. Under torchrun the first process does all but train; the others return once training is over.

    Raises:
        TellError: bad input, said before anything is written.
        Interrupted: SIGINT or SIGTERM; the folder can be resumed.
    """
    return with_processes(config, partial(_tune, config, resume, overwrite, display or Silent(), command))


def _tune(
    config: Config, resume: bool, overwrite: bool, display: Display, command: str, processes: Processes | None
) -> RunFolder:
    begin = time.monotonic()
    config = with_full_paths(config)
    folder, resumed = claim(config, resume=resume, overwrite=overwrite)
    arms = wanted_arms(config)
    task = load_task(config, display)
    scorer_of(config, task.kind)  # a scorer that cannot be loaded is said now, not after training
    check_benchmarks(config)
    if processes is not None:
        task.notice(f"trained by {processes}", display)
    earlier = float(folder.read_status().get("seconds", 0)) if resumed else 0.0
    run = _Run(config, folder, task, arms, display, Stop(folder.root), begin, command, earlier, processes)
    run.check_rows()
    opened = open_folder(folder, fresh=not resumed, config=config, seconds=run.seconds, overwrite=overwrite)
    with opened, run.stop.listening():
        try:
            run.go()
        except (Interrupted, KeyboardInterrupt):
            run.status("interrupted")
            raise
        except BaseException as error:
            run.status("failed", error=str(error) or type(error).__name__)
            raise
        finally:
            run.dismiss()
    return folder


@dataclass
class _Run:
    """One run on its way; ``go`` is the whole story."""

    config: Config
    folder: RunFolder
    task: Task
    arms: list[str]
    display: Display
    stop: Stop
    begin: float
    command: str
    earlier: float = 0.0  # seconds of the sessions before this one
    processes: Processes | None = None  # that train with this one
    stage: str = "start"
    failed: dict[str, str] = field(default_factory=dict)  # control arms that diverged, and how
    general: General | None = None
    same: dict[str, str] = field(default_factory=dict)  # arms that are one run with another
    loaded: Any = None
    engine: Any = None

    def __post_init__(self) -> None:
        self.clock = InTime(self.config.max_minutes, self.begin, self.folder, self.display)

    def check_rows(self) -> None:
        """Refuse bad rows, prompts, budgets, orders and general data before anything is written."""
        config, task = self.config, self.task
        get_ordering(config.mix.order)
        anchor = anchor_of(config)
        stand_in = place_anchor(task, stand_in_anchor(task) if anchor is None else anchor, self.display)
        train, split = task.train, dict(task.findings["split"])
        limit_task(task, stand_in)
        task_table(task, stand_in, task.train)
        arch = task.files.architecture
        check_prompts(task.chat, stand_in, task.test, arch.max_positions, task.shots, arch.vocab)
        task.train, task.findings["split"] = train, split  # the true anchor decides again
        if (source := general_source(task, self.display)) not in ("self", "none"):
            self.general = load_general(task, source, self.display)

    def go(self) -> None:
        self._at("anchor")
        anchor = self._anchor()
        limit_task(self.task, anchor)
        table = task_table(self.task, anchor, self.task.train)
        self._at("general data")
        general, draw = self._general(table)
        extent = self.clock.extent(self.task, table, general, draw, self._measure_pace)
        self._take(extent)
        draw = extent.draw
        mixtures = arm_mixtures(self.task.config, table, general, draw)
        if "general" in self.arms and "general" not in mixtures:
            self.arms.remove("general")
            if not self.arms:
                raise TellError(
                    "no general row is drawn, and no other arm is asked for",
                    where="general",
                    remedy="Ask for more general data: the amount is less than half a row.",
                )
            self.task.notice("the arm general is left out: no general row is drawn", self.display)
        self._join(same_runs(self.arms, mixtures))
        plan = describe_plan(self.task, table, general, draw) | {"fit": self.clock.fit(extent)}
        for text in plan["mixture"]["notices"]:
            self.task.notice(text, self.display)
        lead = lead_arm(self.arms, mixtures)
        write_decided(self.folder, self.task, plan, mixtures[lead] if lead else None)
        results = self._train(mixtures, lead, lambda: self._take(self.clock.corrected(self.task, table, general, draw)))
        self.dismiss()
        self._at("evaluate")
        metrics, validation = measure_arms(
            self.task,
            self.arms,
            self.folder,
            self._model(),
            self.engine,
            anchor,
            general,
            display=self.display,
            begin=self._at,
            check=self.stop.check,
        )
        metrics["mixture"] = plan["mixture"] if lead else {}
        metrics["train"] = train_numbers(self.task, results, mixtures, validation, lead)
        metrics["failed"] = self.failed
        metrics["same"] = self.same
        write_findings(self.folder, self.task, table, general, self.loaded, seconds=self.seconds, command=self.command)
        write_json(self.folder.metrics, metrics)
        self._at("report")
        from tell.report.page import write_page

        write_page(self.folder, state="done")  # which it is once the page is there
        self.stage = "done"
        self.status("done")

    def _at(self, stage: str) -> None:
        self.stage = stage
        self.stop.check()
        self.status("running")

    @property
    def seconds(self) -> float:
        """The whole run's so far, all its sessions together."""
        return self.earlier + time.monotonic() - self.begin

    def status(self, state: str, **more: Any) -> None:
        """Write status.json, with the seconds that a resumed run goes on counting from."""
        self.folder.set_status(state, stage=self.stage, seconds=round(self.seconds, 1), **more)

    def _model(self) -> Any:
        """The base model, loaded once, and its engine."""
        if self.loaded is None:
            from tell.train.fast.fused import path_notes

            config = decoding_beside(self.config, self.processes)
            self.loaded, self.engine = load_engine(self.task.files, config, display=self.display)
            notes = [self.loaded.why, *path_notes(self.loaded.model)]
            self.display.note(f"{self.task.files.name} ({self.task.files.origin}); {'; '.join(notes)}")
        return self.loaded.model

    def _trainee(self) -> tuple[Any, Any]:
        """The base model to train, and on what device; spread over processes, it may not fit beside a whole one."""
        if self.processes is not None and self.processes.sharded:
            self.loaded = self.engine = None
            return load_spread(self.task.files, self.config)
        self._model()
        return self.loaded, self.loaded.device

    def dismiss(self) -> None:
        """No more training: the other processes need not wait."""
        if self.processes is not None:
            self.processes.dismiss(str(self.folder.root))

    def _anchor(self) -> Anchor:
        """The anchor by hand, from the folder when resumed, or written by the model."""
        task, path = self.task, self.folder.anchor
        if path.exists():
            return Anchor.load(path)
        anchor = anchor_of(self.config)
        candidates: list[dict] = []
        if anchor is None:
            model = self._model()
            anchor, candidates = choose_anchor(task, model, self.engine, self.display, self.stop.check)
        anchor = place_anchor(task, anchor, self.display)
        write_json(path, {**anchor.to_dict(), "candidates": candidates})
        if anchor:
            self.display.note(f"anchor ({anchor.origin}, {anchor.place}): {anchor.text}")
        return anchor

    def _general(self, table: RowTable) -> tuple[General | None, Draw | None]:
        source = general_source(self.task)
        if source == "none":
            return None, None
        general = self.general
        if general is None:
            general = load_general(self.task, self._self_file(table), self.display)
            general.facts["path"] = f"self: written by {self.task.files.name}"
        return general, draw_general(self.config, general, int(table.unit.sum()))

    def _take(self, extent: Extent) -> None:
        """Do no more than this from here on."""
        self.task = extent.apply(self.task)
        self.arms = [arm for arm in self.arms if arm in extent.arms]
        self.task.findings["split"]["test"] = len(self.task.test)

    def _join(self, same: dict[str, str]) -> None:
        """Leave out arms that would be trained on the very rows of another."""
        self.same = same
        for arm, other in same.items():
            self.arms.remove(arm)
            text = f"the arms {other} and {arm} are one run: they are trained on the same rows in the same order"
            self.task.notice(text, self.display)

    def _measure_pace(self, table: RowTable) -> None:
        self._model()
        with self.display.bar("measure the pace", None):
            measure_pace(self.task, table, self.loaded, self.engine)

    def _self_file(self, table: RowTable) -> str:
        """Rows that the model writes itself, until they suffice for the mix and the held-out rows.

        With --max-minutes, as many as the run is predicted to have time for, and a resumed run takes those that the
        session before took.
        """
        self._model()
        enough = self.clock.enough(self.task, table, self._measure_pace)
        path, facts = write_self_data(
            self.config,
            self.task.chat,
            self.engine,
            model=self.task.files.fingerprint,
            enough=enough,
            display=Checked(self.display, self.stop),
        )
        if facts["thrown"]:
            thrown = ", ".join(f"{n} {reason}" for reason, n in sorted(facts["thrown"].items(), key=lambda x: -x[1]))
            self.task.notices.append(
                f"general data: the model answered {facts['asked']:,} prompts, {facts['kept']:,} kept ({thrown})"
            )
        return str(path)

    def _train(self, mixtures: dict, lead: str | None, lead_trained: Callable[[], None]) -> dict[str, dict]:
        """Train the arms that are asked for; finished ones are kept. Their results by arm.

        Args:
            lead_trained: called once the leading arm has been trained; it may give up others.

        A control arm that diverges is left out and told of; without the leading arm there is nothing to go on with.
        """
        from tell.train.trainer import Trainer

        results: dict[str, dict] = {}
        wanted = trained_arms(self.arms)
        for arm in sorted(wanted, key=lambda a: a != lead):  # the adapter people wait for comes first
            if arm not in trained_arms(self.arms):
                continue  # given up meanwhile
            self._at(f"train {arm}")
            adapter = self.folder.adapter_of(arm)
            place = adapter.root
            if adapter.result.exists():
                results[arm] = self.folder.read(adapter.result)
                continue
            if adapter.failed.exists():
                self._leave_out(arm, str(self.folder.read(adapter.failed).get("error")))
                continue
            tables, mixture = mixtures[arm]
            base, device = self._trainee()
            total = int(mixture.column("tokens").sum(dtype=np.int64))
            with self.display.bar(f"train {arm}", total, "tokens") as advance:
                counted = 0

                def progress(report: Any, advance: Any = advance, arm: str = arm) -> None:
                    nonlocal counted
                    losses = ", ".join(f"{k} {v:.3f}" for k, v in report.by_source.items())
                    advance(report.tokens_total - counted, f"step {report.step}/{report.steps}, loss {losses}")
                    counted = report.tokens_total

                def moved(tokens: int, advance: Any = advance) -> None:
                    nonlocal counted
                    counted += tokens
                    advance(tokens)

                if self.processes:
                    start_job(self.processes, self.task, base, place, tables, mixture)
                trainer = Trainer(
                    base.model,
                    tables,
                    mixture,
                    self.task.training,
                    folder=place,
                    log=self.folder.losses(arm),
                    seed=self.config.seed,
                    device=device,
                    stopped=self.stop,
                    progress=progress,
                    moved=moved,
                    processes=self.processes,
                )
                try:
                    result = trainer.run(resume=True)
                except Interrupted as error:
                    raise self.stop.interrupted(f"{arm}: {error.what}") from error
                except Diverged as error:
                    if arm == lead:
                        raise
                    shutil.rmtree(adapter.checkpoint, ignore_errors=True)
                    write_json(adapter.failed, {"error": error.what})  # a resumed run need not find out again
                    self._leave_out(arm, error.what)
                    continue
            write_adapter_notes(self.folder, self.task, adapter)
            if arm == "tell" and result.steps >= 10 and result.seconds > 0 and self.processes is None:
                computed = arm_costs(self.task, mixture)["computed_tokens"]
                keep_speed(self.task, self.loaded, computed / result.seconds)
            results[arm] = result.to_dict()
            write_json(adapter.result, results[arm])  # last: from here on the arm counts as trained
            shutil.rmtree(adapter.checkpoint, ignore_errors=True)
            if arm == lead:
                lead_trained()
        return results

    def _leave_out(self, arm: str, why: str) -> None:
        self.failed[arm] = why
        self.arms.remove(arm)
        self.task.notice(f"the arm {arm} failed and is left out: {why}", self.display)
