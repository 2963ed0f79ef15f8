"""One run trained by several processes: the first does everything, the others only train.

What they train on is sent to them, tables and mixture as they are: it is the same to the byte whoever wrote the anchor
or the general data, only the first needs the files, and nothing is tokenised twice.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tell.config import Config
from tell.errors import TellError
from tell.folder import RunFolder
from tell.models.base import FULL
from tell.models.find import ModelFiles, find_model
from tell.run.session import dtype_name, own_engine
from tell.run.stop import Stop
from tell.train.launch import launched

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tell.models.load import Loaded
    from tell.train.parallel import Processes
    from tell.train.training_job import TrainingJob


@dataclass(frozen=True)
class Job:
    """One arm's training, as the first process sends it to the others.

    Attributes:
        model: fingerprint of the base model.
        dtype: ``bf16``, ``fp16`` or ``fp32``; shards are never fp16.
    """

    model: str
    dtype: str
    training: TrainingJob


@dataclass(frozen=True)
class FreeShards:
    """The first process asks the others to drop the model that they trained last."""


@contextmanager
def processes_of(config: Config) -> Iterator[Processes | None]:
    """The group of processes that this one was started in; None where it was started alone.

    Raises:
        TellError: the configuration needs what several processes cannot do, or what one cannot.
    """
    processes = _join(config)
    try:
        yield processes
    finally:
        if processes is not None and processes.leads:
            processes.dismiss(None)


@contextmanager
def helpers(processes: Processes | None, folder: RunFolder) -> Iterator[Callable[[], None]]:
    """Keeps the other processes waiting for trainings; calling what it yields, or leaving the block, releases them."""

    def dismiss() -> None:
        if processes is not None:
            processes.dismiss(str(folder.root))

    try:
        yield dismiss
    finally:
        if processes is not None:
            processes.dismiss(str(folder.root) if folder.status.exists() else None)


def _join(config: Config) -> Processes | None:
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
        raise TellError("vLLM does not run under torchrun", where="generate.engine", remedy="Use generate.engine=own.")
    if sharded and config.max_minutes:
        raise TellError(
            "times are measured on a model that fits on one device",
            where="--max-minutes with train.parallel=fsdp",
            remedy="Set the amount instead, e.g. --general-tokens.",
        )
    if sharded and config.model.base != FULL:
        raise TellError(
            "quantised weights are not sharded",
            where=f"model.base={config.model.base} with train.parallel=fsdp",
            remedy="Use train.parallel=ddp, or model.base=full.",
        )
    if sharded and config.model.dtype == "fp16":
        raise TellError(
            "shards are not trained in fp16",
            where="model.dtype=fp16 with train.parallel=fsdp",
            remedy="Use model.dtype=auto, bf16 or fp32, or train.parallel=ddp.",
        )
    from tell.models.load import choose_device
    from tell.train.parallel import Processes

    return Processes(launch, choose_device(config.model.device).type, sharded=sharded)


def decoding_beside(config: Config, processes: Processes | None) -> Config:
    """The configuration to answer by: our own engine where there are other processes, in the shards' number format."""
    if processes is None:
        return config
    config = own_engine(config)
    if not processes.sharded or config.model.dtype != "auto" or _auto_dtype(config) != "torch.float16":
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "fp32"})})


def _auto_dtype(config: Config) -> str:
    """``torch.bfloat16`` or the like: what ``model.dtype=auto`` means on the run's device."""
    from tell.models.load import choose_device, choose_dtype

    return str(choose_dtype("auto", choose_device(config.model.device))[0])


def load_shared(files: ModelFiles, config: Config) -> tuple[Loaded, torch.device]:
    """The first process's model on the CPU, ready to be sharded, and the device it will compute on.

    Where the files have the number format of the run, its weights are the files' pages, mapped and not copied.
    """
    from tell.models.load import choose_device, load_model

    gc.collect()  # the previous arm's shards are in reference cycles
    device = choose_device(config.model.device)
    dtype = config.model.dtype
    if dtype == "auto":  # shards are not trained in fp16
        dtype = "bf16" if _auto_dtype(config) == "torch.bfloat16" else "fp32"
    return load_model(files, dtype=dtype, device="cpu", trust_remote_code=config.model.trust_remote_code), device


def help_training(processes: Processes, config: Config) -> RunFolder:
    """Train along with the first process until it says that training is over.

    Returns:
        The run folder; the first process may still be at work in it.

    Raises:
        TellError: this process cannot continue, or the first process started no run.
    """
    stop = Stop(Path(config.out or "."))
    base = None
    with stop.listening():
        while isinstance(job := processes.broadcast(), Job | FreeShards):
            if isinstance(job, FreeShards):
                base = None
                _free(processes)
                continue
            try:
                with processes.agreed():
                    base = _base(job, config, processes, base)
                _train(job, *base, processes, stop)
            except Exception:
                if processes.busy:  # the others have not failed
                    raise
    if job is None:
        raise TellError("the first process started no run", where="torchrun", remedy="See that process's own message.")
    return RunFolder(job)


def _base(job: Job, config: Config, processes: Processes, held: tuple[Any, Any] | None) -> tuple[Any, Any]:
    """(model, device) of a job; an unsharded model serves the next job too."""
    if held is not None and not processes.sharded:
        return held
    from tell.models.load import DTYPES, choose_device, empty_model, load_model

    settings = config.model
    files = find_model(settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    if files.fingerprint != job.model:
        raise TellError(
            f"is not the model of the first process ({files.fingerprint}, not {job.model})",
            where=str(files.path),
            remedy="Put the same files on every machine.",
        )
    if processes.sharded:  # the first process sends the weights, layer by layer
        empty = empty_model(files, DTYPES[job.dtype], trust_remote_code=settings.trust_remote_code)
        return empty, choose_device(settings.device)
    given = {"dtype": job.dtype, "device": settings.device, "base": settings.base}
    loaded = load_model(files, trust_remote_code=settings.trust_remote_code, **given)
    return loaded.model, loaded.device


def free_shards(processes: Processes) -> None:
    """Give a sharded model's GPU memory back in every process: the first needs all of it to answer.

    The caller has dropped the model, and the others wait for a job.

    Raises:
        TellError: a process has ended.
    """
    processes.broadcast(FreeShards())
    _free(processes)


def _free(processes: Processes) -> None:
    import torch

    gc.collect()  # shards are in reference cycles
    torch.cuda.empty_cache()
    processes.agree()


def _train(job: Job, model: PreTrainedModel, device: torch.device, processes: Processes, stop: Stop) -> None:
    from tell.train.trainer import Trainer
    from tell.train.training_job import TrainingHooks

    hooks = TrainingHooks(stopped=stop)
    Trainer(model, job.training, device=device, hooks=hooks, processes=processes).run(resume=True)


def start_job(processes: Processes, files: ModelFiles, loaded: Loaded, training: TrainingJob) -> None:
    """Send an arm to the other processes to train; the caller then trains too.

    Args:
        files, loaded: the base model.

    Raises:
        TellError: one of them cannot.
    """
    processes.broadcast(Job(files.fingerprint, dtype_name(loaded), training))
    processes.agree()
