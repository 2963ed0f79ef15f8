"""Built-in general instruction rows: open prompts written for TELL, answered by SmolLM2-135M-Instruct.

``prompts.jsonl`` has a row per prompt, ``{"prompt", "completion", "kind", "language"}``; ``completion`` is null where
the model's answer did not pass the filters of `tell.run.self_written`. Any model can answer the prompts itself.
``witness.jsonl`` has 200 further prompts with answers, none of them in any mix: loss on them measures
forgetting. ``README.md`` says how both were made.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.resources import files

from tell.data.example import Example
from tell.data.sources import Loaded

PROMPTS, WITNESS = "prompts.jsonl", "witness.jsonl"
ON_BOARD = "builtin: on board, answered by SmolLM2-135M"  # the path in facts


def load_builtin() -> Loaded:
    """The rows whose answer was kept, as general data, in the order of the file."""
    examples = _examples(PROMPTS, "general")
    digest = hashlib.sha256(_text(PROMPTS).encode()).hexdigest()
    columns = {"prompt": "prompt", "answer": "completion"}
    return Loaded(examples, "prompt/completion", columns, ON_BOARD, digest)


def load_prompts() -> list[str]:
    """Every prompt but the witness set's, answered or not, in the order of the file."""
    return [row["prompt"] for row in _rows(PROMPTS)]


def load_witness() -> list[Example]:
    """The 200 witness rows, source ``"witness"``, in the order of the file. Not for training."""
    return _examples(WITNESS, "witness")


def _examples(name: str, source: str) -> list[Example]:
    return [
        Example.pair(row["prompt"], row["completion"], source=source, origin=f"{name}:{number}")
        for number, row in enumerate(_rows(name), start=1)
        if row["completion"] is not None
    ]


@cache
def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in _text(name).split("\n") if line]


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
