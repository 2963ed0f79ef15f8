"""One training each: TELL's Trainer and its peers over the same rows, timed step by step."""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.engines.train_tell import _mixture
from bench.gpu.run import Run, now
from bench.rows import Rows

LEAST = 3  # timed steps that a speed is taken from


@dataclass(frozen=True)
class Plan:
    """What a training does unless time ends.

    Attributes:
        batch: rows of a step.
        warm: steps before the timed ones.
        timed: steps.
        seconds: that it may take after its first step, though some steps are timed anyway.
    """

    batch: int
    warm: int
    timed: int
    seconds: float = float("inf")

    @property
    def rows(self) -> int:
        return self.batch * (self.warm + self.timed)

    @property
    def least(self) -> int:
        """Timed steps."""
        return min(LEAST, self.timed)

    def over(self, run: Run, timed: Timed) -> bool:
        """Whether to stop now: the next step, if it takes as long as the last, would end too late."""
        if not timed.ends:
            return False
        step = timed.ends[-1] - [timed.begin, *timed.ends][-2]
        if len(timed.ends) == 1 and timed.compiles:
            step = 0.0
        late = timed.ends[-1] - timed.ends[0] + step > self.seconds and len(timed.ends) > self.least
        return late or run.left < step


@dataclass
class Timed:
    """What a training took; ``ends`` are the times at which the numbers of each step were there."""

    begin: float
    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    waits: int | None = None
    moved: int = 0  # tokens that went through
    notes: list[str] = field(default_factory=list)
    exchanged: Any = None
    adapter: torch.Tensor | None = None
    even: bool = False  # the rows came in an order of its own: every step counts as the mean
    whole: bool = True  # it was not stopped
    compiles: bool = False  # in its first step, which tells nothing of the others

    def facts(self, rows: Rows, plan: Plan) -> dict[str, Any]:
        """Speed over the timed steps; of a training that was stopped those after a shorter warm-up, where it must be.

        Raises:
            ValueError: it was stopped before a speed could be told.
        """
        done, batch = len(self.ends), plan.batch
        warm = min(plan.warm, done - plan.least)
        if warm < 1:
            raise ValueError(f"no time left after {done} steps of {self.ends[-1] - self.begin:.1f} s in all")
        times = np.diff(self.ends[warm - 1 :])
        tokens = int(rows.lengths[warm * batch : done * batch].sum())
        if self.even:
            tokens = round(float(rows.lengths.sum()) / (done if self.whole else len(rows) / batch) * len(times))
        return {
            "tokens_s": round(tokens / float(times.sum())), "ms_step": round(1e3 * float(np.median(times)), 1),
            "tokens_step": tokens // len(times), "waits_a_step": self.waits,
            "first_step_s": round(self.ends[0] - self.begin, 2), "steps": f"{len(times)} after {warm}",
            "loss": round(self.losses[-1], 4) if self.losses else None,
        }  # fmt: skip


def tell(
    run: Run,
    model: Any,
    rows: Rows,
    plan: Plan,
    settings: Mapping[str, Any],
    watch: Callable[[Timed], None] = lambda timed: None,
) -> Timed:
    """TELL's own Trainer, as a run trains; the model is as before afterwards.

    Args:
        rows: in this order.
        plan: by which it may be stopped; it has no adapter then.
        settings: keys of ``train``.
        watch: called after each step that has ended.
    """
    from safetensors.torch import load_file

    from tell.config_sections import TrainConfig
    from tell.errors import Interrupted
    from tell.train.fast.fused import fused_counts
    from tell.train.trainer import StepReport, Trainer
    from tell.train.training_job import TrainingHooks, TrainingJob

    config = TrainConfig(**{**BASE, "batch_size": plan.batch, **settings})
    mixture, timed, watching = _mixture(rows, np.arange(len(rows))), Timed(now(), compiles=True), ExitStack()

    def progress(report: StepReport) -> None:
        timed.ends.append(now())
        timed.losses.append(report.loss)
        if len(timed.ends) == 1:
            timed.exchanged = fused_counts(model)
            watching.enter_context(counted_waits(run, timed))
        elif len(timed.ends) == 2:
            watching.close()
        watch(timed)

    def moved(tokens: int) -> None:
        timed.moved += tokens

    with tempfile.TemporaryDirectory() as temporary, watching:
        place = Path(temporary)
        job = TrainingJob(mixture.tables, mixture, config, 1, place, place / "log.jsonl")
        stopped = partial(plan.over, run, timed)
        hooks = TrainingHooks(progress=progress, moved=moved, note=timed.notes.append, stopped=stopped)
        device = str(model.device)
        try:
            Trainer(model, job, device=device, hooks=hooks).run()
        except Interrupted:
            timed.whole = False
        timed.norms = [row["grad_norm"] for row in json_lines(place / "log.jsonl")]
        if timed.whole:
            tensors = load_file(str(place / "adapter_model.safetensors"))
            timed.adapter = torch.cat([tensors[key].flatten().float() for key in sorted(tensors)])
    return timed


