"""The training loop: one pass over a mixture, in exactly its order.

Why not transformers' Trainer: training must follow the order of the manifest, each example must have the same weight in
a step whatever pass it is computed in, no row may be dropped or padded, and a resumed run must end with the same
adapter. Here that takes a hundred lines; there it would override sampler, collator, loss, accumulation and random
state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from tell.errors import Diverged, Interrupted
from tell.folder import AdapterFolder
from tell.kernels import keep_memory
from tell.mix.mixture import ANCHORED, GENERAL
from tell.presets import learning_rate_for
from tell.train.attention import current_plan
from tell.train.average import WeightMean
from tell.train.checkpoint import load_checkpoint, load_state, save_checkpoint, state_tensors
from tell.train.device import FAST_DEVICES, kept_randomness, send, trains_fast
from tell.train.lora import add_lora, remove_lora, save_adapter
from tell.train.packing import TrainRow
from tell.train.parallel import Processes, SharedStep, Step, shard
from tell.train.plain import PaddedRows, PlainBody, plain_step_loss
from tell.train.step import Body, StepLoss, StepRules, step_loss
from tell.train.step_log import StepLog, StepReport
from tell.train.training_job import TrainingHooks, TrainingJob, TrainResult, learning_rate, run_digest, step_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


DISTILLED = "general-distillation"
"""In logs, the loss of general rows that are trained on the untuned model's distributions: cross-entropy to these."""


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
        hooks: TrainingHooks = TrainingHooks(),  # noqa: B008  (frozen)
        processes: Processes | None = None,
    ) -> None:
        rate = job.settings.learning_rate
        self.rate = rate or learning_rate_for(
            model.num_parameters(), mixed=GENERAL in job.mixture.sources
        )  # the peak rate
        config = job.settings.model_copy(update={"learning_rate": self.rate})
        self.base, self.job, self.config = model, job, config
        self.device, self.hooks, self.processes = torch.device(device), hooks, processes
        self.sharded = processes is not None and processes.sharded
        self.writes = processes is None or processes.leads
        self.fast = trains_fast(config.fast, device) and not self.sharded
        self.steps = job.mixture.steps(config.batch_size)
        self.targets = job.targets if config.general_target != "text" else None
        if config.general_target == "untuned" and job.targets is None and not ANCHORED.issuperset(job.mixture.sources):
            raise ValueError("general_target is untuned, and the job has no targets (tell.train.soft_targets)")
        self.rules = StepRules(
            config.loss_normalization,
            config.task_weight,
            config.micro_tokens,
            share_prefix=config.lora_dropout == 0 and config.neftune_alpha == 0,  # nothing random differs between rows
        )

    def run(self, *, resume: bool = False) -> TrainResult:
        """Train to the end and save the adapter.

        Raises:
            Interrupted: ``stopped`` returned True; there is a checkpoint in the job's folder.
            Diverged: the loss is not finite; no adapter is written.
            TellError: another process failed.
        """
        # The loop seeds dropout at each step; the caller's random numbers continue as if nothing had been drawn.
        with self.processes.job() if self.processes else nullcontext(), kept_randomness(self.device):
            if self.fast:
                keep_memory()
            with self._tuned() as (model, plain):
                run = self._start(model, plain, resume)
                self._train(run, model)
                with self._agreed():
                    if self.writes:
                        self._finish(run)
                        save_adapter(model, self.job.folder)
        totals = run.totals
        return TrainResult(self.steps, totals.tokens, totals.trained_tokens, totals.seconds, self.rate)

    @contextmanager
    def _tuned(self) -> Iterator[tuple[PeftModel, PlainBody | None]]:
        """The base model with an adapter to train, on the plain path or not; restored at the end."""
        was_training, plain = self.base.training, None
        model = add_lora(self.base, self.config, seed=self.job.seed, fused=self.fast)
        try:
            with self._agreed():
                plain = None if self.fast else PlainBody(model)
            with _noise(model, self.config.neftune_alpha):
                yield model, plain
        finally:
            remove_lora(model).train(was_training)
            if plain is not None:
                plain.give_back()

    def _start(self, model: PeftModel, plain: PlainBody | None, resume: bool) -> _Run:
        """Set up the first step, from a checkpoint where there is one; the same in every process."""
        config, processes = self.config, self.processes
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        facts = None
        with self._agreed():
            if self.sharded:
                shard(model, self.device)
            optimizer = torch.optim.AdamW(
                parameters.values(),
                lr=self.rate,
                weight_decay=config.weight_decay,
                fused=self.device.type in FAST_DEVICES or None,  # None: torch decides
            )
            digest = run_digest(config, self.job.mixture, self.job.seed)
            average = WeightMean(parameters, config.average, self.steps) if config.average and self.writes else None
            if resume and self.writes:
                facts = load_checkpoint(self._checkpoint, parameters, optimizer, digest=digest, more=_state(average))
            one = partial(plain_step_loss, plain) if plain is not None else partial(step_loss, Body(model))
            step: Step = partial(one, rules=self.rules, moved=self.hooks.moved)
        if processes:
            facts, state = processes.broadcast((facts, state_tensors(parameters, optimizer)))
            load_state(state, parameters, optimizer)
            step = SharedStep(processes, step, self.rules, list(parameters.values()))
        totals = _Totals(**{name: facts[name] for name in asdict(_Totals())}) if facts else _Totals()
        return _Run(parameters, optimizer, step, digest, totals, average)

    @torch.no_grad()
    def _finish(self, run: _Run) -> None:
        """From the weights after the last step to those that are saved.

        The update is B A, so its factor goes into B (WiSE-FT, arXiv 2109.01903): whoever loads the adapter has it.
        """
        if run.average is not None:
            run.average.apply()
        if self.config.adapter_scale != 1:
            for name, p in run.parameters.items():
                if ".lora_B." in name:
                    p.mul_(self.config.adapter_scale)

    def _train(self, run: _Run, model: PeftModel) -> None:
        keep, note = run.totals.step, self.hooks.note
        logger = StepLog(self.job.log, self.config, keep=keep, note=note) if self.writes else None
        begin = time.monotonic() - run.totals.seconds
        try:
            for step in range(run.totals.step, self.steps):
                rate = learning_rate(self.config, step, self.steps)
                rows = step_rows(self.job.mixture, self.job.tables, step, self.config.batch_size, self.targets)
                out = self._step(run, step, rows, rate)
                run.totals.add(out.tokens, sum(int(row.mask.sum()) for row in rows), time.monotonic() - begin)
                if run.average is not None:
                    run.average.add(run.totals.step)
                report = self._report(run.totals, out)
                if logger:
                    logger.write(report, rate, out.norm or 0.0)
                if self.hooks.progress:
                    self.hooks.progress(report)
                if self.writes and (place := self.hooks.marks.get(run.totals.step)) is not None:
                    save_adapter(model, place)
                self._pause(run)
        finally:
            if logger:
                logger.close()

    def _step(self, run: _Run, step: int, rows: list[TrainRow], rate: float) -> StepLoss:
        """One optimiser step.

        Raises:
            Diverged: the loss or the gradient is not finite.
        """

        def clip() -> torch.Tensor:
            return nn.utils.clip_grad_norm_(run.parameters.values(), self.config.max_grad_norm or float("inf"))

        for group in run.optimizer.param_groups:
            group["lr"] = rate
        rank = self.processes.rank << 48 if self.processes else 0  # dropout differs between processes
        torch.manual_seed(self.job.seed * 1_000_003 + step + rank)  # and repeats after a resume
        out = run.step(rows, clip=clip)
        if not math.isfinite(out.loss) or not math.isfinite(out.norm or 0.0):
            raise Diverged(
                f"training diverged at step {step + 1} of {self.steps} (loss {out.loss:g})",
                where=str(self.job.folder),
                remedy="Lower the learning rate with --lr, and start over with --overwrite.",
            )
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        return out

    def _report(self, totals: _Totals, out: StepLoss) -> StepReport:
        by_source = {
            name if self.targets is None or name in ANCHORED else DISTILLED: float(np.mean(out.rows[out.source == i]))
            for i, name in enumerate(self.job.mixture.sources)
            if (out.source == i).any()
        }
        return StepReport(totals.step, self.steps, out.loss, by_source, out.tokens, totals.tokens, totals.seconds)

    def _pause(self, run: _Run) -> None:
        """Write a checkpoint where one is due, and stop if requested, unless the run is at its end.

        Raises:
            Interrupted: it was stopped.
        """
        done, every = run.totals.step, self.config.checkpoint_every
        if done == self.steps:
            return
        stop = bool(self.hooks.stopped and self.hooks.stopped())
        if self.processes:
            stop = any(self.processes.agree(stop))
        if stop or (every and done % every == 0):
            with self._agreed():
                if self.writes:
                    facts = {"digest": run.digest, **asdict(run.totals)}
                    more = _state(run.average)
                    save_checkpoint(self._checkpoint, run.parameters, run.optimizer, facts, more=more)
        if stop:
            raise Interrupted(
                f"stopped after step {done} of {self.steps}",
                where=str(self.job.folder),
                remedy="Continue with `tell tune --resume --out` and the run folder.",
            )

    @property
    def _checkpoint(self) -> Path:
        return AdapterFolder(self.job.folder).checkpoint

    def _agreed(self) -> AbstractContextManager[None]:
        return self.processes.agreed() if self.processes else nullcontext()


