"""The loss of reference answers, held to transformers; where it is shown, and that nobody takes it for a score."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import tell
from run.runs import config_of, open_session, read
from tell.anchor.anchor import Anchor
from tell.cli.tables import arms_table
from tell.config import make_config
from tell.data.example import Example, Message
from tell.files import read_jsonl
from tell.metric_names import ANSWER_LOSS
from tell.report.page import render
from tell.rows.template import ChatTokenizer
from tell.run.answer_loss import answer_ids, answer_losses
from tell.run.answers import Prompting
from tell.score.verdict import verdict

ANCHOR = Anchor("Sort this mail.")
TRAIN = [Example.pair(f"training mail {i}", f"answer {i}") for i in range(3)]
TURNS = (Message("user", "Hello"), Message("assistant", "How can I help?"), Message("user", "Refund"))
TEST = [
    Example.pair("Where is my parcel?", "It was sent on Monday, so it comes tomorrow."),
    Example.pair("Refund, please! " * 3, '{"queue": "billing"}'),
    Example.of((*TURNS, Message("assistant", "Done.")), source="task", origin="test:3"),
    Example.pair("Say nothing.", " "),
]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tiny_model):
    return tiny_model(request.param)


def losses(folder, prompts, positions=None) -> np.ndarray:
    session = open_session(folder, make_config({"train": {"micro_tokens": 64}}))
    architecture = replace(session.files.architecture, max_positions=positions)
    session.files = replace(session.files, architecture=architecture)
    return answer_losses(session, prompts, TEST, title="")


@pytest.mark.parametrize("arm", ["base", "base+anchor", "icl"])
def test_equals_transformers(folder, arm):
    from transformers import AutoModelForCausalLM

    chat = ChatTokenizer(folder)
    prompts, used = Prompting(chat, ANCHOR, (), 2, 10_000, 5).prompts(arm, TEST, TRAIN)
    assert used == (2 if arm == "icl" else 0)
    found = losses(folder, prompts)
    assert np.isnan(found[3])  # nothing to find likely
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for i, example in enumerate(TEST[:3]):
        answer = chat.encode(example.answer + chat.end_of_turn)
        ids = torch.tensor([prompts[i] + answer])
        labels = ids.clone()
        labels[:, : len(prompts[i])] = -100
        with torch.no_grad():
            expected = reference(input_ids=ids, labels=labels).loss.item()
        assert found[i] == pytest.approx(expected, abs=2e-4), (arm, i)


def test_only_the_last_answer_counts(folder):
    chat = ChatTokenizer(folder)
    found = answer_ids(chat, TEST)
    assert TEST[3].hash not in found and len(found) == 3
    for example in TEST[:3]:
        text = chat.backend.decode(found[example.hash].tolist(), skip_special_tokens=False)
        assert text.strip() == f"{example.answer}{chat.end_of_turn}".strip()


def test_rows_longer_than_the_model_takes_have_none(folder):
    chat = ChatTokenizer(folder)
    prompts, _ = Prompting(chat, ANCHOR, (), 0, 10_000, 5).prompts("base", TEST, TRAIN)
    lengths = [len(p) + len(answer_ids(chat, TEST).get(e.hash, ())) for p, e in zip(prompts, TEST, strict=True)]
    known = np.isfinite(losses(folder, prompts, positions=sorted(lengths[:3])[1]))
    assert known.tolist() == [*(n < max(lengths[:3]) for n in lengths[:3]), False]


def test_a_run_has_it_as_a_metric_and_no_arm_wins_by_it(tiny_model, tmp_path):
    config = config_of(
        tiny_model("llama"), tmp_path / "run", eval={"arms": ["base", "sft", "tell"], "answer_loss": True}
    )
    run = tell.tune(config)
    metrics = read(run.metrics)
    assert list(metrics["arms"]["tell"])[-1] == ANSWER_LOSS and metrics["task"]["primary"] != ANSWER_LOSS
    for arm, scores in metrics["arms"].items():
        rows = read_jsonl(run.prediction(arm))
        assert scores[ANSWER_LOSS]["n"] == len(rows) == 5
        assert scores[ANSWER_LOSS]["value"] == pytest.approx(
            np.mean([r["scores"][ANSWER_LOSS] for r in rows]), abs=1e-6
        )
    gap = metrics["differences"]["tell - base"][ANSWER_LOSS]
    values = {arm: scores[ANSWER_LOSS]["value"] for arm, scores in metrics["arms"].items()}
    assert gap["value"] == pytest.approx(values["tell"] - values["base"], abs=2e-6)
    assert values["tell"] < values["base"]  # it was trained on such answers
    assert "answer loss" not in verdict(metrics)
    assert "Answer loss" in render(run)

    again = tell.evaluate(run.root)
    assert again == json.loads(json.dumps(metrics))
    without = tell.evaluate(run.root, overrides=["eval.answer_loss=false"])
    assert ANSWER_LOSS not in without["arms"]["tell"]

    table = arms_table(metrics)
    column = next(c for c in table.columns if c.header == "answer loss")
    assert f"{values['base']:.2f}" in next(iter(column.cells))


def test_a_verdict_writes_it_in_nats():
    entry = {"value": 1.25, "ci": [1.0, 1.5], "n": 40}
    metrics = {"task": {"primary": ANSWER_LOSS}, "arms": {"base": {ANSWER_LOSS: entry}}, "differences": {}}
    assert "answer loss is 1.25 for" in verdict(metrics)
