"""`tell tune`: from a file of examples to an adapter, its scores and a report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tell.anchor.anchor import Anchor
from tell.config import Config
from tell.data.general import general_source
from tell.files import write_json
from tell.folder import RunFolder
from tell.mix.orderings import get_ordering
from tell.models.base import check_planned_model
from tell.progress import Display
from tell.report.page import write_page
from tell.rows.row_table import RowTable
from tell.run.answers import scorer_of
from tell.run.arms import trained_arms, wanted_arms
from tell.run.benchmarks.run_benchmarks import check_benchmarks
from tell.run.choose_anchor import choose_anchor
from tell.run.claim import claim, with_full_paths
from tell.run.constrained import any_constrained, check_constraint, own_alone
from tell.run.folds import check_search
from tell.run.general_rows import General, load_general, read_general, source_of
from tell.run.in_time import InTime
from tell.run.journal import Journal
from tell.run.measure import measure_arms
from tell.run.metrics import Findings, run_metrics, write_results
from tell.run.prepare import Writer, check_rows, prepare
from tell.run.processes import decoding_beside, help_training, helpers, processes_of
from tell.run.rank_general import ranked_by
from tell.run.record import write_plan
from tell.run.search import searched
from tell.run.self_written import write_self_data
from tell.run.session import ModelCache, Session, check_engine, check_trainable
from tell.run.task import Task, anchor_of, limit_task, load_task, place_anchor, placed_anchor
from tell.run.teach import teach
from tell.run.train_arms import train_arms
from tell.run.written_blocks import keep_engine, written_by_engine
from tell.train.trackers import missing_trackers

if TYPE_CHECKING:
    from tell.train.parallel import Processes


def tune(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    command: str = "",
    models: ModelCache | None = None,
) -> RunFolder:
    """Tune a model by TELL, score it against its controls, and write the report.

    Args:
        config: see `tell.load_config`.
        resume: continue the run in the output folder; it ends as if it had never been stopped.
        overwrite: replace the run in the output folder.
        display: shows progress.
        command: kept in the report.
        models: keeps the loaded model for the next run.

    Returns:
        The run folder. Under torchrun the other processes only train, and return once training is over.

    Raises:
        TellError: bad input, reported before anything is written.
        Interrupted: SIGINT or SIGTERM; the folder can be resumed.
    """
    with processes_of(config) as processes:
        if processes is not None and not processes.leads:
            return help_training(processes, config)
        config = with_full_paths(config)
        folder, resumed = claim(config, resume=resume, overwrite=overwrite)
        journal = Journal.of(folder, resumed=resumed)
        task, general = read_inputs(config, display, str(processes or ""))
        session = open_session(task, journal, models, processes)
        clock = InTime(config.max_minutes, session, journal)
        with helpers(processes, folder) as dismiss, journal.open(config, fresh=not resumed, overwrite=overwrite):
            anchor = settle_anchor(task, session, journal)
            journal.at("general data")
            rows = ranked_by(session, folder, general or written_by(session, clock))
            prepared = clock.fit(searched(prepare(task, anchor, rows), session, journal))
            write_plan(folder, prepared, clock.decided)
            trained = train_arms(prepared, prepared.trained[:1], session, journal, processes)
            prepared = clock.corrected(prepared, trained)
            trained.add(train_arms(prepared, prepared.untaught[1:], session, journal, processes))
            prepared = teach(prepared, trained, session, journal)
            trained.add(train_arms(prepared, prepared.taught, session, journal, processes))
            dismiss()
            measured = measure_arms(prepared, trained, session, journal)
            metrics = run_metrics(prepared, trained, measured)
            findings = Findings.of(prepared, session, seconds=journal.seconds, command=command)
            write_results(folder, metrics, findings)
            journal.at("report")
            write_page(folder, state="done")  # done only once the report is written
    return folder


def read_inputs(config: Config, display: Display | None = None, processes: str = "") -> tuple[Task, General | None]:
    """The task and its general rows, checked before anything is written.

    Args:
        processes: description of the processes that train together.

    Returns:
        General rows are None where there are none or the model has to write them.

    Raises:
        TellError: a bad row, prompt, budget, ordering, scorer or source.
    """
    wanted_arms(config)
    task = load_task(config, display)
    scorer_of(config, task.kind)  # report a scorer that cannot be loaded now, not after training
    check_benchmarks(config)
    if processes:
        task.notices.add(f"trained by {processes}")
    for text in missing_trackers(config.train.report_to) if trained_arms(config.eval.arms) else ():
        task.notices.add(text)
    get_ordering(config.mix.order)
    check_rows(task, placed_anchor(task))
    limited = limit_task(task, placed_anchor(task))
    check_constraint(limited)
    check_search(limited)
    return task, read_general(task)


def open_session(
    task: Task, journal: Journal, models: ModelCache | None = None, processes: Processes | None = None
) -> Session:
    """The run's model, which stops at a signal; our own engine decodes where several processes train.

    Raises:
        TellError: the configuration asks for what the engine or this machine cannot do.
    """
    config = decoding_beside(task.config, processes)
    if config.model.dtype != task.config.model.dtype:
        task.notices.add("the run computes in fp32: shards are not trained in fp16, and the GPU has no bf16")
    check_planned_model(config.model)
    constrains = any_constrained(config, task.kind.name, config.eval.arms)
    check_engine(config, decides=task.decides, constrains=constrains)
    check, models = journal.stop.check, models or ModelCache()
    left = [arm for arm in trained_arms(config.eval.arms) if not journal.folder.adapter_of(arm).result.exists()]
    if left and (processes is None or not processes.sharded):
        check_trainable(task.files, config.model, held=models.held is not None)
    own = own_alone(config, task)
    return Session(task.files, config, task.chat, task.display, check=check, models=models, stream=own, announce=True)


def settle_anchor(task: Task, session: Session, journal: Journal) -> Anchor:
    """The anchor: given by hand, read from the folder when resumed, or written by the model."""
    journal.at("anchor")
    folder = journal.folder
    if folder.anchor.exists():
        return Anchor.load(folder.anchor)
    anchor = anchor_of(task.config)
    candidates: list[dict] = []
    if anchor is None:
        anchor, candidates = choose_anchor(task, session)
    anchor = place_anchor(task, anchor)
    write_json(folder.anchor, {**anchor.to_dict(), "candidates": candidates})
    if anchor:
        task.display.note(f"anchor ({anchor.origin}, {anchor.place}): {anchor.text}")
    return anchor


def written_by(session: Session, clock: InTime) -> Writer:
    """General rows written by the model until they suffice for the mix and the held-out rows.

    With ``--max-minutes``, as many as the run is predicted to have time for.
    """

    def write(task: Task, table: RowTable) -> General | None:
        if not source_of(task).written:
            return None
        session.load()
        folder = clock.journal.folder
        known = written_by_engine(folder, "general")
        path, facts = write_self_data(session, clock.enough(task, table, known or session.engine.name), known)
        keep_engine(folder, "general", facts["engine"])
        if facts["thrown"]:
            thrown = ", ".join(f"{n} {reason}" for reason, n in sorted(facts["thrown"].items(), key=lambda x: -x[1]))
            text = f"general data: the model answered {facts['asked']:,} prompts, {facts['kept']:,} kept ({thrown})"
            task.notices.texts.append(text)  # not shown: the progress bar already said it
        general = load_general(task, general_source(str(path), task.config.general.columns))
        facts = {**general.facts, "path": f"self: written by {task.files.name}"}
        return replace(general, facts=facts, written=True)

    return write
