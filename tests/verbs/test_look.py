"""`tell look`: rows as a run trains them, findings about them, and nothing written but the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tell
from run.runs import EXAMPLES, config_of
from tell.cli.main import run as tell_command
from tell.config import load_config
from tell.data.kind import detect_kind
from tell.data.sources import load
from tell.errors import TellError
from tell.report.look_page import render_look
from tell.rows.render import render_row
from tell.run.task import load_task, placed_anchor, task_table
from tell.score.intervals import newcombe_paired
from tell.score.label_table import baseline_numbers, label_scorer
from tiny import FAMILIES

SUPPORT = EXAMPLES / "support"


def look_at(folder: Path, rows: list[tuple[str, str | None]], model: object = "someone/not-here", **more) -> dict:
    """The facts of rows of (prompt, answer), by default without a model."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": a}) for p, a in rows), encoding="utf-8")
    task = {"data": str(path), **more.pop("task", {})}
    config = load_config(flags={"task": task, "model": {"name": str(model)}, "anchor": {"text": "none"}} | more)
    return tell.look(config)


def levels(found: dict, level: str) -> list[str]:
    return [check["text"] for check in found["checks"] if check["level"] == level]


QUESTIONS = [(f"Question number {i}: what is the {i}th word of the book {i * i}?", "ab"[i % 4 == 0]) for i in range(40)]


