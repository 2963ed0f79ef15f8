"""What tables and figures of a study call the keys and values of its grid, and its metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from tell.config import GENERAL_AMOUNTS
from tell.names import BENCHMARK, canonical  # noqa: F401
from tell.names import arm as arm_of
from tell.names import metric as metric_term
from tell.studies.nested import VARIABLE

KEYS = {
    "general.tokens": "general tokens",
    "general.rows": "general rows",
    "general.ratio": "general tokens for each task token",
    "general.source": "general data",
    "task.data": "task data",
    "task.rows": "task rows",
    "task.tokens": "task tokens",
    "mix.repeat": "times each task row is seen",
    "mix.order": "order",
    "anchor.text": "anchor",
    "model.name": "model",
    "train.learning_rate": "learning rate",
    "train.lora_r": "LoRA rank",
}
ANCHORS = {"auto": "automatic", "none": "none"}
SFT = "SFT"  # what TELL is without general rows: `mix.repeat` epochs


def key_name(key: str) -> str:
    """A key of the grid in words; one that is not known, as it is."""
    return KEYS.get(key, key)


class Named(str):
    """A file of the grid, and what it is called among those of its study."""

    label: str

    def __new__(cls, path: str, label: str) -> Named:
        made = super().__new__(cls, path)
        made.label = label
        return made


def told_apart(points: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, dict[str, Named]]:
    """Names for files whose own do not tell them apart (``alpaca/train.jsonl``), by key and file; not for files that
    another key goes along with (an ``anchor.txt`` for each data set)."""
    found: dict[str, dict[str, Named]] = {}

    def shown(point: Mapping[str, Any], key: str) -> str:
        value = point.get(key)
        return value_name(found[key].get(value, value) if key in found and isinstance(value, str) else value, key)

    for key in keys:
        texts = list(dict.fromkeys(point[key] for point in points if isinstance(point.get(key), str)))
        if len({value_name(text, key) for text in texts}) == len(texts):
            continue
        beside: dict[tuple[str, ...], set[str]] = {}
        for point in points:
            rest = tuple(shown(point, other) for other in keys if other != key)
            beside.setdefault(rest, set()).add(str(point.get(key)))
        if any(len(values) > 1 for values in beside.values()):
            files = [text for text in texts if _is_file(text)]
            labels = _ends(files, {value_name(text, key) for text in texts if text not in files})
            found[key] = {file: Named(file, label) for file, label in zip(files, labels, strict=True)}
    return found


def _ends(files: Sequence[str], taken: Collection[str]) -> list[str]:
    """As many last parts of each path as tell them apart, and from other names."""
    parts = [_path(file).parts for file in files]
    for n in range(1, max(map(len, parts), default=0)):
        ends = ["/".join(part[-n:]) for part in parts]
        if len({*ends, *taken}) == len(files) + len(taken):
            return ends
    return list(files)


def _is_file(text: str) -> bool:
    return "/" in text and " " not in text


def _path(text: str) -> PurePath:
    return PurePath(VARIABLE.sub(r"\1", text).removeprefix("@"))


def value_name(value: Any, key: str = "") -> str:
    """A value of the grid, short: thousands separated, files by their names."""
    if value is None:
        return "not set"
    if isinstance(value, Named):
        return value.label
    if key == "anchor.text" and value in ANCHORS:
        return ANCHORS[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if not _is_file(text):
            return text
        parts = _path(text).parts
        return "/".join(parts[-2:]) if key == "task.data" else parts[-1]  # train.jsonl is what most are called
    return f"{value:,}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:g}"


def rounded(amount: float) -> str:
    """Three digits, thousands separated."""
    return f"{float(f'{amount:.3g}'):,.10g}"


def point_name(point: Mapping[str, Any]) -> str:
    """``15 task rows, 4 times, 30,000 general tokens``; empty for no key."""
    parts = []
    for key, value in point.items():
        if key == "mix.repeat" and value is not None:
            parts.append("once" if value == 1 else f"{value_name(value)} times")
            continue
        counted = isinstance(value, int | float) and key in (
            "general.tokens",
            "general.rows",
            "task.rows",
            "task.tokens",
        )
        parts.append(
            f"{value_name(value)} {key_name(key)}" if counted else f"{key_name(key)}: {value_name(value, key)}"
        )
    return ", ".join(parts)


def arm_name(arm: str) -> str:
    """An arm in words."""
    return arm_of(arm).label


def arm_point_name(arm: str, point: Mapping[str, Any], *, alone: bool = False) -> str:
    """``TELL, 4 times, 30,000 general tokens``; ``alone``, without general rows, ``SFT, 4 times``."""
    if alone:
        amounts = {f"general.{way}" for way in GENERAL_AMOUNTS}
        arm, point = SFT, {key: value for key, value in point.items() if key not in amounts}
    return ", ".join(filter(None, (arm_name(arm), point_name(point))))


def scale_of(metric: str) -> float:
    """What values are multiplied by in figures: shares are drawn in per cent."""
    return 100.0 if metric_term(metric).unit in ("share", "points") else 1.0


def axis_label(metric: str) -> str:
    """The metric with its unit, for an axis."""
    return metric_term(metric).axis_label
