"""vLLM as the decoding engine on a GPU: paged cache, prefix caching, adapters on an unchanged base.

vLLM draws its own random numbers: a row's answer depends on seed and row alone, as with TELL's engine, but differs from
its answer unless decoding is greedy. Not measured by us: written from vLLM's documentation.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tell.decode.engine_rows import Answer
from tell.decode.room import answer_limits
from tell.decode.sampler import Decoding
from tell.errors import TellError, first_line
from tell.folder import AdapterFolder
from tell.pass_memory import fixed_segments
from tell.train.lora import adapter_applied

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm import LLM, RequestOutput

    from tell.decode.grammar import Mask
    from tell.decode.guide import Guide
    from tell.decode.protocol import DecodingEngine

RANKS = (8, 16, 32, 64, 128, 256, 512)  # adapter ranks that vLLM can reserve
LONGEST = 32_768  # tokens; vLLM refuses to start where one sequence of full length does not fit into memory
NO_MASKS = "vLLM has no tokenizer here, which its constrained answers need"  # see skip_tokenizer_init
CHECK = 15, 16  # tokens of a check's prompt, fewer than a cached block of vLLM's, and of its greedy answer
REMEDY = (
    "Repeat the command with --set generate.engine=own; a run loses nothing: "
    "`tell tune --resume --out RUN --set generate.engine=own`."
)
NEVER = -100.0  # the lowest bias vLLM accepts; it outweighs any logit


def sampling(decoding: Decoding, row: int, limit: int) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams`` for one prompt.

    Only our stop tokens end an answer (``ignore_eos``), and each row has its own seed, independent of its batch.
    """
    out: dict[str, Any] = {
        "max_tokens": limit,
        "repetition_penalty": decoding.repetition_penalty,
        "stop_token_ids": list(decoding.stop_ids),
        "ignore_eos": True,
        "detokenize": False,
    }
    if decoding.greedy:
        out["temperature"] = 0.0
    else:
        out |= {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k or -1,
            "seed": (decoding.seed * 1_000_003 + row) % (1 << 31),
        }
    if decoding.banned_ids:
        out["logit_bias"] = dict.fromkeys(decoding.banned_ids, NEVER)
    return out


def answer_of(token_ids: Sequence[int], finish: str | None, stop_ids: Sequence[int]) -> Answer:
    """vLLM's tokens, which may end with the stop token, as an Answer, which never does."""
    ids = list(token_ids)
    stopped = finish == "stop" or bool(ids and ids[-1] in stop_ids)
    if ids and ids[-1] in stop_ids:
        ids.pop()
    return Answer(ids, "stop" if stopped else "length")


def reserved_rank(rank: int) -> int:
    """vLLM's smallest adapter rank of at least ``rank``.

    Raises:
        TellError: there is none.
    """
    for size in RANKS:
        if rank <= size:
            return size
    raise TellError(f"rank {rank} is more than vLLM's {RANKS[-1]}", where="adapter", remedy="Use generate.engine=own.")


@dataclass
class _Weights:
    """The base model or an adapter, as vLLM knows it.

    Attributes:
        number: vLLM caches adapters by it: one retrained in the same folder gets a new one.
        check: a prompt and its greedy answer from before vLLM slept; None: it has not answered yet.
    """

    folder: Path | None
    number: int
    check: tuple[list[int], list[int]] | None = None