@pytest.mark.parametrize("place", ["user", "system"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_the_row_that_is_trained(family, place, tiny_model):
    config = config_of(tiny_model(family), anchor={"place": place})
    task = load_task(config)
    anchor = placed_anchor(task)
    table = task_table(task, anchor)
    found = tell.look(config, rows=7)
    known = {example.origin: example for example in task.train}
    assert len(found["rows"]) == 6, "the budget's rows are all there are"
    for row in found["rows"]:
        rendered = render_row(task.chat, anchor.apply(known[row["origin"]].messages))
        assert "".join(piece["text"] for piece in row["pieces"]) == rendered.text
        trained = "".join(piece["text"] for piece in row["pieces"] if piece["trained"])
        assert trained == "".join(rendered.text[a:b] for a, b in rendered.spans)
        assert [piece["text"] for piece in row["pieces"] if piece["anchor"]] == [anchor.text]
        at = int(np.flatnonzero(table.origins == row["origin"])[0])
        assert (row["tokens"], row["trained_tokens"]) == (table.tokens[at], table.trained[at])


def test_a_model_without_a_template_is_rendered_by_the_default_one(tiny_model):
    found = tell.look(config_of(tiny_model("llama", template=False)))
    assert "### Response:" in "".join(piece["text"] for piece in found["rows"][0]["pieces"])
    assert any("has no chat template" in text for text in found["notices"])


def test_the_longest_and_the_shortest_row_are_shown_and_others_by_seed(tiny_model):
    def shown(seed: int) -> dict[str, int]:
        config = config_of(tiny_model("llama"), seed=seed, task={"rows": None})
        found = tell.look(config, rows=4)
        lengths = task_table(load_task(config), placed_anchor(load_task(config))).tokens
        rows = {row["origin"]: row["tokens"] for row in found["rows"]}
        assert [row["why"] for row in found["rows"]] == ["longest", "shortest", *["drawn by the seed"] * 2]
        assert (max(rows.values()), min(rows.values())) == (lengths.max(), lengths.min())
        return rows

    assert shown(1) == shown(1) != shown(2)


def test_the_split_is_the_one_of_a_run(tiny_model):
    config = config_of(tiny_model("llama"), task={"test": None, "rows": None, "test_rows": None})
    planned, found = tell.plan(config), tell.look(config)
    assert found["split"] == planned["split"]
    assert found["data"].items() >= planned["data"].items() and found["kind"]["name"] == planned["task"]["kind"]


def test_given_validation_rows_are_seen_with_and_without_the_model(tiny_model, tmp_path):
    held = tmp_path / "held.jsonl"
    rows = [*((f"Another question, number {i}", "ab"[i % 2]) for i in range(9)), QUESTIONS[0]]
    rows += [("Another question, number 0", "b"), ("no answer", "")]
    held.write_text("\n".join(json.dumps({"prompt": p, "completion": a}) for p, a in rows), encoding="utf-8")
    task = {"validation": str(held)}
    for model in ("someone/not-here", tiny_model("llama")):
        found = look_at(tmp_path, QUESTIONS, model, task=task)
        assert [text.split(": ")[0] for text in levels(found, "refused")] == [f"{held}:12"]
        split = [found["split"][part] for part in ("train", "validation", "test")]
        assert sum(split) == 50 and split[1] in (10, 11)  # a copy of a test row is left out, one of a training row not
        assert "rows left out because they are in two parts: 1" in found["notices"]
        assert found["findings"]["repeated"] == 1
        (one,) = found["findings"]["contradictions"]["rows"]
        assert [answer["rows"] for answer in one["answers"]] == [["held.jsonl:1"], ["held.jsonl:11"]]
        assert [row["origin"] for row in found["findings"]["left_out"]["rows"]] == ["held.jsonl:12"]
        assert sum(value["validation"] for value in found["fields"][0]["values"]) == found["split"]["validation"]


def test_the_anchor_is_marked_where_it_stands_and_not_where_text_repeats_it(tiny_model, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Sort this mail. You are kind."},
                {"role": "user", "content": f"Mail {i}"},
                {"role": "assistant", "content": "ab"[i % 2]},
            ]
        }
        for i in range(20)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = {"task": {"data": str(path)}, "anchor": {"text": "Sort this mail."}}
    found = tell.look(load_config(flags=flags | {"model": {"name": str(tiny_model("qwen2"))}}))
    before = "".join(p["text"] for p in found["rows"][0]["pieces"][:1])
    assert before.endswith("user\n") and "You are kind" in before
    assert found["rows"][0]["pieces"][1] == {"text": "Sort this mail.", "trained": False, "anchor": True}


def test_a_character_of_several_tokens_is_not_cut(tiny_model, tmp_path):
    answers = ["猫🙂", "犬é"]
    found = look_at(tmp_path, [(f"Frage {i} 🙂", answers[i % 2]) for i in range(20)], tiny_model("llama"))
    for row in found["rows"]:
        trained = "".join(piece["text"] for piece in row["pieces"] if piece["trained"])
        assert trained.removesuffix("<|im_end|>") in answers


def test_without_a_model_all_but_the_rendering_is_found(tmp_path):
    found = look_at(tmp_path, QUESTIONS)
    assert found["model"]["name"] is None and found["lengths"] is None
    assert all(row["pieces"] is None and row["turns"][-1]["text"] in ("a", "b") for row in found["rows"])
    (warning,) = levels(found, "warning")
    assert (
        "someone/not-here: is not on this machine" in warning and "tell plan DATA --model someone/not-here" in warning
    )
    assert found["split"]["test"] == 12 and found["kind"]["name"] == "label"
    assert {row["why"] for row in found["rows"]} == {"longest", "shortest", "drawn by the seed"}


def test_balance_and_constant_baseline(tmp_path):
    found = look_at(tmp_path, QUESTIONS)
    (field,) = found["fields"]
    total = {value["value"]: sum(value[part] for part in ("train", "validation", "test")) for value in field["values"]}
    assert total == {"a": 30, "b": 10} and [value["value"] for value in field["values"]] == ["a", "b"]
    right = field["values"][0]["test"]
    assert field["constant"]["value"] == "a"
    assert (field["constant"]["right"], field["constant"]["share"]) == (right, right / 12)
    assert f"answering a to everything gives {100 * right / 12:.0f} %" in levels(found, "note")


def test_the_constant_baseline_is_the_best_of_all_constant_answers(tmp_path):
    test = tmp_path / "test.jsonl"
    rows = [json.dumps({"prompt": f"test {i}", "completion": "ab"[i > 2]}) for i in range(10)]
    test.write_text("\n".join(rows), encoding="utf-8")
    found = look_at(tmp_path, QUESTIONS, task={"test": str(test)})
    assert "answering b to everything gives 70 %" in levels(found, "note")  # a is commoner in training


def baseline(folder: Path, answers: list[str], test: list[str]) -> tuple[dict, dict, dict]:
    """The facts of a task with a test file, its field, and the baseline of a run's report on the same rows."""
    path, rows = folder / "test.jsonl", enumerate(test)
    path.write_text("\n".join(json.dumps({"prompt": f"test {i}", "completion": a}) for i, a in rows), encoding="utf-8")
    found = look_at(folder, [(f"row {i} of many", a) for i, a in enumerate(answers)], task={"test": str(path)})
    (field,) = found["fields"]
    kind = detect_kind(load(str(folder / "rows.jsonl")).examples)
    scorer = label_scorer(kind)
    assert scorer is not None
    return found, field["constant"], baseline_numbers(kind, scorer, {}, test, seed=found["seed"], samples=2000)


@pytest.mark.parametrize(("unseen", "best"), [(8, "a"), (12, "zzz")])
def test_the_constant_baseline_is_over_all_test_rows(unseen, best, tmp_path):
    test = ["zzz"] * unseen + ["b"] * 2 + ["a"] * (18 - unseen)
    found, constant, reported = baseline(tmp_path, ["a", "b"] * 10, test)
    right = max(unseen, 18 - unseen)
    assert (constant["value"], constant["right"], constant["n"]) == (best, right, 20)
    assert (constant["value"], constant["share"]) == (reported["answer"], reported["scores"]["accuracy"]["value"])
    assert constant["ci"] == pytest.approx(reported["scores"]["accuracy"]["ci"], abs=1e-6)
    assert f"answering {best} to everything gives {5 * right} %" in levels(found, "note")


@pytest.mark.parametrize("separator", ["; ", None])
def test_the_constant_baseline_of_lists_is_the_one_of_the_report(separator, tmp_path):
    def written(labels: str) -> str:
        return separator.join(labels) if separator else json.dumps(list(labels))

    answers = [written(("ab", "a", "bc", "ac", "b")[i % 5]) for i in range(40)]
    test = [written(("a", "ab", "ac", "bz")[i % 4]) for i in range(20)]
    found, constant, reported = baseline(tmp_path, answers, test)
    assert found["kind"]["name"] == "labels" and found["fields"][0]["rows"]["test"] == 20
    score = reported["scores"]["sample_f1"]
    assert constant == {
        **{"value": reported["answer"], "metric": "sample_f1", "right": None},
        **{"n": 20, "share": score["value"], "ci": score["ci"]},
    }
    percent = f"{100 * score['value']:.0f} %"
    assert f"answering {constant['value']} to everything gives a sample F1 of {percent}" in levels(found, "note")
    assert found["intervals"][1]["words"].startswith(f"with 20 test rows the constant baseline, {percent}, has an ")
    page = render_look(found, name="rows.jsonl")
    assert "to everything gives a sample F1 of" in page


def test_rows_without_the_field_count_against_a_constant_answer(tmp_path):
    test = tmp_path / "test.jsonl"
    answers = [{"kind": "a"}] * 6 + [{"kind": "zzz"}] * 3 + [{}] * 3
    rows = [json.dumps({"prompt": f"test {i}", "completion": json.dumps(a)}) for i, a in enumerate(answers)]
    test.write_text("\n".join(rows), encoding="utf-8")
    known = [(f"row {i} of many", json.dumps({"kind": "ab"[i % 2]})) for i in range(40)]
    (field,) = look_at(tmp_path, known, task={"test": str(test)})["fields"]
    assert (field["constant"]["value"], field["constant"]["right"], field["constant"]["n"]) == ('"a"', 6, 12)


def test_every_closed_field_of_a_json_task_has_its_balance(tiny_model):
    config = config_of(tiny_model("llama"), task={"rows": None, "test_rows": None, "schema": None})
    fields = {field["field"]: field for field in tell.look(config)["fields"]}
    assert {"category", "urgency", "sentiment", "order_id", "products[]"} <= fields.keys()
    tested = load(str(SUPPORT / "test.jsonl")).examples
    counts = {value["value"]: value["test"] for value in fields["category"]["values"]}
    for value, count in counts.items():
        assert count == sum(f'"category": {value}' in example.answer for example in tested)
    assert fields["products[]"]["constant"] is None, "no single answer is right for a list"


def test_one_label_is_a_baseline_of_100_per_cent(tmp_path):
    found = look_at(tmp_path, [(f"mail {i} of many others", "spam") for i in range(20)])
    assert [value["value"] for value in found["fields"][0]["values"]] == ["spam"]
    assert "answering spam to everything gives 100 %" in levels(found, "note")


def test_bad_rows_are_all_named_and_the_first_as_a_run_refuses_it(tmp_path):
    rows = [*QUESTIONS, ("What?", ""), ("And?", None), ("", "a")]
    found = look_at(tmp_path, rows)
    with pytest.raises(TellError) as refused:
        load(str(tmp_path / "rows.jsonl"))
    assert levels(found, "refused") == [str(refused.value)]
    assert [row["origin"] for row in found["findings"]["left_out"]["rows"]] == [f"rows.jsonl:{i}" for i in (41, 42, 43)]
    assert found["findings"]["empty_answers"]["total"] == 2


def test_contradictions_name_their_rows(tmp_path):
    json_rows = [(f"mail {i}", json.dumps({"kind": "ab"[i % 2], "n": i})) for i in range(30)]
    rows = [
        *json_rows,
        ("mail 3", '{"n": 3, "kind": "b"}'),
        ("mail 4", '{"kind": "b", "n": 4}'),
        ("mail 5", json_rows[5][1]),
    ]
    findings = look_at(tmp_path, rows)["findings"]
    (one,) = findings["contradictions"]["rows"]
    assert one["prompt"] == "mail 4"  # mail 3 has its keys in another order, mail 5 is repeated
    assert [answer["rows"] for answer in one["answers"]] == [["rows.jsonl:5"], ["rows.jsonl:32"]]
    assert findings["repeated"] == 1


def test_near_duplicates_and_leaks(tmp_path):
    text = "the parcel that I ordered three weeks ago has still not arrived at my door in"
    rows = [*QUESTIONS, (f"{text} Bonn!", "a"), (f"{text.capitalize()} bonn", "b")]
    findings = look_at(tmp_path, rows)["findings"]
    (pair,) = findings["near_duplicates"]["pairs"]
    assert (pair["a"], pair["b"], pair["other_answer"]) == ("rows.jsonl:42", "rows.jsonl:41", True)
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"prompt": f"{text} Bonn", "completion": "a"}), encoding="utf-8")
    found = look_at(tmp_path, rows, task={"test": str(test)})
    assert found["findings"]["leaks"]["near"] == 2
    assert any("nearly equal a test row: 2; --drop-overlap removes them" in text for text in levels(found, "warning"))


