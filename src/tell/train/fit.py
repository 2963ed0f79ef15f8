"""Steps that fit into memory: passes and the layers to recompute are chosen from free memory and from counted bytes.

A step that runs out of memory all the same is repeated in smaller passes.

Neither changes a result but by rounding, and by dropout's draws where passes are cut differently.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tell.errors import TellError
from tell.kernels.ops import kernels_for
from tell.pass_memory import MICRO_TOKENS, Fit, PassMemory, loss_block, usable
from tell.train.attention import use_plan
from tell.train.device import free_bytes, kept_randomness
from tell.train.packing import TrainRow, packed_plan
from tell.train.plain import PaddedRows, PlainBody
from tell.train.recompute import Recompute
from tell.train.step import StepLoss, StepRules
from tell.train.training_job import TrainingJob

if TYPE_CHECKING:
    from tell.train.parallel import Step
    from tell.train.step import Body

PROBE_TOKENS = {"cuda": 512, "cpu": 32}  # of the pass whose kept bytes are counted
NOT_FITTED = (
    "sharded weights: neither passes nor recomputation follow from free memory; set train.micro_tokens and "
    "train.recompute where it is short"
)
SMALL_PASS = 1024  # tokens; passes are made smaller than that only where no more layers can be recomputed


class FittedStep:
    """A step that is repeated with less memory where it runs out of it; called like the step of one process.

    Args:
        step: computes a step by ``rules=``; accumulates gradients.
        rules: of the step.
        recompute: the layers; their level may be raised.
        raises: whether it may: not where the user chose it.
        sources: names of the rows' sources, for errors.
        clear: removes the gradients.
        note: receives a sentence on each change.
    """

    def __init__(
        self,
        step: Step,
        rules: StepRules,
        recompute: Recompute,
        *,
        raises: bool,
        sources: Sequence[str],
        clear: Callable[[], None],
        note: Callable[[str], None],
    ) -> None:
        self.step, self.rules, self.recompute, self.raises = step, rules, recompute, raises
        self.sources, self.clear, self.note = sources, clear, note

    def __call__(
        self,
        rows: list[TrainRow],
        clip: Callable[[], Tensor] | None = None,
        total: float | None = None,
    ) -> StepLoss:
        """As ``step.step_loss``.

        Raises:
            TellError: a single row does not fit.
        """
        state = _random_states()
        while True:
            try:
                return self.step(rows, rules=self.rules, clip=clip, total=total)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # not above: the error's traceback holds the tensors of the pass
            self.clear()
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self._shrink(rows)
            _restore_random(state)

    def _shrink(self, rows: list[TrainRow]) -> None:
        """Halve the passes; recompute more layers where passes are small.

        Raises:
            TellError: passes have a single row, and no more layers may be recomputed.
        """
        sizes, recompute = [len(row.ids) for row in rows], self.recompute
        layers = len(recompute.layers) if self.raises else recompute.level
        size = min(self.rules.micro_tokens, sum(sizes))
        least = max(max(sizes), SMALL_PASS if recompute.level < layers else 1)
        if size > least:
            self.rules = replace(self.rules, micro_tokens=max(least, size // 2))
        elif recompute.level < layers:
            recompute.level = layers - (layers - recompute.level) // 2
        else:
            row = rows[int(np.argmax(sizes))]
            remedy = "" if self.raises else ", use train.recompute=auto"
            raise TellError(
                f"out of memory in a single row of {max(sizes):,} tokens, {recompute.level} of {len(recompute.layers)} "
                "layers recomputed",
                where=f"{self.sources[row.source]} rows",
                remedy=f"Set train.max_length below {max(sizes)}{remedy}, or choose a smaller model.",
            )
        self.note(f"out of memory: the step is repeated, from here on with {_words(self.rules, recompute)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory, in torch's allocator or in a library's own."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def _words(rules: StepRules, recompute: Recompute) -> str:
    level, layers = recompute.level, len(recompute.layers)
    return f"passes of at most {rules.micro_tokens:,} tokens, {level} of {layers} layers recomputed"


def _random_states() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _restore_random(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for number, own in enumerate(state[1]):
        torch.cuda.set_rng_state(own, number)


def fit_step(
    step: Step,
    body: Body | PlainBody,
    recompute: Recompute,
    rules: StepRules,
    job: TrainingJob,
    *,
    clear: Callable[[], None],
    note: Callable[[str], None],
) -> FittedStep:
    """A step in passes that fit into free memory, as the job's settings or counted bytes say.

    Args:
        step: as for ``FittedStep``.
        body: what ``step`` computes with; the adapter is in place.
        recompute: gets its level where the job leaves it open.
        rules: their ``micro_tokens`` are replaced.
        clear, note: as for ``FittedStep``.
    """
    fit = choose_fit(body, recompute, job)
    if fit is not None:
        device, free = device_of(body), free_bytes(device_of(body))
        rules, recompute.level = replace(rules, micro_tokens=fit.micro_tokens), fit.level
        if device.type == "cuda" or recompute.level or not fit.fits:
            words = f"{_words(rules, recompute)}: {fit.bytes / 1e9:.1f} of {free / 1e9:.1f} GB that are free"
            note(words if fit.fits else f"{words}, which may not suffice")
    sources, raises = job.mixture.sources, job.settings.recompute is None
    return FittedStep(step, rules, recompute, raises=raises, sources=sources, clear=clear, note=note)


def choose_fit(body: Body | PlainBody, recompute: Recompute, job: TrainingJob) -> Fit | None:
    """Size of the passes and level by free memory; None where there is nothing to choose, or memory in plenty."""
    settings, device = job.settings, device_of(body)
    if device.type not in PROBE_TOKENS or not recompute.layers or not len(job.mixture):
        return None
    chosen = settings.micro_tokens is None and device.type == "cuda"
    if settings.recompute is not None and not chosen:
        return None
    tokens = job.mixture.column("tokens").astype(np.int64)
    steps = np.add.reduceat(tokens, np.arange(0, len(tokens), settings.batch_size))
    longest, largest = int(tokens.max()), int(steps.max())
    trained = sum(p.numel() for p in _causal(body).parameters() if p.requires_grad)
    free = usable(free_bytes(device), device.type, trained)
    micro = None if chosen else settings.micro_tokens or MICRO_TOKENS
    if device.type == "cpu" and _at_most(body, recompute, min(largest, max(longest, micro or 0))) < free:
        return None
    memory = count_pass(body, recompute, lengths=_probe_lengths(longest, PROBE_TOKENS[device.type]))
    return memory.choose(free, longest=longest, largest=largest, micro=micro, level=settings.recompute)


def device_of(body: Body | PlainBody) -> torch.device:
    return body.causal.device if isinstance(body, PlainBody) else body.device


def _causal(body: Body | PlainBody) -> torch.nn.Module:
    return body.causal if isinstance(body, PlainBody) else body.core


def _head(body: Body | PlainBody) -> Tensor:
    return body.causal.get_output_embeddings().weight if isinstance(body, PlainBody) else body.head


def _at_most(body: Body | PlainBody, recompute: Recompute, tokens: int) -> float:
    """Bytes that a pass surely does not need: every projection's input and output in fp32, twice."""
    layer, head = recompute.layers[0], _head(body)
    widths = sum(sum(m.weight.shape) for m in layer.modules() if isinstance(m, torch.nn.Linear))
    logits = (
        tokens * len(head) * 16 if isinstance(body, PlainBody) else loss_block("cpu", len(head), width=4, fused=False)
    )
    return 8.0 * tokens * widths * (len(recompute.layers) + 1) + logits


