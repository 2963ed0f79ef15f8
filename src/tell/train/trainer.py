"""The training loop: one pass over a mixture, in exactly its order.

Why not transformers' Trainer: training must follow the order of the manifest, each example must have the same weight in
a step whatever pass it is computed in, no row may be dropped or padded, and a resumed run must end with the same
adapter. Here that takes a hundred lines; there it would override sampler, collator, loss, accumulation and random
state.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from tell.errors import Diverged, Interrupted
from tell.folder import AdapterFolder
from tell.kernels import keep_memory
from tell.kernels.draws import draw_seed
from tell.mix.mixture import ANCHORED, GENERAL
from tell.presets import learning_rate_for
from tell.train.average import WeightMean
from tell.train.checkpoint import load_checkpoint, load_state, save_checkpoint, state_tensors
from tell.train.device import kept_randomness, trains_fast
from tell.train.fast.base_weight import parameter_count
from tell.train.fit import NOT_FITTED, fit_step
from tell.train.flat import FLAT_DEVICES, FlatAdapters
from tell.train.graphs import PassGraphs, graphs_for
from tell.train.lora import a_scales, add_lora, remove_lora, save_adapter
from tell.train.neftune import embedding_noise
from tell.train.packing import TrainRow
from tell.train.parallel import Processes, SharedStep, Step, shard
from tell.train.plain import PlainBody, plain_step_loss
from tell.train.recompute import Recompute, recomputed_layers
from tell.train.step import Body, StepLoss, StepRules, step_loss
from tell.train.step_log import StepLog, StepReport
from tell.train.training_job import TrainingHooks, TrainingJob, TrainResult, learning_rate, run_digest, step_rows
from tell.train.update import MOST_SKIPPED, Update

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
        usual = learning_rate_for(parameter_count(model), mixed=GENERAL in job.mixture.sources)
        self.rate = job.settings.learning_rate or usual  # the peak rate
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
        if not self.fast:
            why = "train.fast=off" if config.fast == "off" else "sharded weights" if self.sharded else self.device.type
            for part in ("attention", "kernels"):
                hooks.note(f"{part}: transformers' own operations ({why})")
        self.rules = StepRules(
            config.loss_normalization,
            config.task_weight,
            config.forward_tokens,
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
            with self._tuned() as (model, plain, layers):
                run = self._start(model, plain, layers, resume)
                self._train(run, model)
                if run.graphs is not None:
                    self.hooks.note(run.graphs.summary())
                with self._agreed():
                    if self.writes:
                        self._finish(run)
                        save_adapter(model, self.job.folder)
        totals = run.totals
        return TrainResult(self.steps, totals.tokens, totals.trained_tokens, totals.seconds, self.rate)

    @contextmanager
    def _tuned(self) -> Iterator[tuple[PeftModel, PlainBody | None, Recompute]]:
        """The base model with an adapter to train, on the plain path or not; restored at the end."""
        was_training, plain = self.base.training, None
        with self._agreed():
            model = add_lora(self.base, self.config, seed=self.job.seed, fused=self.fast)
        try:
            with self._agreed():
                plain = None if self.fast else PlainBody(model)
            with (
                embedding_noise(model, self.config.neftune_alpha),
                recomputed_layers(self.base, self.config.recompute) as layers,
            ):
                yield model, plain, layers
        finally:
            remove_lora(model).train(was_training)
            if plain is not None:
                plain.give_back()

    def _start(self, model: PeftModel, plain: PlainBody | None, layers: Recompute, resume: bool) -> _Run:
        """Set up the first step, from a checkpoint where there is one; the same in every process."""
        config, processes = self.config, self.processes
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        facts = None
        if processes and self.sharded:  # the processes agree within
            shard(model, self.device, processes)
        with self._agreed():
            dtype, joins = self.base.dtype, self.fast and self.device.type in FLAT_DEVICES
            flat = FlatAdapters(parameters, a_scales(model), dtype) if joins else None
            update = Update(parameters, config, dtype, flat)
            if flat is not None and not flat.exact:
                self.hooks.note(f"the adapters' gradients are rounded to {dtype}: torch {torch.__version__} is too old")
            digest = run_digest(config, self.job.mixture, self.job.seed)
            share = config.average if self.writes else None
            average = WeightMean(parameters, share, self.steps, flat) if share else None
            if resume and self.writes:
                states = parameters, update.optimizer
                facts = load_checkpoint(self._checkpoint, *states, flat=flat, digest=digest, more=_state(average))
            body = Body(model) if plain is None else plain
            one: Step = partial(step_loss, body) if isinstance(body, Body) else partial(plain_step_loss, body)
            rules = replace(self.rules, scale=update.scale)
            step: Step = partial(one, rules=rules, moved=self.hooks.moved)
            if self.sharded:  # passes are collective: none can be repeated alone
                self.hooks.note(NOT_FITTED)
            else:
                note = self.hooks.note
                step = fit_step(step, body, layers, rules, self.job, clear=update.clear, note=note)
            graphs = self._graphs(model, body, parameters, layers)
        if processes:
            facts, state = processes.broadcast((facts, state_tensors(parameters, update.optimizer, flat)))
            load_state(state, parameters, update.optimizer, flat)
            step = SharedStep(processes, step, self.rules, update.tensors)
        facts = facts or {}
        update.restore(facts)
        totals = _Totals(**{name: facts[name] for name in asdict(_Totals()) if name in facts})
        return _Run(parameters, update, step, digest, totals, average, graphs)

    def _graphs(
        self, model: PeftModel, body: Body | PlainBody, parameters: Mapping[str, nn.Parameter], layers: Recompute
    ) -> PassGraphs | None:
        """The graphs by which passes are replayed, if any."""
        if not isinstance(body, Body):
            return None
        why = "NEFTune draws noise by each row's length" if self.config.neftune_alpha > 0 else None
        why = why if self.processes is None else "several processes train together"
        body.graphs = graphs_for(model, parameters.values(), layers=layers, refusal=why, note=self.hooks.note)
        return body.graphs

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

        def report(*, but: int = 0) -> None:
            """Wait for the numbers of the steps that were launched, but for the last ones."""
            while len(run.launched) > but:
                launched = run.launched.popleft()
                self._check(run, launched.step, launched.out)
                run.totals.seconds = time.monotonic() - begin
                self._tell(logger, launched, run.totals.seconds)

        try:
            for step in range(run.totals.step, self.steps):
                rate = learning_rate(self.config, step, self.steps)
                rows = step_rows(self.job.mixture, self.job.tables, step, self.config.batch_size, self.targets)
                out = self._step(run, step, rows, rate)
                run.totals.add(out.tokens, sum(int(row.mask.sum()) for row in rows))
                run.launched.append(_Launched(run.totals.step, run.totals.tokens, rate, out))
                if run.average is not None:
                    run.average.add(run.totals.step)
                report(but=0 if out.arrived else 1)  # while a GPU computes this step
                if self.writes and (place := self.hooks.marks.get(run.totals.step)) is not None:
                    report()
                    save_adapter(model, place)
                self._pause(run, report)
            report()
        finally:
            if logger:
                logger.close()
        self._say_skipped(run.totals)

    def _step(self, run: _Run, step: int, rows: list[TrainRow], rate: float) -> StepLoss:
        """Launch one optimiser step.

        Raises:
            Diverged: the loss or the gradient is not finite, and known already.
        """
        rank = self.processes.rank << 48 if self.processes else 0
        # dropout differs between processes, and does not between a run and a resumed one
        torch.manual_seed(self.job.seed * 1_000_003 + step + rank)
        draw_seed(run.update.device)
        out = run.step(rows, clip=run.update.clip)
        if out.arrived and not self._is_sound(run, out):
            raise self._diverged(step + 1, out.loss)
        run.update.apply(rate, out.bad)
        return out

    def _is_sound(self, run: _Run, out: StepLoss) -> bool:
        """Whether loss and gradient are finite; in fp16 the gradient need not be, and the step is skipped."""
        return math.isfinite(out.loss) and (run.update.scaler is not None or math.isfinite(out.norm or 0.0))

    def _check(self, run: _Run, step: int, out: StepLoss) -> None:
        """Count a step that fp16 skipped.

        Raises:
            Diverged: the loss or the gradient is not finite, or the gradient overflows at any scale of the loss.
        """
        skipped = not math.isfinite(out.norm or 0.0)
        run.totals.skipped += skipped
        run.totals.skipped_in_a_row = run.totals.skipped_in_a_row + 1 if skipped else 0
        hopeless = run.totals.skipped_in_a_row >= MOST_SKIPPED or run.totals.skipped == self.steps
        if not self._is_sound(run, out) or hopeless:
            raise self._diverged(step, out.loss)

    def _diverged(self, step: int, loss: float) -> Diverged:
        remedy = "Lower the learning rate with --lr, and start over with --overwrite."
        if self.base.dtype == torch.float16:
            remedy = "fp16 may overflow in this model: use --set model.dtype=fp32 with --overwrite, or lower --lr."
        what = f"training diverged at step {step} of {self.steps} (loss {loss:g})"
        return Diverged(what, where=str(self.job.folder), remedy=remedy)

    def _tell(self, logger: StepLog | None, launched: _Launched, seconds: float) -> None:
        """Log a step and show its progress."""
        out = launched.out
        by_source = {
            name if self.targets is None or name in ANCHORED else DISTILLED: float(np.mean(out.rows[out.source == i]))
            for i, name in enumerate(self.job.mixture.sources)
            if (out.source == i).any()
        }
        report = StepReport(launched.step, self.steps, out.loss, by_source, out.tokens, launched.tokens, seconds)
        if logger:
            logger.write(report, launched.rate, out.norm or 0.0)
        if self.hooks.progress:
            self.hooks.progress(report)

    def _say_skipped(self, totals: _Totals) -> None:
        if totals.skipped:
            self.hooks.note(
                f"{totals.skipped} of {self.steps} steps were skipped: gradients overflowed in fp16, "
                "and the scale of the loss was halved each time"
            )

    def _pause(self, run: _Run, report: Callable[[], None]) -> None:
        """Write a checkpoint where one is due, and stop if requested, unless the run is at its end.

        Args:
            run: the training.
            report: reports the steps that are not yet.

        Raises:
            Interrupted: it was stopped.
            Diverged: as it turns out now.
        """
        done, every = run.totals.step, self.config.checkpoint_every
        if done == self.steps:
            return
        stop = bool(self.hooks.stopped and self.hooks.stopped())
        if self.processes:
            stop = any(self.processes.agree(stop))
        if stop or (every and done % every == 0):
            report()
            with self._agreed():
                if self.writes:
                    facts = {"digest": run.digest, **asdict(run.totals), **run.update.facts()}
                    states, more = (run.parameters, run.update.optimizer), _state(run.average)
                    save_checkpoint(self._checkpoint, *states, facts, flat=run.update.flat, more=more)
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
    skipped: int = 0  # steps whose gradients overflowed in fp16
    skipped_in_a_row: int = 0

    def add(self, tokens: int, trained: int) -> None:
        self.step += 1
        self.tokens += tokens
        self.trained_tokens += trained


class _Launched(NamedTuple):
    """A step whose numbers may still be on their way from a GPU, and the run's position after it."""

    step: int
    tokens: int
    rate: float
    out: StepLoss


@dataclass(frozen=True, slots=True)
class _Run:
    parameters: dict[str, nn.Parameter]
    update: Update
    step: Step
    digest: str
    totals: _Totals
    average: WeightMean | None
    graphs: PassGraphs | None
    launched: deque[_Launched] = field(default_factory=deque)


def _state(average: WeightMean | None) -> Mapping[str, torch.Tensor]:
    return {} if average is None else average.tensors
