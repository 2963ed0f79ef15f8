"""Anchors written by the model: candidates, their scores, the choice; and those composed from the data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import tell
from run.runs import config_of, open_session, read
from tell.anchor.anchor import Anchor
from tell.anchor.derive import derived_anchor
from tell.data.kind import Kind, detect_kind
from tell.decode.engine_rows import Answer
from tell.errors import Interrupted
from tell.progress import Silent
from tell.rows.tokenize import tokenize
from tell.run.anchor_candidates import SCORED_ROWS, anchor_losses, write_anchor_candidates
from tell.run.choose_anchor import choose_anchor
from tell.run.task import load_task
from tell.train.row_losses import row_losses


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Written:
    """An engine whose model has already made up its mind: the texts in turn, as tokens."""

    def __init__(self, chat, texts, device="cpu"):
        self.chat, self.texts, self.device, self.max_positions, self.prompts = chat, texts, device, 1024, []

    def generate(self, prompts, decoding, progress=None, on_token=None, guides=None, masks=None):
        self.prompts = [self.chat.decode(ids) for ids in prompts]
        return [
            Answer(self.chat.encode(text)[: decoding.max_new_tokens], "length" if len(text) > 300 else "stop")
            for text in self.texts
        ]


def setup(model, texts=None, *, display=None, check=lambda: None, **sections):
    """A task, and its model's session, which has made up its mind where texts are given."""
    task = load_task(config_of(model, **sections), display)
    engine = None if texts is None else Written(task.chat, texts)
    return task, open_session(model, task.config, display=display, check=check, engine=engine)


TEXTS = [
    "Write JSON for this mail.",
    "too short",
    "Write JSON for this mail.",
    ' "Say what is wrong here." ',
    "x " * 200,
]


def test_best_candidate_has_the_lowest_score(tiny_model):
    task, session = setup(tiny_model("llama"), TEXTS, anchor={"text": "auto", "candidates": 5})
    anchor, candidates = choose_anchor(task, session)
    scored = [c for c in candidates if c["score"] is not None]
    assert [c["score"] for c in scored] == sorted(c["score"] for c in scored)
    assert anchor.text == scored[0]["text"] and anchor.origin == scored[0]["origin"]
    assert {c["text"] for c in scored if c["origin"] == "self"} == {TEXTS[0], "Say what is wrong here."}
    assert [c["origin"] for c in scored].count("derived") == 1 and len(scored) == 3
    reasons = [c["reason"] for c in candidates if c["score"] is None]
    assert reasons == ["too short", "written before", "longer than an instruction should be"]
    rows = task.validation[:SCORED_ROWS]
    for candidate in scored:
        table = tokenize(rows, task.chat, source="task", anchor=Anchor(candidate["text"]))
        assert candidate["score"] == pytest.approx(row_losses(session.model, table).mean(), abs=1e-5)


def test_each_candidate_sees_examples_of_its_own(tiny_model):
    task, session = setup(tiny_model("llama"), TEXTS[:3], anchor={"text": "auto", "candidates": 3, "examples": 2})
    first = [c.to_dict() for c in write_anchor_candidates(task, session)]
    prompts = session.engine.prompts
    assert len(set(prompts)) == 3
    shown = [[e for e in task.train if e.question[:200] in prompt] for prompt in prompts]
    for examples, prompt in zip(shown, prompts, strict=True):
        assert len(examples) == 2 and all(e.answer[:200] in prompt for e in examples)
    assert [c.to_dict() for c in write_anchor_candidates(task, session)] == first
    assert session.engine.prompts == prompts


def test_examples_that_do_not_fit_are_left_out(tiny_model):
    task, session = setup(tiny_model("llama"), TEXTS[:1], anchor={"text": "auto", "candidates": 1, "examples": 50})
    write_anchor_candidates(task, session)
    engine = session.engine
    assert len(task.chat.encode(engine.prompts[0])) <= engine.max_positions and "Input:" in engine.prompts[0]


def test_only_rows_within_the_budget_are_shown(tiny_model):
    sections = {"anchor": {"text": "auto", "candidates": 9, "examples": 3}, "task": {"rows": 3}}
    task, session = setup(tiny_model("llama"), TEXTS, **sections)
    before = list(task.train)
    choose_anchor(task, session)
    assert task.train == before and len(before) > 3
    shown = {e.hash for e in task.train if any(e.question[:200] in prompt for prompt in session.engine.prompts)}
    assert len(shown) == 3


