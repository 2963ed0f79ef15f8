"""TELL's general probe: a small set of rows whose loss before and after tuning measures forgetting."""

from __future__ import annotations

import json
from importlib.resources import files

from tell.data.example import Example

FILE = "general.jsonl"


def load_probe() -> list[Example]:
    """64 everyday instructions with short answers, source ``"probe"``, in the order of the file.

    Written by hand for TELL; no instruction equals one of Alpaca or Dolly. Training on Alpaca makes
    any model better on Alpaca, so forgetting is measured on these. Not for training.
    """
    text = files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    return [
        Example.pair(row["instruction"], row["output"], source="probe", origin=f"{FILE}:{number}")
        for number, row in enumerate(rows, start=1)
    ]
