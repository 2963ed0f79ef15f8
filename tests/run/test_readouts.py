"""Runs that decide closed fields: from the data to the report, again after a stop, in `tell eval` and in chat."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tell
from run.runs import Killer, comparable, config_of, open_session, read
from tell.cli.main import run as command
from tell.config import Config
from tell.data.example import Message
from tell.data.kind import as_label
from tell.errors import Interrupted, TellError
from tell.files import read_jsonl
from tell.nested import merge
from tell.parts import PARTS
from tell.readout.readout import Readout
from tell.rows.template import ChatTokenizer
from tell.run.readouts import fit_readout
from tell.run.task import load_task

ARMS = ["base", "icl", "icl-readout", "sft-matched", "sft-readout", "tell-free", "tell"]
DECIDING = ("icl-readout", "sft-readout", "tell")
FREE = {"tell": "tell-free", "sft-readout": "sft-matched", "icl-readout": "icl"}
GREEDY = {"greedy": True, "repetition_penalty": 1.0, "max_new_tokens": 120, "closed": "fused"}


def configured(model: Path, out: Path, example: str, **sections) -> Config:
    given = {"task": {"rows": 12, "test_rows": 6}, "generate": GREEDY, "eval": {"arms": ARMS}}
    return config_of(model, out, example=example, **merge(given, sections))


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "dark green"]},
        "urgent": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["lamp", "bulb", "cord", "fuse"]}},
        "note": {"type": ["string", "null"]},
    },
    "required": ["colour", "urgent", "tags", "note"],
    "additionalProperties": False,
}


def write_orders(path: Path, n: int, *, seed: int, told: bool = True) -> list[dict]:
    """Rows whose answer follows from their question; not ``told``: its form alone does."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        drawn = []
        for _ in range(2):
            tags = [tag for tag in ("lamp", "bulb", "cord", "fuse") if rng.random() < 0.4]
            colour = str(rng.choice(SCHEMA["properties"]["colour"]["enum"]))
            note = None if rng.random() < 0.5 else f"box {i}"
            drawn.append({"colour": colour, "urgent": bool(rng.random() < 0.5), "tags": tags, "note": note})
        asked, answer = drawn[0], drawn[0] if told else drawn[1]
        words = [asked["colour"], "now" if asked["urgent"] else "later", *asked["tags"], asked["note"] or "-", str(i)]
        rows.append({"prompt": " ".join(words), "completion": json.dumps(answer)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def teach(source: Path, folder: Path, rows: list[dict], steps: int) -> Path:
    """A tiny model that has learned the form of some answers."""
    model, chat = AutoModelForCausalLM.from_pretrained(source), ChatTokenizer(source)
    texts = []
    for row in rows:
        turns = [Message("user", row["prompt"]), Message("assistant", row["completion"])]
        prompt = chat.encode(chat.render(turns[:1], add_generation_prompt=True))
        texts.append((prompt, [*chat.encode(row["completion"]), chat.stop_ids[0]]))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = [texts[(step * 8 + i) % len(texts)] for i in range(8)]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids, labels = torch.zeros(8, width, dtype=torch.long), torch.full((8, width), -100)
        for i, (prompt, answer) in enumerate(batch):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor([*prompt, *answer])
            labels[i, len(prompt) : end] = torch.tensor(answer)
        optimiser.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
    shutil.copytree(source, folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def label_run(tiny_model, tmp_path_factory):
    config = configured(tiny_model("qwen3"), tmp_path_factory.mktemp("label") / "run", "reviews")
    return tell.tune(config), config


@pytest.fixture(scope="module")
def json_run(tiny_model, tmp_path_factory):
    """A task whose form the model knows beforehand: a random one would never come to write a field."""
    root = tmp_path_factory.mktemp("json")
    torch.manual_seed(0)
    model = teach(tiny_model("llama"), root / "model", write_orders(root / "form.jsonl", 400, seed=1, told=False), 300)
    write_orders(root / "train.jsonl", 20, seed=2)
    write_orders(root / "test.jsonl", 12, seed=3)
    (root / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    task = {"data": str(root / "train.jsonl"), "test": str(root / "test.jsonl"), "schema": str(root / "schema.json")}
    task |= {"rows": 20, "test_rows": 12}
    config = configured(model, root / "run", "support", task=task, train={"learning_rate": 1e-3})
    return tell.tune(config), config


def answers(folder, arm: str) -> list[str]:
    return [row["answer"] for row in read_jsonl(folder.root / f"predictions/{arm}.jsonl")]


@pytest.mark.parametrize("which", ["label_run", "json_run"])
def test_a_run_from_data_to_report(which, request):
    folder, _ = request.getfixturevalue(which)
    metrics = read(folder.metrics)
    assert set(metrics["arms"]) == set(ARMS) and not metrics["failed"]
    primary = metrics["task"]["primary"]
    assert primary == {"label_run": "accuracy", "json_run": "field_accuracy"}[which]
    pairs = [pair for part in PARTS for pair in part.pairs if set(pair) <= set(ARMS)]
    assert len(pairs) == 5
    for one, other in pairs:
        gap = metrics["differences"][f"{one} - {other}"][primary]
        values = [metrics["arms"][arm][primary]["value"] for arm in (one, other)]
        assert gap["value"] == pytest.approx(values[0] - values[1], abs=2e-6)  # three rounded numbers
    readout = Readout.load(folder.readout)
    assert metrics["readout"] == readout.numbers() and all(0 <= r["accuracy"] <= 1 for r in metrics["readout"])
    page = html.unescape(folder.report.read_text(encoding="utf-8"))
    assert 'id="parts"' in page and "Closed fields and their readout" in page
    for part in PARTS[:2]:
        assert part.about in page
    assert all(field["field"] in page for field in metrics["readout"])


def test_deciding_arms_answer_with_labels(label_run):
    folder, _ = label_run
    labels = set(read(folder.findings)["kind"]["labels"])
    metrics = read(folder.metrics)
    for arm in DECIDING:
        assert {as_label(text) for text in answers(folder, arm)} <= labels
        assert metrics["arms"][arm]["valid_label"]["value"] == 1
        assert {row["finish"] for row in read_jsonl(folder.root / f"predictions/{arm}.jsonl")} == {"stop"}
    assert not {as_label(text) for text in answers(folder, "base")} <= labels  # a random model writes none by itself
    assert [row["field"] for row in metrics["readout"]] == ["label"]


def test_deciding_arms_answer_json_fields_with_their_values(json_run):
    folder, _ = json_run
    fields = {row["field"]: row for row in read(folder.metrics)["readout"]}
    assert set(fields) == {"colour", "urgent", "tags[]", "note"}
    assert {row["rows"] for row in fields.values()} == {20}
    assert {name: row["classes"] for name, row in fields.items()} == {"colour": 3, "urgent": 2, "tags[]": 4, "note": 2}
    properties = SCHEMA["properties"]
    for arm in ("sft-readout", "tell"):  # with examples in its prompt the tiny model writes no JSON
        written = [json.loads(text) for text in answers(folder, arm)]
        for answer in written:
            assert answer["colour"] in properties["colour"]["enum"] and isinstance(answer["urgent"], bool)
            assert set(answer["tags"]) <= set(properties["tags"]["items"]["enum"])
            assert len(set(answer["tags"])) == len(answer["tags"])
            assert answer["note"] is None or isinstance(answer["note"], str)
        assert read(folder.metrics)["arms"][arm]["schema_adherence"]["value"] == 1


@pytest.mark.parametrize("which", ["label_run", "json_run"])
def test_the_same_numbers_again(which, request):
    folder, _ = request.getfixturevalue(which)
    assert tell.evaluate(folder.root) == json.loads(json.dumps(read(folder.metrics)))
    for arm in ARMS:
        assert read_jsonl(folder.root / f"predictions/eval/{arm}.jsonl") == read_jsonl(
            folder.root / f"predictions/{arm}.jsonl"
        )


@pytest.mark.parametrize("off", ["generate.closed=off", 'generate.closed="off"'])
def test_without_deciding_an_arm_is_its_free_twin(off, label_run):
    folder, _ = label_run
    metrics, free = read(folder.metrics), tell.evaluate(folder.root, overrides=[off])
    assert set(free["arms"]) == {"base", "icl", "sft-matched", "tell"} and "readout" not in free
    for arm, twin in (("tell", "tell-free"), ("icl", "icl"), ("sft-matched", "sft-matched")):
        assert free["arms"][arm] == metrics["arms"][twin]
        again = read_jsonl(folder.root / f"predictions/eval/{arm}.jsonl")
        assert again == read_jsonl(folder.root / f"predictions/{twin}.jsonl")
    asked = tell.evaluate(folder.root, arms=list(FREE), overrides=[off])
    assert {arm: asked["arms"][arm] for arm in FREE} == {arm: metrics["arms"][twin] for arm, twin in FREE.items()}


def test_other_ways_to_decide(label_run):
    folder, _ = label_run
    labels = set(read(folder.findings)["kind"]["labels"])
    said = {}
    for how in ("likelihood", "readout", "fused"):
        tell.evaluate(folder.root, arms=["tell", "sft-readout"], overrides=[f"generate.closed={how}"])
        for arm in ("tell", "sft-readout"):
            rows = read_jsonl(folder.root / f"predictions/eval/{arm}.jsonl")
            said[how, arm] = [as_label(row["answer"]) for row in rows]
            assert set(said[how, arm]) <= labels
    if read(folder.metrics)["readout"][0]["used"]:  # the readout is of the untuned model, whatever the adapter
        assert said["readout", "tell"] == said["readout", "sft-readout"]
    weightless = ["generate.closed=fused", "generate.readout_weight=0"]
    tell.evaluate(folder.root, arms=["tell"], overrides=weightless)
    rows = read_jsonl(folder.root / "predictions/eval/tell.jsonl")
    assert [as_label(row["answer"]) for row in rows] == said["likelihood", "tell"]


@pytest.mark.parametrize("which", ["label_run", "json_run"])
def test_chat_answers_as_eval_does(which, request):
    folder, config = request.getfixturevalue(which)
    rows = read_jsonl(folder.root / "predictions/tell.jsonl")
    lines = Path(config.task.test).read_text(encoding="utf-8").splitlines()
    chat = tell.chat(folder.root)
    try:
        for row in rows[:4]:
            source = json.loads(lines[int(row["origin"].rpartition(":")[2]) - 1])
            chat.reset()
            said = "".join(chat.stream(source.get("prompt") or source["text"]))
            assert said == row["answer"]
    finally:
        chat.close()


@pytest.mark.parametrize("title", ["hidden states of the task rows", "hidden states of the prompts", "answer tell"])
def test_a_run_that_was_interrupted_while_measuring(title, label_run, tiny_model, tmp_path):
    folder, _ = label_run
    config = configured(tiny_model("qwen3"), tmp_path / "run", "reviews")
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer(title))
    assert read(tmp_path / "run/status.json")["state"] == "interrupted"
    again = tell.tune(config, resume=True)
    assert comparable(read(again.metrics)) == comparable(read(folder.metrics))
    assert again.readout.read_bytes() == folder.readout.read_bytes()
    for arm in ARMS:
        assert answers(again, arm) == answers(folder, arm)


@pytest.fixture(scope="module")
def text_run(tiny_model, tmp_path_factory):
    config = configured(
        tiny_model("llama"), tmp_path_factory.mktemp("text") / "run", "titles", generate={"max_new_tokens": 12}
    )
    return tell.tune(config)


def test_a_task_of_free_text_decides_nothing(text_run):
    folder = text_run
    metrics, findings = read(folder.metrics), read(folder.findings)
    assert findings["kind"]["name"] == "text" and set(metrics["arms"]) == {"base", "icl", "sft-matched", "tell"}
    assert "readout" not in metrics and not folder.readout.exists()
    notice = "left out, since no field is closed: "
    (said,) = [text for text in findings["notices"] if text.startswith(notice)]
    assert set(said.removeprefix(notice).split(", ")) == {"icl-readout", "sft-readout", "tell-free"}
    assert "Closed fields and their readout" not in folder.report.read_text(encoding="utf-8")
    assert tell.evaluate(folder.root) == json.loads(json.dumps(metrics))


def test_a_run_without_a_readout_cannot_decide(text_run, capsys):
    folder = text_run
    for how in ("fused", "readout", "likelihood"):
        with pytest.raises(TellError, match=f"generate.closed={how} needs a readout, and this run has none"):
            tell.evaluate(folder.root, overrides=[f"generate.closed={how}"])
    assert command(["eval", str(folder.root), "--set", "generate.closed=fused"]) == 2
    assert "needs a readout" in capsys.readouterr().err
    assert tell.evaluate(folder.root, arms=["tell"], overrides=["generate.closed=off"])["arms"]["tell"]


def test_closed_off_leaves_the_arms_out(tiny_model, tmp_path):
    config = configured(
        tiny_model("llama"),
        tmp_path / "run",
        "reviews",
        generate={"closed": "off"},
        eval={"arms": ["tell", "tell-free"]},
    )
    folder = tell.tune(config)
    assert list(read(folder.metrics)["arms"]) == ["tell"] and not folder.readout.exists()
    assert any(text == "left out, since generate.closed is off: tell-free" for text in read(folder.findings)["notices"])


def test_a_damaged_or_foreign_readout_is_named(label_run, json_run, tmp_path):
    folder, _ = label_run
    copy = Path(shutil.copytree(folder.root, tmp_path / "copy"))
    place = copy / "readout.safetensors"
    place.write_bytes(b"no tensors")
    with pytest.raises(TellError, match=r"readout\.safetensors"):
        tell.evaluate(copy, arms=["tell"])
    with pytest.raises(TellError, match=r"readout\.safetensors"):
        tell.chat(copy)
    other = Readout.load(folder.readout)
    width = other.mean.shape[1] // 2  # as of a model of half the width
    (field,) = other.fields
    cut = replace(field, pooling="mean", weights=field.weights[: width + 1])
    Readout(other.layers, other.mean[:, :width], other.scale[:, :width], (cut,)).save(place)
    with pytest.raises(TellError, match="is of another model"):
        tell.evaluate(copy, arms=["tell"])
    assert tell.evaluate(copy, arms=["tell"], overrides=["generate.closed=off"])["arms"]["tell"]


def test_an_enumeration_of_too_many_values_is_written_freely(tiny_model, tmp_path):
    schema = json.loads(json.dumps(SCHEMA))
    schema["properties"]["colour"] = {"enum": ["red", "green", "dark green", *(f"colour {i}" for i in range(1000))]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    write_orders(tmp_path / "rows.jsonl", 20, seed=3)
    task = {"data": str(tmp_path / "rows.jsonl"), "schema": str(tmp_path / "schema.json"), "test": None}
    config = configured(tiny_model("llama"), tmp_path / "run", "support", task=task)
    loaded = load_task(config)
    assert "colour" not in [field.name for field in loaded.closed] and "urgent" in [f.name for f in loaded.closed]
    assert any("colour (1,003 values)" in text for text in loaded.notices.texts)


def test_a_field_that_only_overlong_rows_have_is_left_to_the_model(tiny_model, tmp_path):
    rows = [{"prompt": f"{i} is {'red' if i % 2 else 'blue'}", "completion": {"a": bool(i % 2)}} for i in range(20)]
    rows += [{"prompt": "long " * 400 + str(i), "completion": {"a": True, "b": i == 1}} for i in range(2)]
    text = "".join(json.dumps(row | {"completion": json.dumps(row["completion"])}) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    task = {"data": str(tmp_path / "rows.jsonl"), "test": None, "schema": None, "rows": None, "test_fraction": 0.05}
    train = {"max_length": 200}
    model = tiny_model("llama")
    config = configured(model, tmp_path / "run", "support", task=task, train=train)
    loaded = load_task(config)
    loaded = replace(loaded, train=[*loaded.train, *loaded.test, *loaded.validation])
    assert {field.name for field in loaded.closed} == {"a", "b"}
    readout = fit_readout(loaded, open_session(model, loaded.config))
    assert [field.field.name for field in readout.fields] == ["a"]


def test_a_json_answer_is_led_past_its_opening(json_run):
    folder, _ = json_run
    for arm in DECIDING:
        assert all(text.startswith('{"colour":') for text in answers(folder, arm))


def test_vllm_by_name_is_refused(label_run, tiny_model, tmp_path):
    folder, _ = label_run
    with pytest.raises(TellError, match="vLLM cannot decide closed fields"):
        tell.evaluate(folder.root, overrides=["generate.engine=vllm"])
    config = configured(tiny_model("llama"), tmp_path / "run", "reviews", generate={"engine": "vllm"})
    with pytest.raises(TellError, match="vLLM cannot decide closed fields"):
        tell.tune(config)
    assert not (tmp_path / "run").exists() or not (tmp_path / "run/metrics.json").exists()
