"""The training loop: one pass over a mixture, in exactly its order.

Why not transformers' Trainer: the order of the manifest must be the order of training, each example must
weigh the same in a step whatever pass it is computed in, no row may be dropped or padded, and a resumed run
must end with the same adapter. Here these are a hundred lines; there they are overrides of its sampler,
collator, loss, accumulation and random state.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tell.config import TrainConfig
from tell.errors import Diverged, Interrupted
from tell.folder import AdapterFolder
from tell.kernels import keep_memory
from tell.mix.mixture import Mixture
from tell.presets import learning_rate_for
from tell.rows.row_table import RowTable
from tell.train.attention import current_plan
from tell.train.checkpoint import load_checkpoint, put_state, save_checkpoint, state_tensors
from tell.train.lora import add_lora, kept_randomness, remove_lora, save_adapter
from tell.train.packing import TrainRow
from tell.train.parallel import Processes, SharedStep, shard
from tell.train.plain import PaddedRows, PlainBody, plain_step_loss
from tell.train.step import Body, StepLoss, batch_total, step_loss
from tell.train.transfer import FAST_DEVICES, send, trains_fast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step = Callable[..., StepLoss]  # (rows, clip=) of one step; clip() clips the gradients and gives their norm before it


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a progress display needs after a step."""

    step: int
    steps: int
    loss: float
    by_source: dict[str, float]
    tokens: int
    tokens_total: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Totals of a run; ``tokens`` are real tokens, padding never counted."""

    steps: int
    tokens: int
    trained_tokens: int
    seconds: float
    learning_rate: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "seconds": round(self.seconds, 3),
            "learning_rate": self.learning_rate,
        }


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One adapter to train: what on, how, and where it goes. Sent as it is to processes that train along.

    Attributes:
        tables: tokenised rows by source name.
        mixture: which rows to train on, in order.
        seed: of LoRA's initial weights, dropout and noise.
        folder: receives the adapter and its checkpoints.
        log: JSON Lines file of the steps; TensorBoard files go to the folder of the same name.
    """

    tables: Mapping[str, RowTable]
    mixture: Mixture
    settings: TrainConfig
    seed: int
    folder: Path
    log: Path


@dataclass(frozen=True, slots=True)
class TrainingHooks:
    """Callbacks of a training loop.

    Attributes:
        stopped: polled between steps; True writes a checkpoint and raises Interrupted.
        progress: called after each step.
        moved: called within a step, after each forward and backward pass, with the tokens this process trained on.
    """

    stopped: Callable[[], bool] | None = None
    progress: Callable[[StepReport], None] | None = None
    moved: Callable[[int], None] | None = None


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate at a step counted from 0. Warm-up never reaches the last step, so a run of one step learns.

    ``config.learning_rate`` must be resolved; Trainer does that by the size of the model.
    """
    if config.learning_rate is None:
        raise ValueError("learning_rate is not resolved")
    warmup = min(math.ceil(config.warmup_ratio * steps), steps - 1)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - share)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate


def run_digest(config: TrainConfig, mixture: Mixture, seed: int) -> str:
    """What a checkpoint must agree with before it is resumed: settings, seed, order, and the very tokens.

    The mixture's own digest names examples; the tokens tell another anchor, template or tokenizer apart.
    """
    settings = config.model_dump(exclude={"checkpoint_every", "micro_tokens", "parallel"})
    digest = hashlib.sha256(json.dumps([settings, mixture.digest(), seed], sort_keys=True).encode())
    for name in mixture.sources:
        table = mixture.tables[name]
        for column in (table.ids, table.mask, table.starts):
            digest.update(np.ascontiguousarray(column))
    return digest.hexdigest()[:32]


def step_rows(mixture: Mixture, tables: Mapping[str, RowTable], step: int, batch_size: int) -> list[TrainRow]:
    """The rows of one step, in the mixture's order."""
    rows = []
    for at in range(step * batch_size, min((step + 1) * batch_size, len(mixture))):
        source = int(mixture.source[at])
        name = mixture.sources[source]
        ids, mask = tables[name].row(int(mixture.row[at]))
        rows.append(TrainRow(ids, mask, source, name == "task"))
    return rows


