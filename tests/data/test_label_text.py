"""Lists of labels: recognised by their parts, read in one form, and split so that each label is trained."""

import json
import random
from collections import Counter

import pytest

from tell.anchor.derive import derived_anchor
from tell.data.example import Example
from tell.data.kind import detect_kind, misfits, missing_classes
from tell.data.label_text import FORMS, list_form
from tell.data.sources import load
from tell.data.split import split
from tell.errors import TellError

LABELS = ("billing", "delivery", "refund", "urgent", "other")


def drawn(least: int = 1, rows: int = 60, seed: int = 0) -> list[list[str]]:
    rng = random.Random(seed)
    return [rng.sample(LABELS, rng.randint(least, 3)) for _ in range(rows)]


def examples(answers):
    return [Example.pair(f"q{i}", answer, origin=f"f.jsonl:{i}") for i, answer in enumerate(answers, 1)]


@pytest.mark.parametrize("rows", [40, 600])
@pytest.mark.parametrize(
    ("separator", "form"),
    [("; ", "semicolons"), (";", "semicolons"), (", ", "commas"), (",", "commas"), (" | ", "bars"), ("|", "bars")],
)
def test_separated_labels(separator, form, rows):
    lists = drawn(rows=rows)
    kind = detect_kind(examples([separator.join(found) for found in lists]))
    assert (kind.name, kind.form, kind.labels) == ("labels", form, tuple(sorted(LABELS)))
    assert kind.labels_in(separator.join(lists[0])) == tuple(lists[0])
    assert "5 different ones" in kind.why and FORMS[form].words in kind.why


def test_json_lists_may_be_empty_and_have_one_label():
    kind = detect_kind(examples(map(json.dumps, drawn(0))))
    assert (kind.name, kind.form) == ("labels", "json") and "of them name no label" in kind.why
    assert detect_kind(examples(['["a"]', '["b"]'] * 4)).form == "json"
    assert kind.labels_in("[]") == () and kind.labels_in("prose") == () and kind.labels_in('["x", "x"]') == ("x",)
    assert '"' not in "".join(kind.labels)


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        (["News; Sport", "Politics"] * 6, "label"),  # the parts stand nowhere else
        (["Paris, France", "Lyon, France", "Rome, Italy"] * 6, "label"),
        ([f"Smith{i}, John" for i in range(40)], "text"),
        (["1, 0, 0", "0, 1, 0", "0, 0, 1"] * 9, "label"),
        ([f"{i % 7};{i % 5}" for i in range(35)], "text"),
        ([f"{a}, {b}, {c}" for a in "abc" for b in "def" for c in "ghi"], "text"),  # each part has its place
        ([json.dumps([i % 3, i % 2]) for i in range(40)], "label"),
        ([json.dumps([f"name {i}", "x"]) for i in range(40)], "text"),
        ([json.dumps([random.Random(i).choice("ab") for _ in range(6)]) for i in range(60)], "text"),
        ([f"Yes, row {i} is right; no doubt" for i in range(40)], "text"),
        (['{"a": "x; y"}'] * 9, "json"),
    ],
)
def test_what_is_no_list_of_labels(answers, name):
    assert detect_kind(examples(answers)).name == name
    assert list_form(answers) is None


def test_python_lists_are_pointed_out():
    kind = detect_kind(examples(map(str, drawn())))
    assert kind.name in ("label", "text") and "look like Python lists" in kind.why


def test_requested():
    kind = detect_kind(examples(["News; Sport", "Politics"]), override="labels")
    assert (kind.labels, kind.form) == (("News", "Politics", "Sport"), "semicolons")
    assert kind.why.startswith("labels: requested; 2 answers")
    assert detect_kind(examples(["[3, 7]", "[3]"]), override="labels").labels == ("3", "7")
    assert detect_kind(examples(["a", "b"]), override="labels").labels == ("a", "b")
    with pytest.raises(TellError, match=r"f.jsonl:2: the answer 'a; b' is no list of labels as a JSON list") as found:
        detect_kind(examples(['["a"]', "a; b"]), override="labels")
    assert "set the kind to label or text" in found.value.remedy
    with pytest.raises(TellError, match="no answer names a label"):
        detect_kind(examples(["[]", "[]"]), override="labels")
    with pytest.raises(TellError, match="kind labels takes no schema"):
        detect_kind(examples(["a; b"]), override="labels", schema={})