def test_rows_over_the_limit_are_named(tiny_model, tmp_path):
    rows, test = [*QUESTIONS[:20], ("word " * 400, "a")], tmp_path / "test.jsonl"
    test.write_text(json.dumps({"prompt": "the test", "completion": "a"}), encoding="utf-8")
    more = {"task": {"test": str(test)}}
    found = look_at(tmp_path, rows, tiny_model("llama"), train={"max_length": 200}, **more)
    assert found["lengths"]["limit"] == 200
    (over,) = found["lengths"]["over"]["rows"]
    assert over["origin"] == "rows.jsonl:21" and over["tokens"] > 200
    assert (found["rows"][0]["origin"], found["rows"][0]["tokens"]) == (over["origin"], over["tokens"])
    assert any("over train.max_length, 200 tokens: 1 (rows.jsonl:21)" in text for text in levels(found, "warning"))
    found = look_at(tmp_path, rows, tiny_model("llama"), train={"max_length": 200, "too_long": "refuse"}, **more)
    assert levels(found, "refused") == ["1 of 21 training rows are longer than train.max_length"]


def test_a_test_prompt_without_room_for_an_answer_is_said_as_a_run_refuses_it(tiny_model, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"prompt": "word " * 3000, "completion": "a"}), encoding="utf-8")
    found = look_at(tmp_path, QUESTIONS, tiny_model("llama"), task={"test": str(test)})
    (refused,) = levels(found, "refused")
    assert refused.startswith("test.jsonl:1: the prompt has ") and "the model takes 1,024" in refused