def _probe_lengths(longest: int, tokens: int) -> list[int]:
    """Rows as long as the longest, since attention in blocks keeps squares, of about so many tokens in all."""
    length = min(longest, tokens)
    return [length] * (tokens // length)


def count_pass(body: Body | PlainBody, recompute: Recompute, *, lengths: list[int]) -> PassMemory:
    """What a pass keeps, counted on rows of equal ``lengths``; draws no random number."""
    device, head = device_of(body), _head(body)
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}  # layer, and the storage, which holds on to its address
    outside = -1
    at = [outside]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), (at[0], storage))
        return tensor

    @contextmanager
    def watch(number: int) -> Iterator[None]:
        at[0] = number
        yield
        at[0] = outside

    level, recompute.level, recompute.watch = recompute.level, 0, watch
    try:
        with kept_randomness(device), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states = _states(body, lengths)
    finally:
        recompute.level, recompute.watch = level, None
    for p in _causal(body).parameters():  # after the pass, which may have moved weights
        kept.pop(p.untyped_storage().data_ptr(), None)
    layers, width, tokens = len(recompute.layers), states.element_size(), sum(lengths)
    inside = sum(storage.nbytes() for number, storage in kept.values() if number != outside)
    rest = sum(storage.nbytes() for number, storage in kept.values() if number == outside)
    entry = float(states.shape[-1] * width)
    # The final states at the predictors, and their gradient; padded passes compute all logits, fp32 copies and slopes.
    more = len(head) * (2.0 * width + 12) if isinstance(body, PlainBody) else 2 * entry
    fused = kernels_for(states) is not None
    block = 0.0 if isinstance(body, PlainBody) else loss_block(device.type, len(head), width=width, fused=fused)
    return PassMemory(layers, inside / tokens / layers, entry, rest / tokens + more, block)


def _states(body: Body | PlainBody, lengths: list[int]) -> Tensor:
    """Final states (..., h) of rows of equal lengths, with gradient."""
    ids = torch.arange(sum(lengths), device=device_of(body)) % len(_head(body))
    if not isinstance(body, PlainBody):
        return body.run(packed_plan(lengths, device=body.device), ids)
    ids = ids.view(len(lengths), -1)
    with use_plan(PaddedRows(lengths)):
        out = body.causal.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    states: Tensor = out.last_hidden_state
    return states
