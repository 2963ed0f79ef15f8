"""What the stages share: device, clock, findings, models with random weights, rows."""

from __future__ import annotations

import gc
import json
import math
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu import goals
from bench.rows import Rows, make_rows
from tell.train.packing import TrainRow

SIZES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "kind": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "theta": 1e5,
    },
    "qwen3-0.6b": {
        "kind": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "theta": 1e6,
    },
    "llama3-8b": {
        "kind": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False, "theta": 5e5,
    },
    "tiny": {
        "kind": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "theta": 1e4,
    },
}  # fmt: skip


@dataclass
class Run:
    """One run of the stages; ``findings`` are (name, value, whether it is as it should be)."""

    out: Path
    device: str
    tiny: bool
    sizes: list[str]
    batch: int
    micro: int
    deadline: float
    stages: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    findings: list[tuple[str, Any, bool]] = field(default_factory=list)
    begin: float = field(default_factory=lambda: now())
    lost: str | None = None  # why the device computes nothing more in this process

    def find(self, name: str, value: Any, *, good: bool = True) -> None:
        """One line, kept in ``result.json`` too."""
        self.findings.append((name, value, good))
        print(f"[{now() - self.begin:6.1f}s] {'  ' if good else '! '}{name}: {value}", flush=True)

    def failed(self, out: dict[str, Any], key: str, error: Exception, *, good: bool = False) -> None:
        """Keep an error as the result of ``key``, and what else is in ``out``; ``good``: it may be, as a peer's."""
        traceback.print_exc()
        out[key] = {"error": first_line(error)}
        self.find(key, out[key]["error"], good=good)
        self.save()  # first of all: an error of the device may end the process
        self.clear()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - (now() - self.begin)

    def late(self, name: str, seconds: float) -> bool:
        """Whether ``name`` must not begin: ``seconds``, which it takes at least, are not left (it says so), or the
        device is lost.
        """
        short = self.left < seconds
        if self.lost is None and short:
            self.find(name, "no time left")
        return self.lost is not None or short

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        content = {
            "findings": self.findings, "stages": self.stages, "seconds": self.seconds,
            "goals": goals.judged(self.stages), "ratios": goals.ratios(self.stages),
        }  # fmt: skip
        (self.out / "goals.md").write_text(goals.table(self.stages, self.card), encoding="utf-8")
        temporary = self.out / ".result.json"
        temporary.write_text(json.dumps(strict(content), indent=1, default=str), encoding="utf-8")
        temporary.replace(self.out / "result.json")

    def go_on(self) -> None:
        """Take over what an earlier process left in ``result.json``."""
        path = self.out / "result.json"
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            self.stages, self.seconds = known["stages"], known["seconds"]
            self.findings = [(name, value, good) for name, value, good in known["findings"]]

    @property
    def card(self) -> str:
        return str(self.stages.get("facts", {}).get("gpu", self.device))

    @property
    def scale(self) -> float:
        """Of all row lengths."""
        return 0.2 if self.tiny else 1.0

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Give memory back, so that the peak of what follows is its own; notices a device that is lost.

        After an illegal access or a failed assertion on the device every later call of CUDA in this process fails.
        """
        if self.device != "cuda" or self.lost is not None:
            return
        try:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        except Exception as error:
            self.lost = first_line(error)

    def peak_gb(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.device == "cuda" else None


def now() -> float:
    """Seconds on the clock of the deadline."""
    return time.monotonic()


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def strict(value: Any) -> Any:
    """The same as strict JSON, which has neither NaN nor infinity: their names instead; numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def make_model(size: str, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A frozen model with seeded random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    facts = dict(SIZES[size])
    config_class = {"llama": LlamaConfig, "qwen3": Qwen3Config}[facts.pop("kind")]
    rope = {"rope_type": "default", "rope_theta": facts.pop("theta")}
    config = config_class(max_position_embeddings=8192, rope_parameters=rope, **facts)
    torch.manual_seed(seed)
    with torch.device(device):  # not .to(dtype): it would round the rotary frequencies
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def rows_for(size: str, n: int, scale: float, seed: int = 0) -> Rows:
    """The benchmark's mixture of task and general rows over a model's vocabulary."""
    return make_rows(n, np.arange(5, SIZES[size]["vocab_size"], dtype=np.int32), seed, scale)


def equal_rows(size: str, n: int, length: int) -> Rows:
    """n rows of one length, half of each trained, behind no anchor."""
    ids = np.random.default_rng(3).integers(5, SIZES[size]["vocab_size"], n * length).astype(np.int32)
    prompts, task = np.full(n, length // 2, np.int32), np.arange(n) % 20 == 3
    return Rows(ids, np.arange(n + 1, dtype=np.int64) * length, prompts, task)


def quantised(model: Any, base: str) -> Any:
    """A model whose layers' matrices are in the format of ``model.base``."""
    if base == "full":
        return model
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    from tell.kernels.quantised import adopt_quantised

    device = model.device
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not torch.nn.Linear:
                continue
            shape, data = (child.in_features, child.out_features), child.weight.data
            if base == "nf4":
                layer: Any = Linear4bit(*shape, bias=False, compute_dtype=data.dtype, quant_type="nf4", device="meta")
                layer.weight = Params4bit(data, requires_grad=False, quant_type="nf4", compress_statistics=True).to(
                    device
                )
            else:
                layer = Linear8bitLt(*shape, bias=False, has_fp16_weights=False, device="meta")
                layer.weight = Int8Params(data.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
            setattr(module, name, layer)
    adopt_quantised(model)
    return model


def train_rows(rows: Rows) -> list[TrainRow]:
    out = []
    for i in range(len(rows)):
        ids, prompt = rows.row(i)
        out.append(TrainRow(ids, np.arange(len(ids)) >= prompt, int(rows.task[i]), bool(rows.task[i])))
    return out