def test_nothing_usable_for_free_text(tiny_model):
    anchor = {"text": "auto", "candidates": 1}
    task, session = setup(tiny_model("llama"), ["no"], example="titles", anchor=anchor)
    best, thrown = write_anchor_candidates(replace(task, validation=[]), session)
    assert best.text and best.origin == "derived" and best.score is not None
    assert thrown.score is None and thrown.reason == "too short"


def test_texts_by_hand_compete(tiny_model):
    sorting = "Sort this mail into JSON."
    task, session = setup(tiny_model("llama"), [sorting, TEXTS[0]], anchor={"text": "auto", "candidates": 2})
    by_hand = [derived_anchor(task.kind, "user").text, sorting]
    found = write_anchor_candidates(task, session, by_hand)
    kept = [c for c in found if c.reason is None]
    assert {(c.text, c.origin) for c in kept} == {*((t, "hand") for t in by_hand), (TEXTS[0], "self")}
    assert [(c.text, c.reason) for c in found if c.reason] == [(by_hand[1], "written before")]


def test_rows_too_long_behind_an_anchor_have_no_loss(tiny_model):
    """A long anchor pushes long rows out; the others keep their places, so that losses can be paired."""
    task, session = setup(tiny_model("llama"))
    rows, config = task.train[:5], task.config
    every = tokenize(rows, task.chat, source="task").tokens
    train = config.train.model_copy(update={"max_length": int(every.max())})
    session.config = config.model_copy(update={"train": train})
    bare = anchor_losses(session, rows, Anchor(""))
    assert bare == pytest.approx(row_losses(session.model, tokenize(rows, task.chat, source="task")), abs=1e-5)
    behind = anchor_losses(session, rows, Anchor("Now answer."))
    added = int(tokenize(rows[:1], task.chat, source="task", anchor=Anchor("Now answer.")).tokens[0] - every[0])
    assert added > 0 and np.isnan(behind).tolist() == (every + added > every.max()).tolist()
    assert not np.isnan(behind).all()


def test_place_that_the_template_refuses(tiny_model):
    """Gemma has no system role: candidates are scored where they can stand, and that is said."""
    display = Silent()
    sections = {"anchor": {"text": "auto", "candidates": 1, "place": "system"}}
    task, session = setup(tiny_model("gemma2"), TEXTS[:1], display=display, **sections)
    anchor, _ = choose_anchor(task, session)
    assert anchor.place == "user" and any("no system role" in note for note in display.notes)


def test_stopped_between_candidates(tiny_model):
    def check() -> None:
        raise Interrupted("stopped")

    task, session = setup(tiny_model("llama"), check=check, anchor={"text": "auto", "candidates": 2})
    with pytest.raises(Interrupted):
        choose_anchor(task, session)


def test_write_anchor_is_what_a_run_takes(tiny_model, tmp_path):
    config = config_of(tiny_model("qwen3"), tmp_path / "run", example="reviews", anchor={"text": "auto"})
    written = tell.write_anchor(config, scores=["loss"])
    folder = tell.tune(config)
    assert written.pop("decided_by") == "loss"
    for candidate in written["candidates"]:
        if "reason" not in candidate:
            loss = candidate.pop("loss")
            assert loss["value"] == candidate["score"] and loss["ci"][0] <= loss["value"] <= loss["ci"][1]
    assert read(folder.anchor) == written
    assert written["candidates"][0]["text"] == written["text"] and len(written["candidates"]) == 3
    assert written["hash"] == Anchor(written["text"], written["place"]).hash
    json.dumps(written)


def test_derived_from_a_schema():
    schema = {
        "properties": {
            "kind": {"enum": ["a", "b", None]},
            "size": {"type": ["integer", "null"]},
            "many": {"enum": [str(i) for i in range(9)], "type": "string"},
            "tags": {"type": "array"},
            "any": {},
        }
    }
    anchor = derived_anchor(Kind("json", schema, False, None, ""), "system")
    assert anchor is not None and anchor.place == "system" and anchor.origin == "derived"
    for part in (
        *('"kind" (one of a, b, null)', '"size" (whole number or null)', '"many" (text)', '"tags" (list)'),
        '"any" (value)',
    ):
        assert part in anchor.text
    assert derived_anchor(Kind("json", {"type": "object"}, False, None, ""), "user").text.endswith("nothing else.")


def test_derived_from_labels_and_text():
    rows = [tell.Example.pair(f"{i}", "yes" if i % 2 else "no") for i in range(8)]
    anchor = derived_anchor(detect_kind(rows), "user")
    assert anchor is not None and anchor.text.endswith("no, yes.")
    assert derived_anchor(Kind("text", None, False, None, ""), "user") is None
