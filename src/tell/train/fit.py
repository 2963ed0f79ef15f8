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
from tell.kernels.draws import all_seeds
from tell.kernels.ops import kernels_for
from tell.mix.prefixes import copied_tokens
from tell.pass_memory import GRAPHED, MICRO_TOKENS, MOST_TOKENS, Fit, PassMemory, loss_block, usable
from tell.train.attention import use_plan
from tell.train.device import free_bytes, kept_randomness
from tell.train.fast.base_weight import parameter_count
from tell.train.fast.cuda import flash_refusal
from tell.train.flat import slot_of
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
        restore = _kept_random()
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
            restore()

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
    """Whether a device ran out of memory, in torch's allocator, CUDA, Triton or a library's own."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


def _words(rules: StepRules, recompute: Recompute) -> str:
    level, layers = recompute.level, len(recompute.layers)
    return f"passes of at most {rules.micro_tokens:,} tokens, {level} of {layers} layers recomputed"


def _kept_random() -> Callable[[], None]:
    """Restores the random state as it is now: torch's generators, and the seeds that kernels on GPUs add to theirs."""
    state, seeds = torch.get_rng_state(), [(seed, seed.clone()) for seed in all_seeds()]
    states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        torch.set_rng_state(state)
        for number, own in enumerate(states):
            torch.cuda.set_rng_state(own, number)
        for seed, value in seeds:
            seed.copy_(value)  # in place: captured graphs read it there

    return restore


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
    fit = choose_fit(body, recompute, job, share_prefix=rules.share_prefix)
    if fit is not None:
        device, free = device_of(body), free_bytes(device_of(body))
        rules, recompute.level = replace(rules, micro_tokens=fit.micro_tokens), fit.level
        if device.type == "cuda" or recompute.level or not fit.fits:
            words = f"{_words(rules, recompute)}: {fit.bytes / 1e9:.1f} of {free / 1e9:.1f} GB that are free"
            note(words if fit.fits else f"{words}, which may not suffice")
    sources, raises = job.mixture.sources, job.settings.recompute is None
    return FittedStep(step, rules, recompute, raises=raises, sources=sources, clear=clear, note=note)


def choose_fit(
    body: Body | PlainBody, recompute: Recompute, job: TrainingJob, *, share_prefix: bool = False
) -> Fit | None:
    """Size of the passes and level by free memory; None where there is nothing to choose, or memory in plenty.

    Args:
        share_prefix: passes compute the common prefix of their rows once.
    """
    settings, device = job.settings, device_of(body)
    if device.type not in PROBE_TOKENS or not recompute.layers or not len(job.mixture):
        return None
    chosen = settings.micro_tokens is None and device.type == "cuda"
    if settings.recompute is not None and not chosen:
        return None
    tokens = job.mixture.column("tokens").astype(np.int64)
    steps = np.add.reduceat(tokens, np.arange(0, len(tokens), settings.batch_size))
    longest, largest = int(tokens.max()), int(steps.max())
    free = usable(free_bytes(device), device.type, _to_come(body))
    micro = None if chosen else settings.micro_tokens or MICRO_TOKENS
    if device.type == "cpu" and _at_most(body, recompute, min(largest, max(longest, micro or 0))) < free:
        return None
    soft = job.targets is not None and settings.general_target != "text"
    memory = count_pass(body, recompute, lengths=_probe_lengths(longest, PROBE_TOKENS[device.type]), soft=soft)
    if share_prefix and device.type == "cuda":
        copied = copied_tokens(job.mixture, settings.batch_size, micro or MOST_TOKENS)
        memory = memory.copying(copied, _key_bytes(body))
    graphs = _replayed(body, noise=settings.neftune_alpha > 0)
    level = settings.recompute
    return memory.choose(free, longest=longest, largest=largest, micro=micro, level=level, graphs=graphs)


def _to_come(body: Body | PlainBody) -> float:
    """Bytes that the adapter is yet to take: its moments, and gradients and a copy where these are not there yet."""
    trained = [p for p in body.causal.parameters() if p.requires_grad]
    return sum((14.0 if slot_of(p) is None else 8.0) * p.numel() for p in trained)


def _key_bytes(body: Body | PlainBody) -> float:
    """Bytes of the keys and values of a token in one layer."""
    config = body.causal.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2.0 * (getattr(config, "num_key_value_heads", None) or heads) * width * _head(body).element_size()


def _replayed(body: Body | PlainBody, *, noise: bool) -> bool:
    """Whether passes without recomputation become CUDA graphs (`tell.train.graphs.graphs_for`)."""
    if isinstance(body, PlainBody) or noise or device_of(body).type != "cuda":
        return False
    return parameter_count(body.causal) <= GRAPHED and flash_refusal(body.causal) is None


def device_of(body: Body | PlainBody) -> torch.device:
    return body.causal.device if isinstance(body, PlainBody) else body.device


def _head(body: Body | PlainBody) -> Tensor:
    head: Tensor = body.causal.get_output_embeddings().weight
    return head


def _at_most(body: Body | PlainBody, recompute: Recompute, tokens: int) -> float:
    """Bytes that a pass surely does not need: every projection's input and output in fp32, twice."""
    layer, head = recompute.layers[0], _head(body)
    widths = sum(sum(m.weight.shape) for m in layer.modules() if isinstance(m, torch.nn.Linear))
    block = loss_block("cpu", len(head), width=2, fused=False, capped=True)
    logits = tokens * len(head) * 16 if isinstance(body, PlainBody) else block
    return 8.0 * tokens * widths * (len(recompute.layers) + 1) + logits


def _probe_lengths(longest: int, tokens: int) -> list[int]:
    """Rows as long as the longest, since attention in blocks keeps squares, of about so many tokens in all."""
    length = min(longest, tokens)
    return [length] * (tokens // length)


def count_pass(body: Body | PlainBody, recompute: Recompute, *, lengths: list[int], soft: bool = False) -> PassMemory:
    """What a pass keeps, counted on rows of equal ``lengths``; draws no random number.

    Args:
        soft: rows are trained on distributions, whose loss no kernel computes.
    """
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
    for p in body.causal.parameters():  # after the pass, which may have moved weights
        kept.pop(p.untyped_storage().data_ptr(), None)
    layers, width, tokens = len(recompute.layers), states.element_size(), sum(lengths)
    inside = sum(storage.nbytes() for number, storage in kept.values() if number != outside)
    rest = sum(storage.nbytes() for number, storage in kept.values() if number == outside)
    entry = float(states.shape[-1] * width)
    # The final states at the predictors, and their gradient; padded passes compute all logits, fp32 copies and slopes.
    more = len(head) * (2.0 * width + 12) if isinstance(body, PlainBody) else 2 * entry
    block = 0.0
    if not isinstance(body, PlainBody):
        kernels, capped = kernels_for(states), body.softcap is not None
        fused = kernels is not None and (kernels.caps_logits or not capped)
        block = loss_block(device.type, len(head), width=width, fused=fused, soft=soft, capped=capped)
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
