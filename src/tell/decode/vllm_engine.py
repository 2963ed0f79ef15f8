"""vLLM as the decoding engine on a GPU: paged cache, prefix caching, adapters on an unchanged base.

vLLM draws its own random numbers: a row's answer depends on seed and row alone, as with TELL's engine, but differs from
its answer unless decoding is greedy. Not measured by us: written from vLLM's documentation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tell.decode.engine_rows import Answer
from tell.decode.room import answer_limits
from tell.decode.sampler import Decoding
from tell.errors import TellError
from tell.folder import AdapterFolder
from tell.pass_memory import fixed_segments
from tell.train.lora import adapter_applied

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.lora.request import LoRARequest

    from tell.decode.grammar import Mask
    from tell.decode.guide import Guide

RANKS = (8, 16, 32, 64, 128, 256, 512)  # adapter ranks that vLLM can reserve
LONGEST = 32_768  # tokens; vLLM refuses to start where one sequence of full length does not fit into memory
NO_MASKS = "vLLM has no tokenizer here, which its constrained answers need"  # see skip_tokenizer_init
NEVER = -100.0  # the lowest bias vLLM accepts; it outweighs any logit


def pick_engine(choice: Literal["auto", "own", "vllm"], device: str) -> Literal["own", "vllm"]:
    """The engine to decode with: ``auto`` is vLLM on a GPU where it is installed.

    Raises:
        TellError: vLLM is requested and not available.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if choice == "vllm" and not (installed and device.startswith("cuda")):
        why = "is not installed" if not installed else f"needs a GPU, and the model is on {device}"
        remedy = "Install tell-llm[vllm], or use generate.engine=own." if not installed else "Use generate.engine=own."
        raise TellError(f"vLLM {why}", where="generate.engine", remedy=remedy)
    return "vllm" if choice != "own" and installed and device.startswith("cuda") else "own"


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


class VllmEngine:
    """Decodes with vLLM; the counterpart of ``Engine``.

    Between answers vLLM sleeps: it keeps its weights in the machine's memory and gives the GPU's back to training.

    Args:
        folder: the base model's files.
        model: the base model as training holds it.
        max_positions: longest sequence, in tokens; capped at ``LONGEST``.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        rank: highest rank of the adapters to use.
        memory: share of the GPU's memory that vLLM may hold while it answers.
    """

    name = "vllm"
    how = fallback = ""

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        *,
        max_positions: int,
        dtype: str = "bf16",
        rank: int = 64,
        memory: float = 0.45,
    ) -> None:
        from vllm import LLM

        self.model, self.device = model, model.device
        self.max_positions = max_positions = min(max_positions, LONGEST)
        with fixed_segments():  # with growing ones it cannot sleep
            self.llm = LLM(
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
        self.llm.sleep(level=1)
        self._numbers: dict[tuple[str, int], int] = {}
        self._lora: LoRARequest | None = None  # of the adapter in use

    @contextmanager
    def adapter(self, folder: Path | None) -> Iterator[None]:
        """vLLM applies the adapter as it decodes; ``model`` has it too, for losses."""
        with adapter_applied(self.model, folder):
            before, self._lora = self._lora, self._request(folder)
            try:
                yield
            finally:
                self._lora = before

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what training holds no more
        self.llm.wake_up()
        try:
            yield
        finally:
            self.llm.sleep(level=1)

    def _request(self, folder: Path | None) -> LoRARequest | None:
        """vLLM caches adapters by number: one retrained in the same folder gets a new number."""
        if folder is None:
            return None
        from vllm.lora.request import LoRARequest

        written = AdapterFolder(folder).weights.stat().st_mtime_ns
        number = self._numbers.setdefault((str(folder), written), len(self._numbers) + 1)
        return LoRARequest(f"adapter-{number}", number, str(folder))

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
            TellError: a prompt fills the model's context, or there are guides or masks.
            ValueError: ``limits`` are not one positive number per prompt.
        """
        from vllm import SamplingParams

        if guides is not None and any(guide is not None for guide in guides):
            remedy = "Use generate.engine=own, or generate.closed=off."
            raise TellError("vLLM cannot decide closed fields", where="generate.engine", remedy=remedy)
        if masks is not None and any(mask is not None for mask in masks):
            raise TellError(NO_MASKS, where="generate.engine", remedy="Use generate.engine=own.")

        limits = answer_limits(prompts, decoding.max_new_tokens, limits, self.max_positions)
        if not prompts:
            return []
        parameters = [SamplingParams(**sampling(decoding, row, limit)) for row, limit in enumerate(limits)]
        with self._awake():
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                parameters,
                lora_request=self._lora,
                use_tqdm=False,
            )
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
