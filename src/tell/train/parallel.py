"""Several processes train one adapter: each computes its share of every step's rows; gradients are summed.

Position weights follow from the whole step, so the sum over processes is the gradient of one process. Why not torch's
DistributedDataParallel: it averages over processes and hooks the model's forward, which packed passes bypass; the
adapter's gradients are a few megabytes, and one flat all-reduce after the last pass is the only exchange.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tell.errors import Diverged, Interrupted, TellError, first_line
from tell.train.launch import Launch
from tell.train.packing import TrainRow
from tell.train.plain import padded_batches
from tell.train.step import StepLoss, StepNumbers, StepRules

if TYPE_CHECKING:
    from peft import PeftModel

PATIENCE = timedelta(days=7)  # the others wait while the first writes an anchor or general data
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and number format by a tensor's name
Step = Callable[..., StepLoss]  # (rows, *, clip=, total=), as ``step_loss``


class Processes:
    """The processes of one run and their communication.

    Args:
        launch: this process's ranks.
        device: ``cpu`` or ``cuda``.
        sharded: the base model's weights are sharded over the processes (FSDP), not copied to each.

    Raises:
        TellError: no GPU for this process, or a device that processes do not share.
    """

    def __init__(self, launch: Launch, device: str, *, sharded: bool) -> None:
        self.rank, self.world, self.sharded = launch.rank, launch.world, sharded
        self.leads = launch.rank == 0
        self.busy = False  # in mid-training, where the others may be at any step
        self.dismissed = False
        if device not in ("cpu", "cuda"):
            raise TellError(
                f"several processes do not train on {device}",
                where="torchrun",
                remedy="Start one process, without torchrun, or use --set model.device=cpu.",
            )
        if device == "cuda":
            if launch.local >= (count := torch.cuda.device_count()):
                raise TellError(
                    f"process {launch.local + 1} of this machine finds {count} GPUs",
                    where="torchrun",
                    remedy=f"Use --nproc-per-node {count}, or --set model.device=cpu.",
                )
            torch.cuda.set_device(launch.local)
        backend = "nccl" if device == "cuda" else "gloo"
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=PATIENCE)
        self.control = dist.new_group(backend="gloo", timeout=PATIENCE)

    def __str__(self) -> str:
        return f"{self.world} processes ({'fsdp' if self.sharded else 'ddp'})"

    def broadcast(self, value: object = None) -> Any:
        """Broadcasts the first process's ``value``.

        Raises:
            TellError: a process has ended.
        """
        box = [value]
        with _connected():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def agree(self, value: object = None, error: Exception | None = None) -> list[Any]:
        """Gathers the values of all processes by rank. If one has an error, it raises that, the others a TellError.

        Raises:
            TellError: a process has ended.
        """
        gathered: list[Any] = [None] * self.world
        with _connected():
            dist.all_gather_object(
                gathered, (value, error and (str(error) or type(error).__name__)), group=self.control
            )
        failed = [(rank, text) for rank, (_, text) in enumerate(gathered) if text]
        if failed:
            self.busy = False  # no process may still be sending
            if error is not None:
                raise error
            rank, text = failed[0]
            raise TellError(text, where=f"rank {rank}")
        return [value for value, _ in gathered]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """The block succeeds in every process, or fails in every process."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error=error)

    @contextmanager
    def job(self) -> Iterator[None]:
        """One training; Diverged and Interrupted reach all processes at the same step, so the next one can follow."""
        self.busy = True
        try:
            yield
        except (Diverged, Interrupted):
            self.busy = False
            raise
        self.busy = False

    def dismiss(self, word: object) -> None:
        """Release the waiting processes with a last ``word``; if this process alone failed, just exit."""
        if not self.busy and not self.dismissed:
            self.dismissed = True
            with suppress(TellError):
                self.broadcast(word)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums every parameter's gradient over processes; a missing one counts as zero."""
        parameters = list(parameters)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        flat = torch.cat(parts)
        with _connected():
            dist.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            if p.grad is None:
                p.grad = part.view_as(p)
            else:
                p.grad.copy_(part.view_as(p))  # in place: views of it may be in use


@contextmanager
def _connected() -> Iterator[None]:
    """Turns a lost connection into a TellError; torch has no exception class for those of gloo."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TellError(
            f"another process of this run has ended ({first_line(error)})",
            where="torchrun",
            remedy="Read its own message, then continue with --resume.",
        ) from error


def split_rows(rows: Sequence[TrainRow], parts: int) -> list[list[TrainRow]]:
    """``parts`` shares of nearly equal tokens, each in the rows' order; a share may be empty."""
    owner = [0] * len(rows)
    load = [0] * parts
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i)):
        owner[i] = min(range(parts), key=lambda part: (load[part], part))
        load[owner[i]] += len(rows[i].ids)
    return [[row for row, at in zip(rows, owner, strict=True) if at == part] for part in range(parts)]


