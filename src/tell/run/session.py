"""An open model: weights, decoding engine and chat template, shared by all verbs."""

from __future__ import annotations

import gc
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tell.config import Config
from tell.config_sections import ModelConfig
from tell.errors import TellError, first_line
from tell.models.base import FULL, is_too_large, weight_bytes
from tell.models.find import ModelFiles
from tell.models.machine import gpu_memory, likely_place
from tell.models.predict import WIDTHS
from tell.progress import Display, Silent
from tell.rows.row_table import RowTable
from tell.rows.template import ChatTokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tell.decode.engine_rows import Answer
    from tell.decode.grammar import Mask
    from tell.decode.guide import Guide
    from tell.decode.protocol import DecodingEngine
    from tell.decode.sampler import Decoding
    from tell.models.load import Loaded


CONSTRAIN = "generate.constrain=off and no arm ending in +schema"


class ModelCache:
    """Keeps the base model and engine of one run for the next one if that needs the same; one at a time."""

    def __init__(self) -> None:
        self.key: tuple | None = None
        self.held: tuple[Loaded, DecodingEngine] | None = None

    def get(self, key: tuple, make: Callable[[], tuple[Loaded, DecodingEngine]]) -> tuple[Loaded, DecodingEngine]:
        """Model and engine of a key; those of another key are dropped first, since two may not fit."""
        if self.held is None or self.key != key:
            self.drop()
            self.key, self.held = key, make()
        return self.held

    def drop(self) -> None:
        """Free it and its GPU memory; the next run loads it again."""
        held, self.key, self.held = self.held is not None, None, None
        gc.collect()
        if held:
            import torch

            torch.cuda.empty_cache()  # memory cached by torch counts as taken for another engine


@dataclass
class Session:
    """An open model, loaded at first use.

    Attributes:
        config: chooses device, number format and engine.
        check: called at every token and block of rows; may raise to stop.
        models: shares the loaded model with other sessions.
        stream: tokens are needed one by one, or decided by guides, which vLLM's offline engine does not support.
        announce: note what was loaded, and on which path it computes.
        watch: gets (prompt number, token) as answers come.
    """

    files: ModelFiles
    config: Config
    chat: ChatTokenizer
    display: Display = field(default_factory=Silent)
    check: Callable[[], None] = lambda: None
    models: ModelCache = field(default_factory=ModelCache)
    stream: bool = False
    announce: bool = False
    watch: Callable[[int, int], None] | None = None
    _held: tuple[Loaded, DecodingEngine] | None = None

    def load(self) -> tuple[Loaded, DecodingEngine]:
        """The base model and its engine.

        Raises:
            TellError: it cannot be loaded, its attention cannot be computed over packed rows, or vLLM is requested
                and does not start.
        """
        if self._held is None:
            with self.display.bar("load the model", None):  # importing torch and compiling kernels takes seconds too
                self._held = _load(self)
            if self.announce:
                from tell.train.fast.fused import path_notes

                loaded = self._held[0]
                notes = "; ".join([loaded.why, *path_notes(loaded.model)])
                self.display.note(f"{self.files.name} ({self.files.origin}); {notes}")
        return self._held

    def release(self) -> None:
        """Release the model, and free it unless another session holds it; the next use loads it again."""
        self._held = None
        self.models.drop()

    @property
    def loaded(self) -> Loaded:
        return self.load()[0]

    @property
    def model(self) -> PreTrainedModel:
        return self.load()[0].model

    @property
    def engine(self) -> DecodingEngine:
        return self.load()[1]

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @contextmanager
    def adapter(self, folder: Path | None) -> Iterator[None]:
        """Inside this context the model answers with an adapter; None: untuned."""
        with self.engine.adapter(folder):
            yield

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        title: str,
        guides: Sequence[Guide] | None = None,
        masks: Sequence[Mask] | None = None,
    ) -> list[Answer]:
        """Decoded answers in the order of ``prompts`` (token ids), with a bar of that title.

        Args:
            guides: of each prompt; they decide closed fields.
            masks: of each prompt; they constrain its answer.
        """
        with self.display.bar(title, len(prompts), "answers") as advance:
            written = 0

            def progress(new: int, further: float) -> None:
                nonlocal written
                written += new
                advance(further, f"{written} tokens")
                self.check()

            return self.engine.generate(
                prompts, decoding, progress=progress, on_token=self.watch, guides=guides, masks=masks
            )

    def row_losses(self, table: RowTable, progress: Callable[[int], None] | None = None) -> np.ndarray:
        """(rows,) mean nll in nats a token of each row's trained tokens; ``progress`` gets the rows of each pass."""
        from tell.train.row_losses import row_losses

        def advance(rows: int) -> None:
            if progress:
                progress(rows)
            self.check()

        return row_losses(self.model, table, micro_tokens=self.config.train.forward_tokens, progress=advance)


