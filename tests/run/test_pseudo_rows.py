"""Pseudo-labelled rows: from unlabelled prompts to arms trained on them, in runs, plans and studies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tell
from run.runs import EXAMPLES, Killer, comparable, config_of, read
from tell.config import Config
from tell.errors import Interrupted, TellError
from tell.files import read_jsonl
from tell.mix.manifest import read_manifest
from tell.nested import merge

ARMS = ["sft-matched", "sft-pseudo", "sft-pseudo-free", "tell", "tell-free", "tell-pseudo", "tell-pseudo-free"]
STUDENTS = {"tell-pseudo": "tell", "sft-pseudo": "sft-matched"}
GREEDY = {"greedy": True, "repetition_penalty": 1.0, "max_new_tokens": 24, "closed": "fused"}


def rows_of(example: str, part: str = "train") -> list[dict]:
    return read_jsonl(EXAMPLES / example / f"{part}.jsonl")


def configured(model: Path, out: Path | None, example: str = "reviews", **sections) -> Config:
    given = {"task": {"rows": 12, "test_rows": 6}, "generate": GREEDY, "eval": {"arms": ARMS}}
    return config_of(model, out, example=example, **merge(given, sections))


def write_unlabelled(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompt_of(row: dict) -> str:
    return next(row[key] for key in ("prompt", "text", "instruction", "question", "input") if key in row)


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A label task with a file of prompts: the training rows that the budget leaves, and some test rows."""
    root = tmp_path_factory.mktemp("pseudo")
    given = [{"prompt": prompt_of(row)} for row in [*rows_of("reviews")[:40], *rows_of("reviews", "test")[:4]]]
    path = write_unlabelled(root / "prompts.jsonl", given)
    config = configured(tiny_model("qwen3"), root / "run", task={"unlabelled": path})
    return tell.tune(config), config


def test_run(made):
    folder, config = made
    metrics = read(folder.metrics)
    print(json.dumps(metrics["pseudo"], indent=1), read(folder.findings)["notices"], metrics["failed"], list(metrics["arms"]))
    for row in read_jsonl(folder.pseudo_labels("tell"))[:5]:
        print(row)
    assert 0