class VllmEngine:
    """Decodes with vLLM; the counterpart of ``Engine``.

    Between answers vLLM sleeps: it keeps its weights in the machine's memory and gives the GPU's back to training.
    Whenever it wakes, a short answer of the base model and of the adapter must be as before: versions of vLLM have lost
    adapters in their sleep without an error (its issue 53888).

    Args:
        folder: the base model's files.
        model: the base model as training holds it.
        max_positions: longest sequence, in tokens; capped at ``LONGEST``.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        rank: highest rank of the adapters to use.
        memory: share of the GPU's memory that vLLM may hold while it answers.
        own: makes the engine that goes on where vLLM fails; None: that is an error.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        *,
        max_positions: int,
        dtype: str = "bf16",
        rank: int = 64,
        memory: float = 0.45,
        own: Callable[[], DecodingEngine] | None = None,
    ) -> None:
        from vllm import LLM

        self.name, self.how, self.fallback = "vllm", "", ""
        self._again = ""  # said of an adapter that was loaded again
        self._make_own = own
        self._own: DecodingEngine | None = None  # decodes since vLLM failed
        self.model, self.device = model, model.device
        self.max_positions = max_positions = min(max_positions, LONGEST)
        with fixed_segments():  # with growing ones it cannot sleep
            self.llm: LLM | None = LLM(
                model=str(folder),
                dtype={"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype],
                max_model_len=max_positions,
                enable_prefix_caching=True,
                enable_sleep_mode=True,
                enable_lora=True,
                max_lora_rank=reserved_rank(rank),
                gpu_memory_utilization=memory,
                skip_tokenizer_init=True,  # token ids in, token ids out
            )
        self._base = self._weights = _Weights(None, 0)
        self._adapters: dict[tuple[str, int], _Weights] = {}
        self._number, self._tried = 0, False
        self._keep(range(3, 3 + CHECK[0]))
        self.llm.sleep(level=1)

    @contextmanager
    def adapter(self, folder: Path | None) -> Iterator[None]:
        """vLLM applies the adapter as it decodes; ``model`` has it too, for losses and our own engine."""
        with adapter_applied(self.model, folder) if self._own is None else self._own.adapter(folder):
            before, self._weights = self._weights, self._known(folder)
            self.how = self._again = ""
            try:
                yield
            finally:
                self._weights = before

    @contextmanager
    def _awake(self) -> Iterator[None]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what training holds no more
        assert self.llm is not None
        self.llm.wake_up()
        try:
            yield
        finally:
            self.llm.sleep(level=1)

    def _known(self, folder: Path | None) -> _Weights:
        if folder is None:
            return self._base
        key = str(folder), AdapterFolder(folder).weights.stat().st_mtime_ns
        if key not in self._adapters:
            self._adapters[key] = _Weights(folder, self._next_number())
        return self._adapters[key]

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _ask(self, weights: _Weights, prompts: Sequence[Sequence[int]], parameters: object) -> list[RequestOutput]:
        from vllm.lora.request import LoRARequest

        assert self.llm is not None
        of = weights.number, str(weights.folder)
        lora = None if weights.folder is None else LoRARequest(f"adapter-{weights.number}", *of)
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(given, parameters, lora_request=lora, use_tqdm=False)

    def _short(self, weights: _Weights, prompt: list[int]) -> list[int]:
        """The greedy answer to a check's prompt."""
        from vllm import SamplingParams

        greedy = sampling(Decoding(CHECK[1], (), greedy=True, repetition_penalty=1.0), 0, CHECK[1])
        return list(self._ask(weights, [prompt], [SamplingParams(**greedy)])[0].outputs[0].token_ids)

    def _keep(self, prompt: Sequence[int]) -> None:
        """Keep a short answer of the weights in use, to compare with after vLLM sleeps."""
        if self._weights.check is None:
            tail = list(prompt)[-CHECK[0] :]
            self._weights.check = tail, self._short(self._weights, tail)

    def _is_same(self, weights: _Weights) -> bool:
        return weights.check is None or self._short(weights, weights.check[0]) == weights.check[1]

    def _check(self) -> None:
        """Check the weights after waking; an adapter that differs is loaded again.

        Raises:
            RuntimeError: vLLM answers otherwise than before it slept.
        """
        if not self._is_same(self._base):
            raise RuntimeError("the base model answers otherwise after vLLM slept")
        if self._weights is not self._base and not self._is_same(self._weights):
            self._weights.number = self._next_number()
            if not self._is_same(self._weights):
                raise RuntimeError("the adapter answers otherwise after vLLM slept, also when loaded again")
            self._again = ", adapter loaded again after a sleep that had lost it"

    def _try_sleep(self, prompt: Sequence[int]) -> None:
        """Before the first adapter's answers, see whether it survives a sleep here."""
        if not self._tried and self._weights.folder is not None:
            with self._awake():
                self._keep(prompt)
            self._tried = True

    def _fall_back(self, why: str) -> DecodingEngine:
        """Our own engine from now on; vLLM's memory is given back."""
        assert self._make_own is not None
        self.llm = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.name, self.fallback = "own", f"vLLM failed after it had started ({why})"
        warnings.warn(f"{self.fallback}; answers are decoded without it", stacklevel=3)
        return self._make_own()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        limits: Sequence[int] | None = None,
        progress: Callable[[int, float], None] | None = None,
        on_token: Callable[[int, int], object] | None = None,
        guides: Sequence[Guide | None] | None = None,
        masks: Sequence[Mask | None] | None = None,
    ) -> list[Answer]:
        """As ``Engine.generate``; ``progress`` and ``on_token`` are called once all answers are complete.

        Raises:
            TellError: a prompt fills the model's context, there are guides or masks, or vLLM fails and nothing else
                may decode.
            ValueError: ``limits`` are not one positive number per prompt.
        """
        if self._own is not None:
            try:
                return self._own.generate(
                    prompts, decoding, limits=limits, progress=progress, on_token=on_token, guides=guides, masks=masks
                )
            finally:
                self.how = self._own.how

        if guides is not None and any(guide is not None for guide in guides):
            remedy = "Use generate.engine=own, or generate.closed=off."
            raise TellError("vLLM cannot decide closed fields", where="generate.engine", remedy=remedy)
        if masks is not None and any(mask is not None for mask in masks):
            raise TellError(NO_MASKS, where="generate.engine", remedy="Use generate.engine=own.")

        limits = answer_limits(prompts, decoding.max_new_tokens, limits, self.max_positions)
        if not prompts:
            return []
        outputs, why = self._outputs(prompts, decoding, limits)
        if why is not None:  # only now, with no trace that holds vLLM
            self._own = self._fall_back(why)
            return self.generate(prompts, decoding, limits=limits, progress=progress, on_token=on_token)
        answers = []
        for row, output in enumerate(outputs):
            done = output.outputs[0]
            answer = answer_of(done.token_ids, done.finish_reason, decoding.stop_ids)
            for at, token in enumerate(answer.ids, 1):
                if on_token and on_token(row, token) is True:
                    answer = Answer(answer.ids[:at], "stop")
                    break
            answers.append(answer)
            if progress:
                progress(len(done.token_ids), 1)
        return answers

    def _outputs(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, limits: Sequence[int]
    ) -> tuple[list[RequestOutput], str | None]:
        """vLLM's outputs, and why there are none where our own engine may go on.

        Raises:
            TellError: vLLM fails, and nothing else may decode.
        """
        from vllm import SamplingParams

        parameters = [SamplingParams(**sampling(decoding, row, limit)) for row, limit in enumerate(limits)]
        try:
            self._try_sleep(prompts[0])
            with self._awake():
                self._check()
                outputs = self._ask(self._weights, prompts, parameters)
                self._keep(prompts[0])
                self.how = f"paged cache{self._again}"
                return outputs, None
        except Exception as error:  # another engine may raise any exception
            why = first_line(error)
            if self._make_own is None:
                raise TellError(f"vLLM fails ({why})", where="generate.engine", remedy=REMEDY) from error
        return [], why
