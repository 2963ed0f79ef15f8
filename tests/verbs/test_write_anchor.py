"""`tell.write_anchor`: candidates by hand and by the model, their scores, what decides."""

from __future__ import annotations

import numpy as np
import pytest

import tell
from run.runs import PROBE, config_of, open_session
from tell.anchor.anchor import Anchor
from tell.errors import TellError
from tell.run.task import limited_rows, load_task
from tell.score.intervals import difference
from tell.score.means import mean_metric
from tell.train.trainer import Trainer
from tell.verbs.write_anchor import short_runs

BY_HAND = ("Sort this mail.", "Read the mail and answer with JSON: category, urgent, amount.")


def config(model, **sections):
    task = {"rows": 12, "test": None, **sections.pop("task", {})}
    return config_of(model, task=task, anchor={"text": "auto", "candidates": 2}, **sections)


def of(result, text):
    return next(c for c in result["candidates"] if c["text"] == text)


def test_beside_those_by_hand(tiny_model):
    result = tell.write_anchor(
        config(tiny_model("llama")), compare=BY_HAND, scores=("loss", "short-run"), short_steps=2
    )
    assert result["decided_by"] == "short_run" and result["text"] == result["candidates"][0]["text"]
    scored = [c for c in result["candidates"] if "reason" not in c]
    assert {c["text"] for c in scored} > set(BY_HAND) and {"derived", "hand"} <= {c["origin"] for c in scored}
    assert [c["short_run"]["value"] for c in scored] == sorted(c["short_run"]["value"] for c in scored)
    assert all(c["short_run"]["steps"] == 2 for c in scored)
    first = of(result, BY_HAND[0])
    assert "loss_difference" not in first and "short_run_difference" not in first
    for candidate in scored:
        assert candidate["loss"]["value"] == candidate["score"]
        for name in ("loss", "short_run"):
            if candidate is not first:
                gap = candidate[f"{name}_difference"]
                assert gap["value"] == pytest.approx(candidate[name]["value"] - first[name]["value"], abs=2e-6)
                assert gap["ci"][0] <= gap["value"] <= gap["ci"][1]
    assert "separation" not in first


def test_cheap_scores_by_default(tiny_model):
    result = tell.write_anchor(config(tiny_model("llama")), compare=BY_HAND[:1])
    found = of(result, BY_HAND[0])
    assert set(found) == {"text", "origin", "score", "loss", "separation"} and found["separation"]["layer"] == 1
    assert result["decided_by"] == "loss"
    alone = tell.write_anchor(
        config(tiny_model("llama"), general={"source": "none", "rows": None}), compare=BY_HAND[:1]
    )
    assert "separation" not in of(alone, BY_HAND[0]) and of(alone, BY_HAND[0])["loss"] == found["loss"]


@pytest.mark.parametrize("source", [str(PROBE), "none"], ids=["general", "none"])
def test_short_runs_differ_by_the_anchor_alone(tiny_model, monkeypatch, source):
    """Same rows, order, seed and steps; equal anchors give equal losses, and the model is given back untouched."""
    rows = None if source == "none" else 10
    task = load_task(config(tiny_model("llama"), general={"source": source, "rows": rows}))
    session = open_session(task.files.path, task.config)
    before = {name: p.clone() for name, p in session.model.named_parameters()}
    mixtures = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: mixtures.append(self.job.mixture) or run(self))
    anchors = [Anchor(text) for text in (BY_HAND[0], BY_HAND[1], BY_HAND[0])]
    a, b, again = short_runs(task, session, anchors, 3)
    assert a.tolist() == again.tolist() != b.tolist() and np.isfinite([a, b]).all()
    assert all((p == before[name]).all() for name, p in session.model.named_parameters())
    assert len({m.digest() for m in mixtures}) == 1 and mixtures[0].steps(4) == 3 and len(mixtures[0]) == 12
    shares = mixtures[0].counts()["rows"]
    assert shares == ({"task": 12} if source == "none" else {"task": 6, "general": 6})
    gap = difference(mean_metric(b), mean_metric(a), seed=0, samples=100)
    assert gap["n"] == len(task.validation) > 0


def test_short_run_learns(tiny_model):
    task = load_task(config(tiny_model("llama"), general={"source": "none", "rows": None}))
    session = open_session(task.files.path, task.config)
    few, many = (short_runs(task, session, [Anchor("Sort.")], n)[0].mean() for n in (1, 12))
    assert many < few - 0.1


def test_few_rows_hold_some_of_theirs_out(tiny_model):
    task = load_task(config(tiny_model("llama"), task={"rows": 6, "validation_fraction": 0}))
    session = open_session(task.files.path, task.config)
    (losses,) = short_runs(task, session, [Anchor("Sort.")], 1)
    assert not task.validation and len(losses) == 2 and len(limited_rows(task, Anchor("Sort."))) == 6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scores": ("los",)}, "--score: unknown score 'los'"),
        ({"scores": ("loss",), "short_steps": 4}, "--short-steps.*Add it to --score"),
        ({"short_steps": 0}, "--short-steps: 0 steps"),
        ({"compare": ("@nowhere.txt",)}, "--compare @nowhere.txt: cannot be read"),
        ({"compare": (" ",)}, "--compare: the anchor is empty"),
    ],
)
def test_refused_before_the_model_is_loaded(tmp_path, options, match):
    with pytest.raises(TellError, match=match):
        tell.write_anchor(config(tmp_path / "no-model"), **options)


def test_separation_needs_general_rows(tmp_path):
    without = config(tmp_path / "no-model", general={"source": "none", "rows": None})
    with pytest.raises(TellError, match=r"separation needs general rows.*--general"):
        tell.write_anchor(without, scores=("separation",))