def test_labels_that_one_side_lacks_and_rows_that_are_no_list():
    known, test = examples(["a; b", "a; c", "b; c", "a"] * 3), examples(["b; d"])
    kind = detect_kind(known)
    assert missing_classes(kind, known, test) == [
        "2 of 4 labels have no test row: a (9), c (6)",
        "1 of 4 labels have no training row: d (1)",
    ]
    assert misfits(kind, test) is None
    kind = detect_kind(examples(map(json.dumps, drawn())))
    assert misfits(kind, examples(['["a"]', "a", "b"])) == (
        "2 of 3 test rows are no list of labels as a JSON list of strings, as the training rows are, "
        "the first is f.jsonl:2"
    )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_read_what_they_write(form):
    assert form.split(form.join(["a b", "ß"])) == ["a b", "ß"]
    assert form.split(form.join([])) == []


@pytest.mark.parametrize("text", ['{"a": 1}', '"a"', '["a", ["b"]]', '["a"', "a", "", '["a"] and more', "NaN"])
def test_what_is_no_json_list(text):
    assert FORMS["json"].split(text) is None


def test_every_label_is_trained():
    answers = ["; ".join(found) for found in drawn(rows=30)]
    answers[11] = "rare; billing"
    answers[12] = "scarce; urgent"
    answers[13] = "scarce; other"
    rows = examples(answers)
    form = list_form(answers)
    for seed in range(20):
        parts = split(rows, seed=seed, test_fraction=0.4, validation_fraction=0.2)
        trained = Counter(label for row in parts.train for label in form.split(row.answer))
        assert set(trained) == {*LABELS, "rare", "scarce"}, seed


# --- columns of lists


def written(path, rows, column="labels"):
    path.write_text("\n".join(json.dumps({"text": f"t{i}", column: row}) for i, row in enumerate(rows)))
    return str(path)


def test_a_column_of_lists_is_lists_in_every_row(tmp_path):
    found = load(written(tmp_path / "a.jsonl", [["a", "b"], ["b"], [], "a", ["c", "a"], [2, "é"]]))
    assert [e.answer for e in found.examples] == ['["a", "b"]', '["b"]', "[]", '["a"]', '["c", "a"]', '[2, "é"]']
    assert found.lists


def test_a_column_of_single_labels_is_as_ever_unless_other_rows_have_several(tmp_path):
    path = written(tmp_path / "a.jsonl", [["a"], ["b"]])
    assert [e.answer for e in load(path).examples] == ["a", "b"] and not load(path).lists
    assert [e.answer for e in load(path, lists=True).examples] == ['["a"]', '["b"]']
    plain = written(tmp_path / "b.jsonl", ["a", "b"])
    assert [e.answer for e in load(plain, lists=True).examples] == ["a", "b"]


@pytest.mark.parametrize(
    ("cell", "what"),
    [(None, "has no answer"), ([[0, 4, "TAG"]], "has spans"), ([{"label": "x"}], "has spans"), (" ", "has no answer")],
)
def test_bad_cells_of_lists(tmp_path, cell, what):
    with pytest.raises(TellError, match=what) as found:
        load(written(tmp_path / "a.jsonl", [["a", "b"], cell]))
    assert found.value.where.endswith(":2")


def test_the_anchor_says_how_labels_are_listed():
    kind = detect_kind(examples(map(json.dumps, drawn())))
    text = derived_anchor(kind, "user").text
    assert text.startswith("Answer with all of these labels that apply, as a JSON list of strings, and nothing else:")
    assert text.endswith("billing, delivery, other, refund, urgent.")