class SharedStep:
    """A step computed by all processes; called like the step of one.

    Args:
        processes: of the run.
        step: computes this process's share; accumulates gradients.
        rules: of the step.
        parameters: whose gradients are summed.
    """

    def __init__(self, processes: Processes, step: Step, rules: StepRules, parameters: Sequence[nn.Parameter]) -> None:
        self.processes, self.step, self.rules, self.parameters = processes, step, rules, list(parameters)

    def __call__(self, rows: list[TrainRow], clip: Callable[[], Tensor] | None = None) -> StepLoss:
        processes = self.processes
        if processes.sharded:  # if a pass fails, the others are stuck in theirs: nothing to agree on
            with _connected():
                part = self._sharded(rows)
            parts = processes.agree(part)
        else:
            part, error = None, None
            try:
                part = self._own(split_rows(rows, processes.world)[processes.rank], self.rules.total(rows))
            except Exception as caught:
                error = caught
            parts = processes.agree(part, error)
        processes.add_gradients(self.parameters)
        means = np.concatenate([part.rows for part in parts])
        numbers = StepNumbers(sum(part.loss for part in parts), means, float(clip()) if clip else None)
        source = np.concatenate([part.source for part in parts])
        return StepLoss(numbers, source, sum(part.tokens for part in parts))

    def _own(self, rows: list[TrainRow], total: float) -> StepLoss:
        if not rows:
            return StepLoss(StepNumbers(0.0, np.zeros(0, np.float32)), np.zeros(0, np.int64), 0)
        return self.step(rows, total=total)

    def _sharded(self, rows: list[TrainRow]) -> StepLoss:
        """Each pass gathers weights from all processes, so all run equally many; extra ones have no weight."""
        shares = split_rows(rows, self.processes.world)
        passes = [len(padded_batches(share, self.rules.micro_tokens)) for share in shares]
        part = self._own(shares[self.processes.rank], self.rules.total(rows))
        shortest = min(rows, key=lambda row: len(row.ids))
        for _ in range(max(passes) - passes[self.processes.rank]):
            self.step([shortest], total=float("inf"))
        return part


def shard(peft_model: PeftModel, device: torch.device, processes: Processes) -> None:
    """Shard a model's frozen weights over all processes, layer by layer; its adapters stay whole in each.

    Every tensor is the first process's, sent when its layer is sharded: the others need no weights of their own, and
    hold one layer at a time, or embedding and head, next to their shards. Why not the files' slices in each process:
    what transformers makes of them (renamed, joined, tied, cast) is then computed once.

    Args:
        peft_model: with its LoRA; outside the first process its weights may be on the meta device.
        device: where it computes from now on.

    Raises:
        TellError: torch is too old, the model does not declare its layers, or is not built alike in all processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    with processes.agreed():
        layers = _layers(peft_model)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(peft_model)}
    first = processes.broadcast(shapes)
    with processes.agreed():
        _check_alike(shapes, first)
    dtypes = {id(tensor): first[name][1] for name, tensor in _tensors(peft_model)}  # no reference to what is sharded
    adapters = [p for p in peft_model.parameters() if p.requires_grad]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    with torch.no_grad(), _connected():
        for tensor in (*adapters, *(buffer for _, buffer in _buffers(peft_model))):
            _receive(tensor, dtypes[id(tensor)], device, processes)
        for module in (*layers, peft_model):
            for p in module.parameters():
                if not p.requires_grad and not isinstance(p, DTensor):
                    _receive(p, dtypes[id(p)], device, processes)
            fully_shard(module, mesh=mesh, ignored_params=set(adapters))


def _layers(peft_model: PeftModel) -> list[nn.Module]:
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise TellError(
            f"torch {torch.__version__} cannot leave adapters whole",
            where="train.parallel=fsdp",
            remedy="Update torch (pip install -U torch).",
        )
    causal: Any = peft_model.get_base_model()
    names = set(causal._no_split_modules or ())
    layers = [module for module in causal.modules() if type(module).__name__ in names]
    if not layers:
        raise TellError(
            f"{type(causal).__name__} does not say which modules are its layers",
            where="train.parallel=fsdp",
            remedy="Use train.parallel=ddp.",
        )
    return layers


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that are not saved too; one under each of its names, which differ between loaded and empty models."""
    return model.named_buffers(remove_duplicate=False)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from _buffers(model)


def _check_alike(shapes: Shapes, first: Shapes) -> None:
    """Refuse a model whose tensors are not the first process's, by name and shape; their formats may differ."""
    here = {name: shape for name, (shape, _) in shapes.items()}
    there = {name: shape for name, (shape, _) in first.items()}
    if list(here.items()) != list(there.items()):
        odd = sorted({name for name, _ in here.items() ^ there.items()})
        raise TellError(
            f"the model is not built as in the first process ({odd[0] if odd else 'another order'})",
            where="train.parallel=fsdp",
            remedy="Install the same versions of torch, transformers and peft everywhere, or use train.parallel=ddp.",
        )


def _receive(tensor: Tensor, dtype: torch.dtype, device: torch.device, processes: Processes) -> None:
    """Replace a tensor, in place, by the first process's, whole and on ``device``."""
    if processes.leads:
        full = tensor.detach().to(device).contiguous()
    else:
        full = torch.empty(tensor.shape, dtype=dtype, device=device)
    dist.broadcast(full, src=0)
    if not tensor.is_meta:
        tensor.data = full
    elif isinstance(tensor, nn.Parameter):
        torch.utils.swap_tensors(tensor, nn.Parameter(full, requires_grad=tensor.requires_grad))
    else:
        torch.utils.swap_tensors(tensor, full)
