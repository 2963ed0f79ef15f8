"""Lists of labels are scored as scikit-learn scores indicator matrices."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from tell.data.label_text import FORMS
from tell.score.intervals import estimate
from tell.score.multi_label import MultiLabelScorer

LABELS = ["a", "b", "c", "d"]
SETS = st.lists(st.sampled_from(LABELS), max_size=4, unique=True)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(pairs=st.lists(st.tuples(SETS, SETS), min_size=1, max_size=25))
def test_equals_scikit_learn(form, pairs):
    answers, references = ([form.join(found) for found in side] for side in zip(*pairs, strict=True))
    metrics = MultiLabelScorer(LABELS, form.name).score(answers, references)
    binary = MultiLabelBinarizer(classes=LABELS).fit([LABELS])
    given_, gold = (binary.transform(side) for side in zip(*pairs, strict=True))
    assert metrics["exact_set"].value == pytest.approx(accuracy_score(gold, given_))
    assert metrics["sample_f1"].value == pytest.approx(f1_score(gold, given_, average="samples", zero_division=1))
    if given_.any() or gold.any():
        assert metrics["micro_f1"].value == pytest.approx(f1_score(gold, given_, average="micro"))
        expected = f1_score(gold, given_, average="macro", zero_division=np.nan)
        assert metrics["macro_f1"].value == pytest.approx(expected)


def test_f1_is_exact_under_resampling():
    answers, references = ['["a"]', '["b", "c"]', "prose", "[]"], ['["a", "b"]', '["c"]', '["d"]', '["a"]']
    metrics = MultiLabelScorer(LABELS, "json").score(answers, references)
    weights = np.array([[2.0, 0, 1, 1], [0, 3, 1, 0]])
    for name in ("micro_f1", "macro_f1", "sample_f1"):
        for row, value in zip(weights, metrics[name].combine(weights @ metrics[name].stats), strict=True):
            drawn = np.repeat(np.arange(4), row.astype(int))
            again = MultiLabelScorer(LABELS, "json").score([answers[i] for i in drawn], [references[i] for i in drawn])
            assert value == pytest.approx(again[name].value), name
    for metric in metrics.values():
        found = estimate(metric, seed=1, samples=200)
        assert found["ci"][0] <= found["value"] <= found["ci"][1]


@pytest.mark.parametrize("answer", ['["b", "a"]', '["A", "b.", "a"]', ' [ "a" ,\n"b" ] '])
def test_order_repetitions_and_case_do_not_count(answer):
    scores = MultiLabelScorer(LABELS, "json").score([answer], ['["a", "b"]'])
    assert all(metric.value == 1 for metric in scores.values())


@pytest.mark.parametrize(
    ("form", "answer", "valid"),
    [
        ("json", "[]", True),
        ("json", '["a", "x"]', False),
        ("json", "a; b", False),
        ("json", '{"a": "b"}', False),
        ("semicolons", "a;b ; c", True),
        ("semicolons", "a; b;", True),
        ("semicolons", "", False),
        ("semicolons", "a, b", False),
        ("semicolons", '["a"]', False),
        ("commas", "a, b", True),
    ],
)
def test_valid_lists(form, answer, valid):
    scorer = MultiLabelScorer(LABELS, form)
    assert scorer.is_task_format(answer) is valid
    metrics = scorer.score([answer], [FORMS[form].join(["a", "d"])])
    assert metrics["valid_labels"].value == valid and metrics["exact_set"].value == 0


def test_a_label_that_is_not_known_counts_where_reference_and_answer_have_it():
    metrics = MultiLabelScorer(["a"], "semicolons").score(["a; new", "a; other"], ["New.; a", "a; new"])
    assert metrics["exact_set"].per_row.tolist() == [1, 0]
    assert metrics["sample_f1"].per_row.tolist() == [1, 0.5]
    assert metrics["valid_labels"].value == 0


def test_an_answer_that_is_no_list_is_wrong_unless_the_reference_is_the_same_text():
    metrics = MultiLabelScorer(["a"], "json").score(["a", "I think", "I think"], ['["a"]', '["a"]', "I think"])
    assert metrics["sample_f1"].per_row.tolist() == [0, 0, 1]
    assert json.loads(json.dumps(metrics["micro_f1"].value)) == pytest.approx(1 / 3)
