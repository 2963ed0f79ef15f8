"""Runs with constrained answers: from the checks before training to `tell eval`, chat and the report."""

from __future__ import annotations

import json

import jsonschema
import pytest

import tell
from run.runs import EXAMPLES, config_of, open_session, read
from tell.cli.main import run as command
from tell.data.constraint import Constraint
from tell.errors import TellError
from tell.files import read_jsonl
from tell.progress import Silent
from tell.run.constrained import session_grammar
from tell.run.session import check_engine

ARMS = ["base", "base+schema", "icl+schema", "tell", "tell+schema"]
# Lists and strings that end: what a random model would go on with for ever.
SHORT = {
    "type": "object",
    "properties": {
        "urgency": {"enum": ["low", "normal", "high"]},
        "category": {"enum": ["billing", "delivery", "technical", "account", "other"]},
        "order_id": {"type": ["integer", "null"], "minimum": 0, "maximum": 99999},
    },
    "required": ["urgency", "category", "order_id"],
    "additionalProperties": False,
}


def data(folder, *, order=("category", "urgency", "order_id"), n: int = 30):
    """A file of the support task with short answers, and its schema, whose keys have another order."""
    lines = []
    for line in (EXAMPLES / "support/train.jsonl").read_text(encoding="utf-8").splitlines()[:n]:
        row = json.loads(line)
        full = json.loads(row["completion"])
        lines.append(json.dumps(row | {"completion": json.dumps({key: full[key] for key in order})}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "schema.json").write_text(json.dumps(SHORT), encoding="utf-8")
    return {"data": str(path), "test": None, "schema": str(folder / "schema.json")}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("constrained")
    generate = {"max_new_tokens": 60, "repetition_penalty": 1.2, "greedy": False}
    config = config_of(tiny_model("llama"), folder / "run", task=data(folder), eval={"arms": ARMS}, generate=generate)
    return tell.tune(config), config


def test_arms_are_free_or_constrained(run):
    folder, _ = run
    for arm in ARMS:
        rows = read_jsonl(folder.prediction(arm))
        if arm.endswith("+schema"):
            for row in rows:
                value = json.loads(row["answer"])
                jsonschema.validate(value, SHORT)
                assert row["finish"] == "stop" and list(value) == ["category", "urgency", "order_id"]
    scores = {arm: of["schema_adherence"]["value"] for arm, of in read(folder.metrics)["arms"].items()}
    assert [arm for arm in ARMS if scores[arm] == 1] == ["base+schema", "icl+schema", "tell+schema"]
    gaps = read(folder.metrics)["differences"]
    assert {"base+schema - base", "tell+schema - tell"} <= set(gaps)


def test_what_is_said_and_kept(run):
    folder, _ = run
    notices = read(folder.findings)["notices"]
    assert "constrained answers have the keys in the references' order: category, urgency, order_id" in notices
    assert "constrained answers are decoded without the repetition penalty of 1.2" in notices
    kept = Constraint.model_validate(read(folder.constraint))
    assert list(kept.json_schema["properties"]) == ["category", "urgency", "order_id"]
    assert kept.white_space == "spaced" and folder.constraint in folder.made
    assert "Constraint" in folder.report.read_text(encoding="utf-8")  # what each part brought


def test_evaluated_again(run):
    folder, _ = run
    assert tell.evaluate(folder.root) == json.loads(json.dumps(read(folder.metrics)))
    found = tell.evaluate(folder.root, overrides=["generate.constrain=schema"])
    assert list(found["arms"]) == ["base", "icl+schema", "tell"]  # the others would be the same
    assert all(arm["schema_adherence"]["value"] == 1 for arm in found["arms"].values())
    display = Silent()
    short = tell.evaluate(folder.root, arms=["base+schema"], overrides=["generate.max_new_tokens=5"], display=display)
    assert short["arms"]["base+schema"]["schema_adherence"]["value"] == 0
    n = short["arms"]["base+schema"]["schema_adherence"]["n"]
    assert f"base+schema: {n} of {n} constrained answers are cut off at 5 tokens" in " ".join(display.notes)
    assert {row["finish"] for row in read_jsonl(folder.evaluated("base+schema"))} == {"length"}
    with pytest.raises(TellError, match=r"labels does not fit a task of kind json. Use generate.constrain=schema"):
        tell.evaluate(folder.root, overrides=["generate.constrain=labels"])


def test_a_run_without_constrained_arms_is_as_before(finished):
    """Nothing is kept of a constraint; it can still be evaluated with one, in either white space."""
    folder, config = finished
    assert config.generate.constrain == "off" and not folder.constraint.exists()
    found = tell.evaluate(folder.root, arms=["base+schema"], rows=2, overrides=["generate.max_new_tokens=3"])
    rows = read_jsonl(folder.evaluated("base+schema"))
    assert found["arms"]["base+schema"] and all(row["answer"].startswith("{") for row in rows)
    folder.evaluated("base+schema").unlink()


def test_chat(run, capsys):
    folder, _ = run
    for options in ({"arm": "tell+schema"}, {"arm": "base", "constrain": "schema"}):
        session = tell.chat(folder.root, seed=3, **options)
        jsonschema.validate(json.loads("".join(session.stream("My tent has a hole."))), SHORT)
        assert not session.cut
        session.close()
    free = tell.chat(folder.root, arm="tell", seed=3)
    with pytest.raises(ValueError, match=r"JSON|Expecting|Extra"):
        json.loads("".join(free.stream("My tent has a hole.")))
    free.close()
    with pytest.raises(TellError, match="labels does not fit a task of kind json"):
        tell.chat(folder.root, constrain="labels")
    assert command(["chat", str(folder.root), "hello", "--constrain", "schem"]) == 2
    assert "did you mean schema?" in capsys.readouterr().err
    assert command(["chat", str(folder.root), "hello", "--constrain", "schema", "--seed", "1"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), SHORT)


def test_a_schema_of_a_request(tiny_model):
    """As a server gets one: no references, any order of keys is the schema's, either white space."""
    from tell.decode.sampler import Decoding

    session = open_session(tiny_model("llama"))
    chat, asked = session.chat, {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}
    made = session_grammar(session, Constraint.of_schema(asked | {"additionalProperties": False}))
    answers = session.answer([[11, 12], [13]], Decoding(40, chat.stop_ids), "answer", None, [made.mask(), made.mask()])
    for answer in answers:
        jsonschema.validate(json.loads(chat.answer(answer.ids)), asked)
    assert session_grammar(session, None) is None
    assert made.grammars is session_grammar(session, Constraint.of_schema({})).grammars  # the vocabulary is read once


def test_labels(tiny_model, tmp_path):
    arms = ["base", "base+schema", "tell"]
    config = config_of(
        tiny_model("llama"),
        tmp_path / "run",
        example="reviews",
        eval={"arms": arms},
        generate={"constrain": "labels", "max_new_tokens": 20, "closed": "off"},
    )
    folder = tell.tune(config)
    assert list(read(folder.metrics)["arms"]) == ["base", "tell"]
    assert "left out, since generate.constrain holds for all arms: base+schema" in read(folder.findings)["notices"]
    assert all(arm["valid_label"]["value"] == 1 for arm in read(folder.metrics)["arms"].values())
    assert read(folder.constraint)["labels"] == ["mixed", "negative", "positive"]
    (folder.constraint).write_text('{"labels": []}', encoding="utf-8")
    with pytest.raises(TellError, match=r"constraint.json: is damaged"):
        tell.evaluate(folder.root, arms=["base"])


def plan(tiny_model, **sections):
    display = Silent()
    sections = {"eval": {"arms": ["base+schema", "tell"]}} | sections
    return tell.plan(config_of(tiny_model("llama"), **sections), display=display), display.notes


def test_references_that_the_grammar_refuses_are_named_before_training(tiny_model, tmp_path):
    task = data(tmp_path, n=30)
    lines = (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()
    odd = {"category": "delivery", "urgency": "odd", "order_id": 1}
    lines[4] = json.dumps({"prompt": "Hi there, where is it?", "completion": json.dumps(odd)})
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task |= {"rows": None, "test_fraction": 0.1, "validation_fraction": 0}
    found, notes = plan(tiny_model, task=task)
    said = [text for text in notes if "cannot be constrained answers" in text]
    assert len(said) == 1 and said == [text for text in found["notices"] if text in said]
    assert "data.jsonl:5: after " in said[0] and 'it goes on with odd"' in said[0]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (SHORT | {"not": {"required": ["x"]}}, r"a grammar cannot follow not at \$"),
        (SHORT | {"properties": {"category": {"type": "integer"}}}, r"it \(Unsatisfiable schema: required property"),
        ({"properties": {"category": {"type": "integer"}}}, "training references cannot be constrained answers"),
        (SHORT | {"$ref": "https://example.org/s.json"}, "nothing is fetched"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_before_training(schema, message, tiny_model, tmp_path, capsys):
    task = data(tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    with pytest.raises(TellError, match=message):
        plan(tiny_model, task=task)
    config = config_of(tiny_model("llama"), tmp_path / "run", task=task, eval={"arms": ["base+schema", "tell"]})
    with pytest.raises(TellError, match=message):
        tell.tune(config)
    assert not (tmp_path / "run").exists()


def test_rows_that_disagree_on_the_order_of_keys(tiny_model, tmp_path):
    task = data(tmp_path, n=20)
    text = (tmp_path / "data.jsonl").read_text(encoding="utf-8")
    data(tmp_path, order=("urgency", "category", "order_id"), n=30)
    more = (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()[20:]
    (tmp_path / "data.jsonl").write_text(text + "\n".join(more), encoding="utf-8")
    with pytest.raises(TellError, match=r"data.jsonl:\d+: has \w+ before \w+, and data.jsonl:\d+ has it after"):
        plan(tiny_model, task={**task, "rows": None})
    found, _ = plan(tiny_model, task={**task, "rows": None}, eval={"arms": ["base", "tell"]})
    assert found  # nothing is constrained


def test_free_text_has_nothing_to_constrain(tiny_model, tmp_path):
    config = {"example": "titles", "eval": {"arms": ["base", "base+schema", "tell"]}}
    assert plan(tiny_model, **config)[0]["arms"]
    folder = tell.tune(config_of(tiny_model("llama"), tmp_path / "run", **config))
    said = "left out, since answers of kind text have no schema or labels: base+schema"
    assert said in read(folder.findings)["notices"] and list(read(folder.metrics)["arms"]) == ["base", "tell"]
    with pytest.raises(TellError, match=r"schema does not fit a task of kind text. Use generate.constrain=off"):
        plan(tiny_model, **config, generate={"constrain": "schema"})
    with pytest.raises(TellError, match=r"generate.constrain"):
        config_of(tiny_model("llama"), generate={"constrain": "json"})


def test_vllm_is_refused_in_one_line(tiny_model):
    config = config_of(tiny_model("llama"), generate={"engine": "vllm"})
    check_engine(config, decides=False, constrains=False)
    with pytest.raises(TellError, match=r"vLLM cannot constrain answers. Use generate.engine=own"):
        check_engine(config, decides=False, constrains=True)