BASE: dict[str, Any] = {"learning_rate": 1e-4, "schedule": "constant", "lora_dropout": 0.0, "checkpoint_every": 0}


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def counted_waits(run: Run, timed: Timed) -> Iterator[None]:
    """Count how often what runs inside waits for the GPU, by torch's own count."""
    if run.device != "cuda":
        yield
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    timed.waits = sum("synchroniz" in str(warning.message) for warning in seen)


@contextmanager
def without(place: str, name: str) -> Iterator[None]:
    """A part of TELL turned off: ``name`` in module ``place`` returns None."""
    module = importlib.import_module(place)
    own = getattr(module, name)
    setattr(module, name, lambda *args, **options: None)
    try:
        yield
    finally:
        setattr(module, name, own)


def lora(model: Any) -> Any:
    """peft's model with adapters on all linear layers, as TELL's default has them."""
    from peft import LoraConfig, get_peft_model

    model.config.use_cache = False
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, config).train()


def padded(run: Run, tuned: Any, rows: Rows, plan: Plan, *, micro_rows: int = 4, checkpointing: bool = False) -> Timed:
    """A peft model as transformers' Trainer trains it: padded micro-batches of rows sorted by length, sdpa."""
    if checkpointing:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tuned.enable_input_require_grads()
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)

    def step(numbers: list[int]) -> float:
        count, losses = int(rows.trained[numbers].sum()), []
        numbers = sorted(numbers, key=lambda i: -int(rows.lengths[i]))
        for at in range(0, len(numbers), micro_rows):
            x, m, y = (z.to(run.device, non_blocking=True) for z in _padded(rows, numbers[at : at + micro_rows]))
            loss = tuned(input_ids=x, attention_mask=m, labels=y, num_items_in_batch=count).loss
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(sum(losses))

    return stepped(run, rows, plan, step)


def stepped(run: Run, rows: Rows, plan: Plan, step: Callable[[list[int]], float]) -> Timed:
    """The training that ``step`` makes of the rows of each step; it returns their loss."""
    timed = Timed(now())
    for at in range(0, len(rows), plan.batch):
        if plan.over(run, timed):
            timed.whole = False
            break
        timed.losses.append(step(list(range(at, min(at + plan.batch, len(rows))))))
        run.sync()
        timed.ends.append(now())
    return timed


def _padded(rows: Rows, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = len(numbers), int(rows.lengths[numbers[0]])
    ids, seen, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100)
    for i, number in enumerate(numbers):
        own, prompt = rows.row(number)
        ids[i, : len(own)], seen[i, : len(own)], labels[i, prompt : len(own)] = own, 1, own[prompt:]
    return torch.from_numpy(ids), torch.from_numpy(seen), torch.from_numpy(labels)


def trl(run: Run, model: Any, rows: Rows, plan: Plan, *, way: str, micro_rows: int = 4, liger: bool = False) -> Timed:
    """TRL's SFTTrainer. ``way``: packing (a block of whole rows, as long as a step's rows together) or padding_free."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    data = []
    for i in range(len(rows)):
        ids, prompt = rows.row(i)
        mask = [0] * prompt + [1] * (len(ids) - prompt)
        data.append({"input_ids": ids.tolist(), "completion_mask": mask})
    timed, batch = Timed(now(), even=True), plan.batch

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            run.sync()
            timed.ends.append(now())
            if plan.over(run, timed) and state.global_step < state.max_steps:
                timed.whole, control.should_training_stop = False, True

        def on_log(self, *args: Any, logs: Any = None, **options: Any) -> None:
            if logs and "loss" in logs:
                timed.losses.append(float(logs["loss"]))

    block, micro_rows = (int(rows.lengths.mean() * batch), 1) if way == "packing" else (None, micro_rows)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_length=block or int(rows.lengths.max()), num_train_epochs=1,
            packing=way == "packing", padding_free=way == "padding_free", use_liger_kernel=liger,
            per_device_train_batch_size=micro_rows, gradient_accumulation_steps=1 if block else batch // micro_rows,
            learning_rate=1e-4, weight_decay=0.01, max_grad_norm=1.0, logging_steps=1, save_strategy="no",
            report_to=[], gradient_checkpointing=False, bf16=run.device == "cuda", use_cpu=run.device == "cpu",
            dataloader_pin_memory=run.device == "cuda", completion_only_loss=True, disable_tqdm=True,
        )  # fmt: skip
        tuned = lora(model)
        trainer = SFTTrainer(
            model=tuned, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer(model),
            callbacks=[Clock()],
        )  # fmt: skip
        timed.begin = now()
        trainer.train()
    return timed


def tokenizer(model: Any) -> Any:
    """A tokenizer with as many tokens as a model of random weights, for trainers that insist on one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(min(model.config.vocab_size, 512))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")), pad_token="t1", eos_token="t2"
    )


def unsloth(run: Run, model: Any, rows: Rows, plan: Plan, *, micro_rows: int = 4) -> Timed:
    """Unsloth's patched transformers with its own checkpointing off; imports last, for it patches what it finds."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer(model).save_pretrained(folder)
        own, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=4096, dtype=model.dtype, load_in_4bit=False)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = FastLanguageModel.get_peft_model(
        own, r=8, lora_alpha=32, lora_dropout=0, bias="none", target_modules=names, use_gradient_checkpointing=False
    )
    return padded(run, tuned, rows, plan, micro_rows=micro_rows)
