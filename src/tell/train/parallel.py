"""Several processes train one adapter: each computes its share of every step's rows, gradients are summed.

The weights of positions are set from the whole step, so the sum over processes is the gradient of one process. Why not
torch's DistributedDataParallel: it averages over processes and hooks the model's forward, which packed passes go
around; the adapter's gradients are a few megabytes, and one flat sum after the last pass is all there is to exchange.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tell.errors import Diverged, Interrupted, TellError, first_line
from tell.train.launch import Launch
from tell.train.packing import TrainRow
from tell.train.plain import padded_batches
from tell.train.step import StepLoss

PATIENCE = timedelta(days=7)  # the others wait while the first one writes an anchor or general data


class Processes:
    """The processes of one run: which one this is, and what they tell each other.

    Args:
        launch: what the launcher says.
        device: that this process computes on, as a type.
        sharded: the base model's weights are spread over the processes (FSDP), not copied to each.

    Raises:
        TellError: no GPU for this process, or a device that processes do not share.
    """

    def __init__(self, launch: Launch, device: str, *, sharded: bool) -> None:
        self.rank, self.world, self.sharded = launch.rank, launch.world, sharded
        self.leads = launch.rank == 0
        self.busy = False  # in the middle of a training, where the others may be anywhere
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

    def tell(self, value: Any = None) -> Any:
        """What the first process gives, in every process.

        Raises:
            TellError: a process has ended.
        """
        box = [value]
        with _connected():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def agree(self, value: Any = None, error: Exception | None = None) -> list[Any]:
        """The values of all processes by rank; where one has an error, all raise: it its own, the others a TellError.

        Raises:
            TellError: a process has ended.
        """
        told: list[Any] = [None] * self.world
        with _connected():
            dist.all_gather_object(told, (value, error and (str(error) or type(error).__name__)), group=self.control)
        failed = [(rank, text) for rank, (_, text) in enumerate(told) if text]
        if failed:
            self.busy = False  # all have come here, and all go back
            if error is not None:
                raise error
            rank, text = failed[0]
            raise TellError(text, where=f"rank {rank}")
        return [value for value, _ in told]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What is done inside is done in every process, or fails in every process."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error=error)

    @contextmanager
    def job(self) -> Iterator[None]:
        """One training; what ends it in every process at the same step leaves them ready for the next."""
        self.busy = True
        try:
            yield
        except (Diverged, Interrupted):
            self.busy = False
            raise
        self.busy = False

    def dismiss(self, word: Any) -> None:
        """Let the waiting processes go with a last ``word``; at a failure that only this one knows of, just leave."""
        if not self.busy and not self.dismissed:
            self.dismissed = True
            with suppress(TellError):
                self.tell(word)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every parameter's gradient becomes the sum over processes; where one has none it counts as zero."""
        parameters = list(parameters)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        flat = torch.cat(parts)
        with _connected():
            dist.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)


@contextmanager
def _connected() -> Iterator[None]:
    """A connection that broke or timed out as a TellError; torch raises no class of its own for those of gloo."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TellError(
            f"another process of this run has ended ({first_line(error)})",
            where="torchrun",
            remedy="Its own message says why; go on with --resume.",
        ) from error


def split_rows(rows: Sequence[TrainRow], parts: int) -> list[list[TrainRow]]:
    """Rows in ``parts`` shares of near-equal tokens, each in the rows' order; a share may be empty."""
    owner = [0] * len(rows)
    load = [0] * parts
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i)):
        owner[i] = min(range(parts), key=lambda part: (load[part], part))
        load[owner[i]] += len(rows[i].ids)
    return [[row for row, at in zip(rows, owner, strict=True) if at == part] for part in range(parts)]


class _Part(NamedTuple):
    """What one process computed of a step, as in ``StepLoss``."""

    loss: float
    rows: np.ndarray
    source: np.ndarray
    tokens: int


class SharedStep:
    """A step computed by all processes; called like that of one.

    Args:
        processes: of the run.
        step: (rows, total=) of the own share; accumulates gradients.
        total: normaliser of a step, as ``step.batch_total``.
        parameters: whose gradients are summed.
        micro_tokens: tokens of one pass.
    """

    def __init__(
        self,
        processes: Processes,
        step: Callable[..., StepLoss],
        total: Callable[[Sequence[TrainRow]], float],
        parameters: Sequence[nn.Parameter],
        micro_tokens: int,
    ) -> None:
        self.processes, self.step, self.total, self.micro_tokens = processes, step, total, micro_tokens
        self.parameters = list(parameters)

    def __call__(self, rows: list[TrainRow], clip: Callable[[], Tensor]) -> StepLoss:
        processes = self.processes
        if processes.sharded:  # a pass that fails leaves the others inside it: nothing to agree on
            with _connected():
                part = self._sharded(rows)
            parts = processes.agree(part)
        else:
            part, error = None, None
            try:
                part = self._own(split_rows(rows, processes.world)[processes.rank], self.total(rows))
            except Exception as caught:
                error = caught
            parts = processes.agree(part, error)
        processes.add_gradients(self.parameters)
        return StepLoss(
            sum(part.loss for part in parts),
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.source for part in parts]),
            sum(part.tokens for part in parts),
            float(clip()),
        )

    def _own(self, rows: list[TrainRow], total: float) -> _Part:
        if not rows:
            return _Part(0.0, np.zeros(0, np.float32), np.zeros(0, np.int64), 0)
        out = self.step(rows, total=total)
        return _Part(out.loss, out.rows, out.source, out.tokens)

    def _sharded(self, rows: list[TrainRow]) -> _Part:
        """Each pass gathers weights from all processes, so all make as many; the last of some weigh nothing."""
        shares = split_rows(rows, self.processes.world)
        passes = [len(padded_batches(share, self.micro_tokens)) for share in shares]
        part = self._own(shares[self.processes.rank], self.total(rows))
        shortest = min(rows, key=lambda row: len(row.ids))
        for _ in range(max(passes) - passes[self.processes.rank]):
            self.step([shortest], total=float("inf"))
        return part


def shard(peft_model: Any, device: torch.device) -> None:
    """Spread a model's frozen weights over all processes, layer by layer; its adapters stay whole in each.

    Args:
        peft_model: with its LoRA, on the processor or on ``device``.
        device: where it computes from now on.

    Raises:
        TellError: torch is too old, or the model does not tell its layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise TellError(
            f"torch {torch.__version__} cannot leave adapters whole",
            where="train.parallel=fsdp",
            remedy="Update torch (pip install -U torch).",
        )
    causal = peft_model.get_base_model()
    names = set(causal._no_split_modules or ())
    layers = [module for module in causal.modules() if type(module).__name__ in names]
    if not layers:
        raise TellError(
            f"{type(causal).__name__} does not say which modules are its layers",
            where="train.parallel=fsdp",
            remedy="Use train.parallel=ddp.",
        )
    adapters = {p for p in peft_model.parameters() if p.requires_grad}
    for p in adapters:
        p.data = p.data.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*layers, peft_model):
        fully_shard(module, mesh=mesh, ignored_params=adapters)
