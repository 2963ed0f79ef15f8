"""``python -m tell.config_docs > docs/reference/config.md``: every key of a run, from the configuration itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tell.config import Config
from tell.presets import MODERN, PAPER

_HEAD = """\
# Configuration

Every key of a run, with its default and meaning. Written by `python -m tell.config_docs`; `tell tune --keys` prints it.

    # run.yaml
    task:
      data: tickets.jsonl
      test: tickets_test.jsonl
    general:
      source: self
      ratio: 20

`tell tune -c run.yaml` reads it. Flags override the file, and `--set general.ratio=50` overrides both; all three
override the preset. Where a key has two defaults, the first is for `preset: modern`, the second for `preset: paper`.
"""


def config_docs() -> str:
    """All keys as Markdown: a table a section."""
    parts = [_HEAD, "## Top level\n", _table(Config, ""), *_sections(Config, "")]
    return "\n".join(parts)


def _sections(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in _fields(model):
        if (section := _section(info)) is None:
            continue
        path = f"{prefix}{name}"
        about = section.__doc__ if section.__doc__ and "__doc__" in vars(section) else None
        yield f"## {path}\n"
        if about:
            yield f"{about.strip()}\n"
        yield _table(section, f"{path}.")
        yield from _sections(section, f"{path}.")


def _table(model: type[BaseModel], prefix: str) -> str:
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, info in _fields(model):
        if _section(info) is None:
            key = f"{prefix}{name}"
            meaning = (info.description or "").replace("<", "\\<")
            cells = (f"`{key}`", _default(key, info), _values(info), meaning)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        yield info.alias or name, info


def _section(info: FieldInfo) -> type[BaseModel] | None:
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _default(key: str, info: FieldInfo) -> str:
    own = info.get_default(call_default_factory=True)
    both = [_show(_of_preset(preset, key, own)) for preset in (MODERN, PAPER)]
    return both[0] if both[0] == both[1] else f"{both[0]}; paper: {both[1]}"


def _of_preset(preset: Mapping[str, Any], key: str, own: object) -> object:
    value: object = preset
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return own
        value = value[part]
    return value


def _show(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _values(info: FieldInfo) -> str:
    """Type and limits, e.g. ``number > 0`` or the choices."""
    kinds = [kind for kind in (get_args(info.annotation) or (info.annotation,)) if kind is not type(None)]
    if get_origin(info.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(info.annotation))
    if get_origin(info.annotation) is tuple:
        return ", ".join(f"`{choice}`" for choice in get_args(get_args(info.annotation)[0])) or "list of text"
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    limits = []
    for rule in info.metadata:
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if (limit := getattr(rule, attribute, None)) is not None:
                limits.append(f"{sign} {limit:g}")
    return " ".join([names[kinds[0]], ", ".join(limits)]).strip()


if __name__ == "__main__":
    print(config_docs(), end="")
