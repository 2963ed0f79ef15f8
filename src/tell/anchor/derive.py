"""An anchor composed from the data: the schema's keys or the labels."""

from __future__ import annotations

import json
from typing import Any

from tell.anchor.anchor import Anchor, Place
from tell.data.kind import Kind

CHOICES_SHOWN = 8


def derived_anchor(kind: Kind, place: Place) -> Anchor | None:
    """``Answer with one JSON object ...`` or ``Answer with exactly one of these labels ...``; None for free text."""
    if kind.name == "json" and kind.schema:
        keys = ", ".join(
            f"{json.dumps(name, ensure_ascii=False)} ({_describe(part)})"
            for name, part in (kind.shown or kind.schema).get("properties", {}).items()
        )
        text = "Answer with one JSON object and nothing else."
        if keys:
            text = f"{text[:-1]}. Its keys, in this order: {keys}."
        return Anchor(text, place, "derived")
    if kind.list_form is not None and kind.labels:
        text = f"Answer with all of these labels that apply, {kind.list_form.words}, and nothing else:"
        return Anchor(f"{text} {', '.join(kind.labels)}.", place, "derived")
    if kind.labels:
        return Anchor(
            f"Answer with exactly one of these labels and nothing else: {', '.join(kind.labels)}.", place, "derived"
        )
    return None


def _describe(part: dict[str, Any]) -> str:
    """A few words for one property's schema."""
    choices = part.get("enum")
    if choices and len(choices) <= CHOICES_SHOWN:
        return "one of " + ", ".join("null" if c is None else str(c) for c in choices)
    kinds = part.get("type", "value")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    names = {"string": "text", "array": "list", "integer": "whole number", "boolean": "true or false"}
    return " or ".join(names.get(str(kind), str(kind)) for kind in kinds)
