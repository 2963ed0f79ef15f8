"""Tables of labels and the constant answer, against scikit-learn, and what is said of them."""

import random

import pytest
from rich.console import Console
from sklearn.dummy import DummyClassifier
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from tell.cli.tables import arms_table, label_lines
from tell.data.kind import Kind
from tell.score.label_table import MOST_LABELS, baseline_numbers, label_numbers, label_scorer
from tell.score.verdict import verdict

LABEL = Kind("label", None, False, ("Ham", "spam", "eggs"), "")


def single(rows=80, seed=0):
    rng = random.Random(seed)
    gold = [rng.choice(["Ham", "Ham", "spam", "eggs"]) for _ in range(rows)]
    return [g if rng.random() < 0.6 else rng.choice(["ham.", "SPAM", "eggs", "what?"]) for g in gold], gold


def test_labels_as_scikit_learn_counts_them():
    answers, gold = single()
    found = label_numbers(label_scorer(LABEL), {"tell": (answers, gold)})
    rows = {row["label"]: row for row in found["arms"]["tell"]}
    names = list(rows)
    assert (found["shown"], found["occurring"]) == (3, 3)
    assert [row["support"] for row in rows.values()] == sorted((gold.count(name) for name in names), reverse=True)
    same = {"ham.": "Ham", "SPAM": "spam"}
    clean = [same.get(answer, answer) for answer in answers]
    expected = precision_recall_fscore_support(gold, clean, labels=names, zero_division=0)
    for at, key in enumerate(("precision", "recall", "f1", "support")):
        assert [row[key] for row in rows.values()] == pytest.approx(expected[at].tolist(), abs=1e-6)
    matrix = confusion_matrix(gold, clean, labels=names)
    for row, line in zip(rows.values(), matrix, strict=True):
        assert [row["answers"].get(name, 0) for name in names] == line.tolist()
        assert row["none"] == row["support"] - line.sum() and row["others"] == 0


def test_lists_have_no_confusion_matrix():
    kind = Kind("labels", None, False, ("a", "b", "c"), "", form="semicolons")
    found = label_numbers(label_scorer(kind), {"tell": (["a; b", "c"], ["a", "b; c"])})["arms"]["tell"]
    assert {row["label"]: (row["precision"], row["recall"]) for row in found} == {
        "a": (1, 1),
        "b": (0, 0),
        "c": (1, 1),
    }
    assert not any("answers" in row for row in found)


def test_many_labels_are_bounded_and_the_rest_is_counted():
    names = tuple(f"label {i:03}" for i in range(70))
    gold = [name for i, name in enumerate(names[:60]) for _ in range(1 + i % 3)]
    found = label_numbers(
        label_scorer(Kind("label", None, False, names, "")), {"a": (gold[::-1], gold), "b": (gold, gold)}
    )
    assert (found["shown"], found["occurring"]) == (MOST_LABELS, 60)
    one, two = found["arms"].values()
    assert [row["label"] for row in one] == [row["label"] for row in two] and len(one) == MOST_LABELS
    for row in one:
        assert sum(row["answers"].values()) + row["others"] + row["none"] == row["support"]
    assert sum(row["others"] for row in one) > 0 == sum(row["others"] for row in two)


def test_the_constant_answer_is_the_best_one():
    answers, gold = single()
    scorer = label_scorer(LABEL)
    arms = {"tell": scorer.score(answers, gold)}
    found = baseline_numbers(LABEL, scorer, arms, gold, seed=0, samples=100)
    dummy = DummyClassifier(strategy="most_frequent").fit([[0]] * len(gold), gold)
    assert found["answer"] == "Ham"
    assert found["scores"]["accuracy"]["value"] == pytest.approx(dummy.score([[0]] * len(gold), gold), abs=1e-6)
    gap = arms["tell"]["accuracy"].value - found["scores"]["accuracy"]["value"]
    assert found["differences"]["tell"]["value"] == pytest.approx(gap, abs=1e-6)


@pytest.mark.parametrize(
    ("references", "best"),
    [
        (["a; b", "b; a", "b;a", "a; b", "c"], "a; b"),  # a set, whatever its order
        (["a; b", "a; c", "a; d", "a; e"], "a"),  # no single row's answer is as good as what they share
    ],
)
def test_the_constant_list(references, best):
    kind = Kind("labels", None, False, tuple("abcde"), "", form="semicolons")
    scorer = label_scorer(kind)
    found = baseline_numbers(kind, scorer, {}, references, seed=0, samples=50)
    assert (found["answer"], found["metric"], found["differences"]) == (best, "sample_f1", {})


def metrics_of(skill, seed=0):
    rng = random.Random(seed)
    gold = ["no"] * 80 + ["yes"] * 20
    answers = [g if rng.random() < skill else ("yes" if g == "no" else "no") for g in gold]
    kind = Kind("label", None, False, ("no", "yes"), "")
    scorer = label_scorer(kind)
    from tell.run.answers import arm_numbers

    arms = {"tell": scorer.score(answers, gold), "base": scorer.score(["no"] * 50 + ["?"] * 50, gold)}
    values, gaps = arm_numbers(arms, seed=0, samples=100)
    return {
        "task": {"kind": "label", "primary": "accuracy"},
        "arms": values,
        "differences": gaps,
        "labels": label_numbers(scorer, {"tell": (answers, gold)}),
        "baseline": baseline_numbers(kind, scorer, arms, gold, 0, 100),
    }


def test_the_constant_answer_stands_beside_the_score():
    weak, strong = verdict(metrics_of(0.84)), verdict(metrics_of(1.0))
    assert "answering “no” to everything gives 80 %, which TELL is not clearly above (TELL minus it: " in weak
    assert "; answering “no” to everything gives 80 %" in strong and "not clearly above" not in strong
    few = metrics_of(1.0)
    for entries in few["arms"].values():
        entries["accuracy"]["n"] = 3
    assert "too few for a verdict" in verdict(few) and "to everything gives 80 %" in verdict(few)
    del few["arms"]["tell"]
    assert "to everything gives 80 %" in verdict(few)


def test_the_screen():
    metrics = metrics_of(0.84)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(arms_table(metrics))
    assert "constant answer │ 80.0 % [71, 87]" in console.export_text()
    low, taken = label_lines(metrics)
    assert low.startswith("tell, lowest F1: yes ") and "(20 rows)" in low
    assert taken.startswith("tell, most often mistaken: no as yes (")
    assert label_lines({"arms": {}}) == []


def test_a_label_reaches_the_screen_clean():
    kind = Kind("label", None, False, ("a\x1b[31m\n", "b" * 300), "")
    numbers = label_numbers(label_scorer(kind), {"tell": (["b" * 300], ["a\x1b[31m"])})
    lines = label_lines({"labels": numbers})
    assert len(lines) == 2 and all("\x1b" not in line and "\n" not in line and len(line) < 200 for line in lines)