class Trainer:
    """Trains one adapter on one mixture.

    Args:
        model: base causal model, frozen; unchanged afterwards.
        job: what to train.
        device: of the model.
        hooks: callbacks.
        processes: that train together, including this one; only the first writes files. With sharded weights the
            model is not restored afterwards.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        job: TrainingJob,
        *,
        device: torch.device | str = "cpu",
        hooks: TrainingHooks = TrainingHooks(),
        processes: Processes | None = None,
    ) -> None:
        config, mixture = job.settings, job.mixture
        if config.learning_rate is None:
            config = config.model_copy(update={"learning_rate": learning_rate_for(model.num_parameters())})
        self.base, self.tables, self.mixture, self.config = model, job.tables, mixture, config
        self.folder, self.log, self.seed, self.device = job.folder, job.log, job.seed, device
        self.hooks, self.processes = hooks, processes
        self.writes = processes is None or processes.leads
        self.steps = mixture.steps(config.batch_size)
        # Nothing random tells rows apart: their common prefix may be computed once.
        self.share_prefix = config.lora_dropout == 0 and config.neftune_alpha == 0

    def run(self, *, resume: bool = False) -> TrainResult:
        """Train to the end and save the adapter.

        Raises:
            Interrupted: ``stopped`` said so; a checkpoint lies in ``folder``.
            Diverged: the loss is no longer a number; no adapter is written.
            TellError: another process failed.
        """
        # The loop seeds dropout anew at each step; a caller's own random numbers go on as if nothing had been drawn.
        with self.processes.job() if self.processes else nullcontext(), kept_randomness(self.device):
            return self._run(resume)

    def _run(self, resume: bool) -> TrainResult:
        config, processes = self.config, self.processes
        was_training = self.base.training
        fast = trains_fast(config.fast, self.device) and not (processes and processes.sharded)
        if fast:
            keep_memory()
        peft_model = add_lora(self.base, config, seed=self.seed, fused=fast)
        noise = _add_noise(peft_model, config.neftune_alpha)
        parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        digest = run_digest(config, self.mixture, self.seed)
        checkpoint = AdapterFolder(self.folder).checkpoint
        first, tokens, trained, seconds = 0, 0, 0, 0.0
        facts = plain = None
        try:
            with self._agreed():
                if processes and processes.sharded:
                    shard(peft_model, torch.device(self.device))
                fused = torch.device(self.device).type in FAST_DEVICES or None  # None: as torch finds best
                optimizer = torch.optim.AdamW(
                    parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
                )
                if resume and self.writes:
                    facts = load_checkpoint(checkpoint, parameters, optimizer, digest=digest)
                if fast:
                    step_of = self._fast_step(Body(peft_model))
                else:
                    plain = PlainBody(peft_model)
                    step_of = self._plain_step(plain)
            if processes:
                facts, state = processes.tell((facts, state_tensors(parameters, optimizer)))
                put_state(state, parameters, optimizer)
                step_of = self._shared(step_of, list(parameters.values()))
            if facts:
                first, tokens, trained, seconds = (
                    facts[key] for key in ("step", "tokens", "trained_tokens", "seconds")
                )
            logger = _StepLog(self.log, keep=first) if self.writes else None

            def clip() -> torch.Tensor:
                return torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm or float("inf"))

            begin = time.monotonic() - seconds
            try:
                for step in range(first, self.steps):
                    rate = learning_rate(config, step, self.steps)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    own = processes.rank << 48 if processes else 0  # each process drops out its own
                    torch.manual_seed(self.seed * 1_000_003 + step + own)  # dropout repeats after a resume
                    rows = step_rows(self.mixture, self.tables, step, config.batch_size)
                    out = step_of(rows, clip=clip)
                    norm = out.norm or 0.0
                    if not math.isfinite(out.loss) or not math.isfinite(norm):
                        raise Diverged(
                            f"training diverged at step {step + 1} of {self.steps} (loss {out.loss:g})",
                            where=str(self.folder),
                            remedy="Lower the learning rate with --lr, and start anew with --overwrite.",
                        )
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    tokens += out.tokens
                    trained += sum(int(row.mask.sum()) for row in rows)
                    seconds = time.monotonic() - begin
                    by_source = self._by_source(out)
                    if logger:
                        logger.write(step + 1, out, by_source, rate, tokens, seconds, norm)
                    if self.hooks.progress:
                        self.hooks.progress(
                            StepReport(step + 1, self.steps, out.loss, by_source, out.tokens, tokens, seconds)
                        )
                    done = step + 1
                    facts = {"digest": digest, "step": done, "tokens": tokens, "trained_tokens": trained}
                    stop = done < self.steps and self._stop_asked()
                    due = config.checkpoint_every and done % config.checkpoint_every == 0 and done < self.steps
                    if stop or due:
                        with self._agreed():
                            if self.writes:
                                save_checkpoint(checkpoint, parameters, optimizer, {**facts, "seconds": seconds})
                    if stop:
                        raise Interrupted(
                            f"stopped after step {done} of {self.steps}",
                            where=str(self.folder),
                            remedy="Go on with `tell tune --resume --out` and the run folder.",
                        )
            finally:
                if logger:
                    logger.close()
            with self._agreed():
                if self.writes:
                    save_adapter(peft_model, self.folder)
        finally:
            if noise is not None:
                noise.remove()
            remove_lora(peft_model).train(was_training)
            if plain is not None:
                plain.give_back()
        return TrainResult(self.steps, tokens, trained, seconds, config.learning_rate)

    def _agreed(self) -> AbstractContextManager[None]:
        return self.processes.agreed() if self.processes else nullcontext()

    def _stop_asked(self) -> bool:
        asked = bool(self.hooks.stopped and self.hooks.stopped())
        return any(self.processes.agree(asked)) if self.processes else asked

    def _fast_step(self, body: Body) -> Step:
        return partial(step_loss, body, share_prefix=self.share_prefix, **self._settings())

    def _plain_step(self, body: PlainBody) -> Step:
        return partial(plain_step_loss, body, **self._settings())

    def _shared(self, step_of: Step, parameters: list[torch.nn.Parameter]) -> SharedStep:
        config = self.config
        total = partial(batch_total, normalization=config.loss_normalization, task_weight=config.task_weight)
        return SharedStep(self.processes, step_of, total, parameters, config.micro_tokens)

    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "normalization": config.loss_normalization,
            "task_weight": config.task_weight,
            "micro_tokens": config.micro_tokens,
            "device": self.device,
            "moved": self.hooks.moved,
        }

    def _by_source(self, out: StepLoss) -> dict[str, float]:
        return {
            name: float(np.mean(out.rows[out.source == i]))
            for i, name in enumerate(self.mixture.sources)
            if (out.source == i).any()
        }


def _add_noise(model: Any, alpha: float) -> Any:
    """NEFTune (arXiv 2310.05914): uniform noise of size alpha / sqrt(L d) on the embeddings while training."""
    if not alpha:
        return None

    def hook(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        if not model.training:
            return output
        plan = current_plan()  # L is each row's own length, whatever it is packed or padded with
        lengths = plan.lengths
        if isinstance(plan, PaddedRows):
            size = send(alpha / (torch.tensor(lengths) * output.shape[-1]).sqrt(), output.device).to(output.dtype)
            return output + torch.empty_like(output).uniform_(-1, 1) * size[:, None, None]
        tokens = send(torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths)), output.device)
        size = alpha / (tokens * output.shape[-1]).sqrt().to(output.dtype)
        return output + torch.empty_like(output).uniform_(-1, 1) * size[:, None]

    return model.get_input_embeddings().register_forward_hook(hook)


class _StepLog:
    """A line a step in JSON Lines, the same numbers for TensorBoard."""

    def __init__(self, path: Path, *, keep: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        if keep and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()[:keep]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        self.board = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path.with_suffix("")), purge_step=keep + 1)

    def write(
        self,
        step: int,
        out: StepLoss,
        by_source: dict[str, float],
        rate: float,
        tokens: int,
        seconds: float,
        norm: float,
    ) -> None:
        row = {
            "step": step,
            "loss": round(out.loss, 6),
            "by_source": {name: round(value, 6) for name, value in by_source.items()},
            "learning_rate": rate,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "grad_norm": round(norm, 6),
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board:
            self.board.add_scalar("loss/all", out.loss, step)
            for name, value in by_source.items():
                self.board.add_scalar(f"loss/{name}", value, step)
            self.board.add_scalar("learning_rate", rate, step)
            self.board.add_scalar("grad_norm", norm, step)

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()
