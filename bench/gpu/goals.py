"""The figures that a run is judged by: what is accepted, and what is aimed at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BIG, SMALL = "llama3-8b", "smollm2-135m"
PEERS = ("peers", "liger", "trl", "unsloth")  # stages
NOT_FINITE = ("nan", "inf", "-inf")  # as JSON has them: a figure that was measured, and is wrong


@dataclass(frozen=True)
class Goal:
    """One figure.

    Attributes:
        name: in words.
        path: its place in the stages' results.
        accept, aim: at least these, or with ``at_most`` at most; None: there is none.
        unit: of all three; absolute speeds and sizes are for an H100 of 80 GB.
    """

    name: str
    path: tuple[str, ...]
    accept: float | None
    aim: float | None = None
    unit: str = ""
    at_most: bool = False

    def verdict(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        sign = -1 if self.at_most else 1
        if self.aim is not None and sign * value >= sign * self.aim:
            return "aim reached"
        if self.accept is None:
            return "aim not reached"
        return "accepted" if sign * value >= sign * self.accept else "MISSED"


SPEED, GB = "tokens/s", "GB"
GOALS = (
    Goal("8B LoRA bf16, rows of 150 tokens", ("train", f"{BIG}: tell", "tokens_s"), 14_000, 16_500, SPEED),
    Goal("its peak memory", ("train", f"{BIG}: tell", "peak_gb"), 36, None, GB, True),
    Goal("all layers recomputed", ("train", f"{BIG}: tell, recomputed", "tokens_s"), 10_500, None, SPEED),
    Goal("its peak memory", ("train", f"{BIG}: tell, recomputed", "peak_gb"), 22, None, GB, True),
    Goal("8B in bf16, rows of 2,048, on 24 GB", ("train", f"{BIG}: tell, 24 GB", "peak_gb"), 24, None, GB, True),
    Goal("8B in nf4, rows of 2,048, on 12 GB", ("train", f"{BIG}: tell nf4, 12 GB", "peak_gb"), 12, None, GB, True),
    Goal("135M LoRA bf16", ("train", f"{SMALL}: tell", "tokens_s"), None, 100_000, SPEED),
    Goal("135M against the best peer of this run", ("ratios", SMALL), 3, None, "times"),
    Goal("decoding 64 rows, 8B", ("decode", f"{BIG} tell", "tokens_s"), 4_500, 12_000, SPEED),
    Goal("decoding 64 rows, 135M", ("decode", f"{SMALL} tell", "tokens_s"), 15_000, None, SPEED),
    Goal("card busy while 8B trains", ("profile", BIG, "busy"), 0.9, None, "share"),
    Goal("applying an 8B adapter", ("merge", BIG, "chosen", "apply_s"), 1, None, "s", True),
    Goal("its memory", ("merge", BIG, "chosen", "more_gb"), 1, None, GB, True),
    Goal("8 steps, fp32 against CPU fp32", ("equal", "float32", "loss_gap"), 1e-4, None, "relative", True),
    Goal("8 steps, bf16 against CPU fp32", ("equal", "bfloat16", "loss_gap"), 1e-2, None, "relative", True),
    Goal("8 steps, fp16 against CPU fp32", ("equal", "float16", "loss_gap"), 1e-2, None, "relative", True),
    Goal("resumed adapter, fp32", ("resume", "float32", "equal"), 1, None, "equal"),
    Goal("resumed adapter, bf16", ("resume", "bfloat16", "cosine"), 0.9999, None, "cosine"),
    Goal("attention against fp64", ("attention", "worst"), 1e-2, None, "relative", True),
    Goal("predicted peak memory, 8B", ("memory", BIG, "off_by"), 0.15, None, "relative", True),
    Goal("predicted peak memory, 135M", ("memory", SMALL, "off_by"), 0.15, None, "relative", True),
)


def ratios(stages: Mapping[str, Any]) -> dict[str, float]:
    """TELL's speed over that of the fastest peer, by size; sizes without both are left out."""
    out = {}
    for size in (BIG, SMALL, "qwen3-0.6b", "tiny"):
        own = stages.get("train", {}).get(f"{size}: tell", {}).get("tokens_s")
        theirs = [
            entry["tokens_s"]
            for stage in PEERS
            for key, entry in stages.get(stage, {}).items()
            if key.startswith(f"{size}: ") and isinstance(entry, dict) and entry.get("tokens_s")
        ]
        if own and theirs:
            out[size] = round(own / max(theirs), 2)
    return out


def judged(stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every goal with its figure, None where it was not measured, and the verdict."""
    known = {**stages, "ratios": ratios(stages)}
    out = []
    for goal in GOALS:
        value: Any = known
        for key in goal.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        number = float(value) if isinstance(value, int | float) or value in NOT_FINITE else None
        limits = {"accept": goal.accept, "aim": goal.aim, "unit": goal.unit, "at_most": goal.at_most}
        out.append({"name": goal.name, "value": number, **limits, "verdict": goal.verdict(number)})
    return out


def table(stages: Mapping[str, Any], card: str) -> str:
    """The goals as a table in Markdown."""
    lines = [f"| {card} | measured | accepted | aim | |", "|---|---|---|---|---|"]
    for row in judged(stages):
        sign = "≤ " if row["at_most"] else "≥ "
        value = "–" if row["value"] is None else f"{row['value']:,.5g} {row['unit']}"
        accept, aim = ("" if row[key] is None else f"{sign}{row[key]:,g}" for key in ("accept", "aim"))
        lines.append(f"| {row['name']} | {value} | {accept} | {aim} | {row['verdict']} |")
    return "\n".join(lines) + "\n"
