"""Fixed examples in every test prompt (``task.shots``)."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest

import tell
from run.runs import ANCHORS, EXAMPLES, config_of, read
from tell.anchor.anchor import NO_ANCHOR, Anchor
from tell.data.example import Example, Message
from tell.errors import TellError
from tell.names import ARMS
from tell.rows.template import ChatTokenizer
from tell.run.answers import Prompting, check_prompts
from tell.run.task import limit_task, load_task

ANCHOR = Anchor("Sort this mail.")
TRAIN = [Example.pair(f"training mail {i}", f"answer {i}") for i in range(6)]
TEST = [Example.pair("Where is my parcel?", "x"), Example.pair("Refund, please! " * 3, "y")]
SHOTS = TRAIN[3:1:-1]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_arm_but_icl_shows_the_same_examples(family, tiny_model):
    chat = ChatTokenizer(tiny_model(family))
    shared = {"examples": 3, "room": 10_000, "seed": 5}
    prompting = Prompting(chat, ANCHOR, SHOTS, **shared)
    by_arm = {arm: prompting.prompts(arm, TEST, TRAIN)[0] for arm in ARMS}
    for arm, prompts in by_arm.items():
        if ARMS[arm].in_context:
            assert prompts == Prompting(chat, ANCHOR, (), **shared).prompts(arm, TEST, TRAIN)[0]
            continue
        bare = not ARMS[arm].anchored
        assert prompts == by_arm["base" if bare else "tell"]
        for ids, example in zip(prompts, TEST, strict=True):
            turns = (*SHOTS[0].messages, *SHOTS[1].messages, *example.prompt)
            anchor = NO_ANCHOR if bare else ANCHOR
            assert ids == chat.encode(chat.render(anchor.apply(turns), add_generation_prompt=True))
            text = chat.backend.decode(ids, skip_special_tokens=False)
            assert text.count(ANCHOR.text) == (not bare)
            places = [text.index(part) for part in ("training mail 3", "answer 3", "training mail 2", "answer 2")]
            assert places == sorted(places) and places[-1] < text.index(example.question.strip())


def test_one_system_message_stays(tiny_model):
    chat = ChatTokenizer(tiny_model("qwen3"))
    turns = (Message("system", "Be brief."), Message("user", "Where is it?"), Message("assistant", "x"))
    test = [Example.of(turns, source="task", origin="")]
    shot = Example.of((turns[0], Message("user", "mail"), turns[2]), source="task", origin="")
    ids, _ = Prompting(chat, ANCHOR, [shot], examples=8, room=0, seed=1).prompts("tell", test, [])
    assert chat.decode(ids[0]).count("Be brief.") == 1


def test_prompts_that_grow_too_long_are_refused(tiny_model):
    chat = ChatTokenizer(tiny_model("llama"))
    prompting = Prompting(chat, ANCHOR, (), examples=0, room=0, seed=1)
    alone = max(len(ids) for ids in prompting.prompts("tell", TEST, [])[0])
    check_prompts(chat, ANCHOR, TEST, alone + 1)
    with pytest.raises(TellError, match=r"lower task\.shots"):
        check_prompts(chat, ANCHOR, TEST, alone + 1, SHOTS)


@pytest.mark.parametrize("budget", [{"rows": 2}, {"rows": 6}, {"rows": None}, {"rows": None, "tokens": 1500}])
def test_examples_are_trained_on_and_the_same_for_all_budgets(budget, tiny_model):
    model = tiny_model("llama")
    task = load_task(config_of(model, task={"shots": 2, **budget}))
    task = limit_task(task, ANCHOR)
    assert len(task.train) >= 2
    assert {e.hash for e in task.shots} <= {e.hash for e in task.train}
    whole = load_task(config_of(model, task={"shots": 2, "rows": None}))
    assert [e.hash for e in task.shots] == [e.hash for e in whole.shots]
    other = load_task(config_of(model, task={"shots": 2, "rows": None}, seed=8))
    assert [e.hash for e in other.shots] != [e.hash for e in whole.shots]


@pytest.mark.parametrize("shots", [3, 10_000])
def test_more_examples_than_rows_are_refused(shots, tiny_model):
    task = load_task(config_of(tiny_model("llama"), task={"shots": shots, "rows": 2}))
    with pytest.raises(TellError, match=rf"task\.shots: {shots} examples are requested, and 2 of 2 training rows"):
        limit_task(task, ANCHOR)


def test_rows_too_long_to_train_on_are_not_shown(tiny_model):
    model = tiny_model("llama")
    task = load_task(config_of(model, task={"shots": 60, "rows": None}))
    lengths = [len(task.chat.encode(task.chat.render(e.messages))) for e in task.shots]
    limit = sorted(lengths)[3]
    few = load_task(config_of(model, task={"shots": 2, "rows": None}, train={"max_length": limit}))
    fitting = [e.hash for e, length in zip(task.shots, lengths, strict=True) if length <= limit]
    assert [e.hash for e in few.shots] == fitting[:2] and len(fitting) >= 4
    limit_task(few, ANCHOR)
    alone = load_task(config_of(model, task={"shots": len(fitting) + 1, "rows": None}, train={"max_length": limit}))
    with pytest.raises(TellError, match=rf"and {len(fitting)} of {len(task.train)} training rows can be shown"):
        limit_task(alone, ANCHOR)


def test_a_run_with_examples(tiny_model, tmp_path):
    options = {"eval": {"arms": ["base", "base+anchor"], "forgetting_rows": 0}, "general": {"source": "none"}}
    folder = tell.tune(config_of(tiny_model("llama"), tmp_path / "run", task={"shots": 2}, **options))
    parts = read(folder.split)
    assert len(parts["shots"]) == 2 and set(parts["shots"]) <= set(parts["train"])
    costs = read(folder.metrics)["eval"]["arms"]
    plain = tell.tune(config_of(tiny_model("llama"), tmp_path / "plain", **options))
    assert "shots" not in read(plain.split)
    bare = read(plain.metrics)["eval"]["arms"]
    chat = ChatTokenizer(tiny_model("llama"))
    task = load_task(config_of(tiny_model("llama"), task={"shots": 2}))
    for arm, anchor in (("base", NO_ANCHOR), ("base+anchor", Anchor(ANCHORS["support"]))):
        prompts, _ = Prompting(chat, anchor, task.shots, examples=0, room=0, seed=7).prompts(arm, task.test, [])
        assert costs[arm]["prompt_tokens"] == sum(map(len, prompts)) > bare[arm]["prompt_tokens"]
    again = tell.evaluate(folder.root, arms=["base", "base+anchor"])
    assert again["eval"]["arms"] == costs and again["arms"] == read(folder.metrics)["arms"]
    rows = (EXAMPLES / "support/test.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    (tmp_path / "other.jsonl").write_text("\n".join(rows), encoding="utf-8")
    other = tell.evaluate(folder.root, arms=["base"], test=str(tmp_path / "other.jsonl"))["eval"]["arms"]["base"]
    assert other["prompt_tokens"] / 3 > costs["base"]["prompt_tokens"] / len(task.test) * 0.8


def test_chat_begins_with_the_examples(tiny_model, tmp_path, monkeypatch):
    data = shutil.copy(EXAMPLES / "support/train.jsonl", tmp_path / "train.jsonl")
    options = {"eval": {"arms": ["base", "tell"], "forgetting_rows": 0}, "general": {"source": "none"}}
    task = {"data": str(data), "shots": 2}
    folder = tell.tune(config_of(tiny_model("llama"), tmp_path / "run", task=task, **options))
    shots = load_task(config_of(tiny_model("llama"), task=task)).shots
    session = tell.chat(folder.root)
    seen = []
    engine = session.session.engine
    real = engine.generate
    monkeypatch.setattr(engine, "generate", lambda p, *a, **k: seen.append(p[0]) or real(p, *a, **k))
    with closing(session):
        list(session.stream("Where is it?"))
        assert "2 fixed examples" in session.describe() and "left out" not in session.describe()
    text = session.opened.chat.backend.decode(seen[0], skip_special_tokens=False)
    places = [text.index(part.strip()) for e in shots for part in (e.question, e.answer)] + [text.index("Where is it?")]
    assert places == sorted(places) and text.count(session.anchor.text) == 1
    Path(data).write_text(Path(data).read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with closing(tell.chat(folder.root)) as session:
        assert "left out" in session.describe() and session.shots == []
    with pytest.raises(TellError, match=r"of the run's 2 fixed example rows are no longer in the file"):
        tell.evaluate(folder.root, arms=["base"])


def test_a_resumed_run_shows_the_same_examples_or_stops(tiny_model, tmp_path):
    options = {"eval": {"arms": ["base"], "forgetting_rows": 0}, "general": {"source": "none"}}
    config = config_of(tiny_model("llama"), tmp_path / "run", task={"shots": 2}, **options)
    folder = tell.tune(config)
    rows = folder.prediction("base").read_text()
    shutil.copytree(folder.root, tmp_path / "kept")
    tell.tune(config, resume=True)
    assert folder.prediction("base").read_text() == rows
    parts = read(folder.split)
    folder.split.write_text(json.dumps({**parts, "shots": parts["shots"][::-1]}))
    folder.set_status("interrupted")
    with pytest.raises(TellError, match="the data has changed"):
        tell.tune(config, resume=True)