@dataclass(slots=True)
class _Totals:
    """Position of a run, as in its checkpoint."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, trained: int, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.trained_tokens += trained
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class _Run:
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    step: Step
    digest: str
    totals: _Totals
    average: WeightMean | None


def _state(average: WeightMean | None) -> Mapping[str, torch.Tensor]:
    return {} if average is None else average.tensors


@contextmanager
def _noise(model: PeftModel, alpha: float) -> Iterator[None]:
    """NEFTune (arXiv 2310.05914): uniform noise of size alpha / sqrt(L d) on the embeddings while training."""

    def hook(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        if not model.training:
            return output
        plan = current_plan()
        lengths = torch.tensor(plan.lengths)  # L is each row's own length, without padding or packing
        if isinstance(plan, PaddedRows):
            size = send(alpha / (lengths * output.shape[-1]).sqrt(), output.device).to(output.dtype)
            return output + torch.empty_like(output).uniform_(-1, 1) * size[:, None, None]
        tokens = send(torch.repeat_interleave(lengths, lengths), output.device)
        size = alpha / (tokens * output.shape[-1]).sqrt().to(output.dtype)
        return output + torch.empty_like(output).uniform_(-1, 1) * size[:, None]

    handle = model.get_input_embeddings().register_forward_hook(hook) if alpha else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