def test_rows_that_the_template_refuses_are_said(tiny_model, tmp_path):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": "ab"[i % 2]}]} for i in range(20)]
    for i, row in enumerate(rows):
        row["messages"][1] = {"role": "user", "content": f"Hi {i}"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = {"task": {"data": str(path)}, "anchor": {"text": "none"}, "model": {"name": str(tiny_model("gemma2"))}}
    found = tell.look(load_config(flags=flags))
    assert all("refuses the conversation" in text for text in levels(found, "refused")) and levels(found, "refused")
    assert all(row["pieces"] is None for row in found["rows"])


@pytest.mark.parametrize("n", [1, 4, 30, 108])
def test_intervals_say_what_the_test_rows_can_show(n, tmp_path):
    test = tmp_path / "test.jsonl"
    rows = [json.dumps({"prompt": f"test {i}", "completion": "ab"[i % 4 == 0]}) for i in range(n)]
    test.write_text("\n".join(rows), encoding="utf-8")
    good, constant = look_at(tmp_path, QUESTIONS, task={"test": str(test)})["intervals"]
    if n == 30:
        assert good["words"] == (
            "with 30 test rows a score of 90 % has an interval of 74 to 97 %: a gain below 17 points cannot be seen"
        )
    if n == 1:
        assert "no gain can be seen" in good["words"] and "no score can be seen" in constant["words"]
    if (least := constant["gain_rows"]) is not None:
        right, row = round(constant["score"] * n), np.arange(n)
        assert newcombe_paired(row < right + least, row < right)[0] > 0
        assert newcombe_paired(row < right + least - 1, row < right)[0] <= 0


def test_nothing_but_the_page_is_written_and_no_torch_loaded(tiny_model, tmp_path):
    rows = [json.dumps({"prompt": f"What is {n} and why?", "completion": f"It is {n}."}) for n in range(1200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    code = (
        "import sys; from tell.cli.main import run; assert run(sys.argv[1:]) == 0;"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    env = {**os.environ, "TELL_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hub")}
    argv = ["look", "rows.jsonl", "--model", str(tiny_model("llama"))]
    subprocess.run([sys.executable, "-c", code, *argv], check=True, env=env, cwd=tmp_path, timeout=120)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "rows.look.html"]


def test_a_model_that_is_not_here_is_not_fetched(tmp_path, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network is used")

    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("socket.socket.connect", refuse)
    for name in ("someone/not-here", "smollm2-135m"):
        found = look_at(tmp_path, QUESTIONS, name)
        assert found["model"]["name"] is None
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("rows", [0, -1, 101])
def test_a_senseless_number_of_rows_is_refused(rows, tmp_path):
    with pytest.raises(TellError, match=r"--rows: .* rows cannot be shown. Choose 1 to 100."):
        tell.look(load_config(flags={"task": {"data": str(SUPPORT / "train.jsonl")}}), rows=rows)


def test_a_wrong_model_is_refused(tmp_path):
    with pytest.raises(TellError, match="no such model folder"):
        look_at(tmp_path, QUESTIONS, "./none-such")
    with pytest.raises(TellError, match="has no config\\.json"):
        look_at(tmp_path, QUESTIONS, tmp_path)


def test_facts_are_json(tiny_model):
    found = tell.look(config_of(tiny_model("llama")))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_json_has_the_plausible_readings_and_a_look_by_the_likeliest(tmp_path, capsys):
    path = tmp_path / "t.csv"
    rows = "".join(f"mail {i} about all of it and more,text {i} says so at length,{'xyz'[i % 3]}\n" for i in range(48))
    path.write_text(f'Subject,"Body, whole",Queue\n{rows}')
    argv = ["look", str(path), "--model", "someone/not-here"]
    assert tell_command([*argv, "--json"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == f"error: {found['error']}\n" and "several ways" in err
    assert found["names"] == ["Subject", "Body, whole", "Queue"]
    prompts = ["{Subject}\n\n{Body, whole}", "{Subject}", "{Body, whole}"]
    assert [(form["prompt"], form["answer"]) for form in found["forms"]] == [(prompt, ["Queue"]) for prompt in prompts]
    assert found["look"]["data"]["form"]["prompt"] == prompts[0] and found["look"]["data"]["rows"] == 48
    assert found["look"]["data"]["names"] == found["names"]
    assert tell_command([*argv, "--prompt", "{Nope}", "--answer", "Queue,Subject", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["forms"], found["look"]) == ([], None)
    assert found["form"] == {"prompt": "{Nope}", "answer": ["Queue", "Subject"]}
    assert tell_command(argv) == 2 and capsys.readouterr().out == ""
