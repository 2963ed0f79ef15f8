"""One run trained by several processes: the first does all a run does, the others come in for its training alone.

What they train on is sent to them, tables and mixture as they are: it is the same to the byte whatever wrote the anchor
or the general data, only the first needs the files, and nothing is tokenised twice.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tell.config import Config
from tell.errors import TellError
from tell.folder import RunFolder
from tell.models.find import ModelFiles, find_model
from tell.run.prepare import Task
from tell.run.record import dtype_name
from tell.run.stop import Stop
from tell.train.launch import launched

if TYPE_CHECKING:
    from tell.train.parallel import Processes
    from tell.train.trainer import TrainingJob


@dataclass(frozen=True)
class Job:
    """One arm's training, as the first process tells it the others.

    Attributes:
        model: fingerprint of the base model.
        dtype: ``bf16`` or ``fp32``.
    """

    model: str
    dtype: str
    training: TrainingJob


def with_processes(config: Config, lead: Callable[[Processes | None], RunFolder]) -> RunFolder:
    """``lead`` in the first process of a run, or the only one; the others help it to train.

    Raises:
        TellError: the configuration asks for what several processes cannot do, or what one cannot.
    """
    processes = _join(config)
    if processes is None:
        return lead(None)
    if not processes.leads:
        return _help(processes, config)
    try:
        return lead(processes)
    finally:
        processes.dismiss(None)


def _join(config: Config) -> Processes | None:
    """The processes that this one was started with; None where it was started alone."""
    launch = launched()
    sharded = config.train.parallel == "fsdp"
    if launch is None:
        if sharded:
            raise TellError(
                "needs several processes",
                where="train.parallel=fsdp",
                remedy="Start it as `torchrun --nproc-per-node N -m tell tune ...`, or set train.parallel=auto.",
            )
        return None
    if config.generate.engine == "vllm":
        raise TellError("vLLM does not run beside torchrun", where="generate.engine", remedy="Use generate.engine=own.")
    if sharded and config.max_minutes:
        raise TellError(
            "times are measured on a model that one device holds",
            where="--max-minutes with train.parallel=fsdp",
            remedy="Set the amount instead, e.g. --general-tokens.",
        )
    from tell.models.load import choose_device
    from tell.train.parallel import Processes

    return Processes(launch, choose_device(config.model.device).type, sharded=sharded)


def decoding_beside(config: Config, processes: Processes | None) -> Config:
    """The configuration to load the engine by: our own where there are other processes."""
    if processes is None:
        return config
    return config.model_copy(update={"generate": config.generate.model_copy(update={"engine": "own"})})


def load_spread(files: ModelFiles, config: Config) -> tuple[Any, Any]:
    """A `tell.models.load.Loaded` on the processor, to be spread over processes, and the device it will compute on."""
    from tell.models.load import choose_device, choose_dtype, load_model

    gc.collect()  # the shares of an arm before it hang in cycles
    device = choose_device(config.model.device)
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bf16" if "bfloat16" in str(choose_dtype("auto", device)[0]) else "fp32"
    return load_model(files, dtype=dtype, device="cpu", trust_remote_code=config.model.trust_remote_code), device


def _help(processes: Processes, config: Config) -> RunFolder:
    """Train with the first process what it says, until it says that training is over.

    Returns:
        The run folder; the first process may still be at work in it.

    Raises:
        TellError: this process cannot go on, or there is no run to help with.
    """
    stop = Stop(Path(config.out or "."))
    base = None
    with stop.listening():
        while isinstance(job := processes.broadcast(), Job):
            try:
                with processes.agreed():
                    base = _base(job, config, processes, base)
                _train(job, *base, processes, stop)
            except Exception:
                if processes.busy:  # the others do not know
                    raise
    if job is None:
        raise TellError("the first process began no run", where="torchrun", remedy="Its own message says why.")
    return RunFolder(job)


def _base(job: Job, config: Config, processes: Processes, held: tuple[Any, Any] | None) -> tuple[Any, Any]:
    """(model, device) of a job; whole, it serves the next job too."""
    if held is not None and not processes.sharded:
        return held
    from tell.models.load import load_model

    settings = config.model
    files = find_model(settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    if files.fingerprint != job.model:
        raise TellError(
            f"is not the model of the first process ({files.fingerprint}, not {job.model})",
            where=str(files.path),
            remedy="Put the same files on every machine.",
        )
    settings = settings.model_copy(update={"dtype": job.dtype})
    if processes.sharded:
        loaded, device = load_spread(files, config.model_copy(update={"model": settings}))
        return loaded.model, device
    loaded = load_model(files, dtype=job.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code)
    return loaded.model, loaded.device


def _train(job: Job, model: Any, device: Any, processes: Processes, stop: Stop) -> None:
    from tell.train.trainer import Trainer, TrainingHooks

    hooks = TrainingHooks(stopped=stop)
    Trainer(model, job.training, device=device, hooks=hooks, processes=processes).run(resume=True)


def start_job(processes: Processes, task: Task, loaded: Any, training: TrainingJob) -> None:
    """Call the others to train an arm; the caller trains next.

    Args:
        loaded: the base model, a `tell.models.load.Loaded`.

    Raises:
        TellError: one of them cannot.
    """
    processes.broadcast(Job(task.files.fingerprint, dtype_name(loaded), training))
    processes.agree()
