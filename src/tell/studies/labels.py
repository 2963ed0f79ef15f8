"""Display names of grid keys, values and points, for a study's tables and figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath

from tell.names import arm as arm_of
from tell.nested import VARIABLE
from tell.overrides import GENERAL_AMOUNTS

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
COUNTED = frozenset({"general.tokens", "general.rows", "task.rows", "task.tokens"})  # written after their number
ANCHORS = {"auto": "automatic", "none": "none"}
SFT = "SFT"  # TELL without general rows is SFT for `mix.repeat` epochs


def key_name(key: str) -> str:
    """A key of the grid in words; an unknown one as it is."""
    return KEYS.get(key, key)


class Named(str):
    """A file of the grid, with a label that is unique in its study."""

    label: str

    def __new__(cls, path: str, label: str) -> Named:
        made = super().__new__(cls, path)
        made.label = label
        return made


def unique_labels(points: Sequence[Mapping[str, object]], keys: Sequence[str]) -> dict[str, dict[str, Named]]:
    """Labels for files whose names are not unique (``alpaca/train.jsonl``), by key and file; none for files that come
    with the value of another key (an ``anchor.txt`` for each data set)."""
    found: dict[str, dict[str, Named]] = {}

    def shown(point: Mapping[str, object], key: str) -> str:
        value = point.get(key)
        return value_name(found[key].get(value, value) if key in found and isinstance(value, str) else value, key)

    for key in keys:
        texts = list(dict.fromkeys(text for point in points if isinstance(text := point.get(key), str)))
        if len({value_name(text, key) for text in texts}) == len(texts):
            continue
        values: dict[tuple[str, ...], set[str]] = {}  # by the values of the other keys
        for point in points:
            rest = tuple(shown(point, other) for other in keys if other != key)
            values.setdefault(rest, set()).add(str(point.get(key)))
        if any(len(several) > 1 for several in values.values()):
            files = [text for text in texts if _is_file(text)]
            labels = _ends(files, {value_name(text, key) for text in texts if text not in files})
            found[key] = {file: Named(file, label) for file, label in zip(files, labels, strict=True)}
    return found


def _ends(files: Sequence[str], taken: Collection[str]) -> list[str]:
    """As many last parts of each path as make them unique, also among the names taken."""
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


def value_name(value: object, key: str = "") -> str:
    """A value of the grid, short: thousands separated, files by their names."""
    if value is None:
        return "not set"
    if isinstance(value, Named):
        return value.label
    if key == "anchor.text" and value in ANCHORS:
        return ANCHORS[str(value)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:g}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if not _is_file(text):
        return text
    parts = _path(text).parts
    return "/".join(parts[-2:]) if key == "task.data" else parts[-1]  # most are called train.jsonl


def rounded(amount: float) -> str:
    """Three digits, thousands separated."""
    return f"{float(f'{amount:.3g}'):,.10g}"


def point_name(point: Mapping[str, object]) -> str:
    """``15 task rows, 4 times, 30,000 general tokens``; empty for no key."""
    parts = []
    for key, value in point.items():
        if key == "mix.repeat" and value is not None:
            parts.append("once" if value == 1 else f"{value_name(value)} times")
        elif key in COUNTED and isinstance(value, int | float):
            parts.append(f"{value_name(value)} {key_name(key)}")
        else:
            parts.append(f"{key_name(key)}: {value_name(value, key)}")
    return ", ".join(parts)


def arm_name(arm: str) -> str:
    """An arm in words."""
    return arm_of(arm).label


def arm_point_name(arm: str, point: Mapping[str, object], *, alone: bool = False) -> str:
    """``TELL, 4 times, 30,000 general tokens``; ``alone``, without general rows, ``SFT, 4 times``."""
    if alone:
        amounts = {f"general.{way}" for way in GENERAL_AMOUNTS}
        arm, point = SFT, {key: value for key, value in point.items() if key not in amounts}
    return ", ".join(filter(None, (arm_name(arm), point_name(point))))