def _load(session: Session) -> tuple[Loaded, DecodingEngine]:
    from tell.decode.engine import Engine
    from tell.models.load import choose_device, load_model

    files, config = session.files, session.config
    chosen = config.model
    device = str(choose_device(chosen.device))
    own = session.stream or chosen.base != FULL  # vLLM would decode with the whole weights
    choice = "own" if own else pick_engine(config.generate.engine, device)

    def make() -> tuple[Loaded, DecodingEngine]:
        given = {"dtype": chosen.dtype, "device": chosen.device, "base": chosen.base}
        loaded = load_model(files, trust_remote_code=chosen.trust_remote_code, **given)

        def ours() -> Engine:
            return Engine(loaded.model, device=loaded.device, max_positions=files.architecture.max_positions)

        vllm = _vllm_engine(files, loaded, config, ours) if choice == "vllm" else ""
        if not isinstance(vllm, str):
            return loaded, vllm
        engine = ours()
        engine.fallback = vllm
        return loaded, engine

    rank = config.train.lora_r if choice == "vllm" else None  # vLLM reserves room for adapters of one rank
    key = (files.path, files.fingerprint, *chosen.arithmetic, chosen.trust_remote_code, choice, rank)
    return session.models.get(key, make)


def _vllm_engine(
    files: ModelFiles, loaded: Loaded, config: Config, own: Callable[[], DecodingEngine]
) -> DecodingEngine | str:
    """vLLM next to the loaded model; why not, also as a warning, where it was not requested by name.

    Args:
        own: makes the engine that then takes over where vLLM fails later.
    """
    from tell.decode.vllm_engine import LONGEST, VllmEngine

    try:
        return VllmEngine(
            Path(files.path),
            loaded.model,
            max_positions=files.architecture.max_positions or LONGEST,
            dtype=dtype_name(loaded),
            rank=config.train.lora_r,
            own=None if config.generate.engine == "vllm" else own,
        )
    except Exception as error:  # starting another engine may raise any exception
        if config.generate.engine == "vllm":
            raise TellError(
                f"vLLM does not start ({first_line(error)})", where="generate.engine", remedy="Use generate.engine=own."
            ) from error
        why = f"vLLM does not start ({first_line(error)})"
        warnings.warn(f"{why}; answers are decoded without it", stacklevel=2)
        return why


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


def own_engine(config: Config) -> Config:
    """The configuration with our own decoding engine."""
    return config.model_copy(update={"generate": config.generate.model_copy(update={"engine": "own"})})


def check_engine(config: Config, *, decides: bool, constrains: bool) -> None:
    """Refuse vLLM by name where only our own engine serves: a quantised base, closed fields, constrained answers.

    Raises:
        TellError: vLLM is requested by name.
    """
    if config.generate.engine == "vllm" and config.model.base != FULL:
        raise TellError(
            f"vLLM decodes with the whole weights, and the adapter is trained over {config.model.base}",
            where="generate.engine",
            remedy="Use generate.engine=own, or model.base=full.",
        )
    if config.generate.engine == "vllm" and (decides or constrains):
        what, without = ("decide closed fields", "generate.closed=off") if decides else ("constrain answers", CONSTRAIN)
        remedy = f"Use generate.engine=own, or {without}."
        raise TellError(f"vLLM cannot {what}", where="generate.engine", remedy=remedy)


def check_trainable(files: ModelFiles, model: ModelConfig, *, held: bool = False) -> None:
    """Refuse to train over base weights that leave the GPU no room, before they are loaded.

    Args:
        held: another session's model is on the GPU, which goes or is this one's: what is free now says nothing.

    Raises:
        TellError: they are larger than the GPU.
    """
    place = likely_place(model.device, model.dtype)
    memory = gpu_memory() if place.device == "cuda" else None
    if memory is None:
        return
    size, room = weight_bytes(files.architecture, model.base, WIDTHS[place.dtype]), memory[0 if held else 1]
    from tell.models.load import choose_device

    if is_too_large(size, room) and choose_device(model.device).type == "cuda":  # not a torch built without it
        several = "several GPUs: torchrun --nproc-per-node N -m tell tune ... --set train.parallel=fsdp"
        remedy = f"Use model.base=nf4, or {several}."
        if model.base == "nf4":
            remedy = f"Use a smaller model, or {several} --set model.base=full."
        raise TellError(
            f"its weights ({size / 1e9:.1f} GB) leave the GPU, with {room / 1e9:.1f} GB free, no room to train",
            where=files.name,
            remedy=remedy,
        )


def dtype_name(loaded: Loaded) -> str:
    """``bf16``, ``fp16`` or ``fp32``."""
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(loaded.dtype), "fp32")
