import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from tell.errors import TellError
from tell.score.label import LabelScorer

LABELS = ["positive", "negative", "neutral", "mixed"]
WORDS = st.sampled_from([*LABELS, "no idea", ""])


@given(st.lists(st.tuples(WORDS, st.sampled_from(LABELS)), min_size=1, max_size=40))
def test_equals_scikit_learn(pairs):
    answers, references = map(list, zip(*pairs, strict=True))
    metrics = LabelScorer(LABELS).score(answers, references)
    assert metrics["accuracy"].value == pytest.approx(accuracy_score(references, answers))
    expected = f1_score(references, answers, labels=LABELS, average="macro", zero_division=np.nan)
    assert metrics["macro_f1"].value == pytest.approx(expected, abs=1e-12)
    occurring = [label for label in LABELS if label in answers or label in references]
    expected = f1_score(references, answers, labels=occurring, average="macro", zero_division=0)
    assert metrics["macro_f1"].value == pytest.approx(expected, abs=1e-12)
    assert metrics["valid_label"].value == np.mean([a in LABELS for a in answers])


def test_macro_f1_is_exact_under_resampling():
    answers = ["positive", "negative", "neutral", "huh", "positive"]
    references = ["positive", "positive", "neutral", "neutral", "negative"]
    metric = LabelScorer(LABELS).score(answers, references)["macro_f1"]
    weights = np.array([[2, 0, 1, 1, 1], [0, 3, 0, 2, 0]])
    for row, value in zip(weights, metric.combine(weights @ metric.stats), strict=True):
        drawn = np.repeat(np.arange(5), row)
        y, z = [references[i] for i in drawn], [answers[i] for i in drawn]
        assert value == pytest.approx(f1_score(y, z, labels=LABELS, average="macro", zero_division=np.nan))


@pytest.mark.parametrize("answer", ["Positive", " positive \n", "positive.", "POSITIVE!", "positive。"])
def test_normalisation(answer):
    scorer = LabelScorer(LABELS)
    assert scorer.is_task_format(answer)
    assert scorer.score([answer], ["positive"])["accuracy"].value == 1


@pytest.mark.parametrize("answer", ["", ".", "positive or negative", "The label is positive", '"positive"'])
def test_other_texts_are_no_label(answer):
    scores = LabelScorer(LABELS).score([answer], ["positive"])
    assert not LabelScorer(LABELS).is_task_format(answer)
    assert scores["accuracy"].value == scores["valid_label"].value == scores["macro_f1"].value == 0


def test_labels_that_differ_by_punctuation_stay_apart():
    scorer = LabelScorer(["done", "done?", "c++", "1.", "!"])
    assert [scorer.index(text) for text in ("Done", "done?", "done!", "C++", "1", "1.", "!")] == [0, 1, 5, 2, 3, 3, 4]


def test_labels_that_differ_by_case_are_one():
    assert LabelScorer(["Yes", "yes", "no"]).labels == ("yes", "no")


def test_reference_outside_the_labels():
    metrics = LabelScorer(["a", "b"]).score(["New.", "other", "a"], ["new", "new", "new"])
    assert metrics["accuracy"].per_row.tolist() == [1, 0, 0]
    assert metrics["valid_label"].per_row.tolist() == [0, 0, 1]


def test_no_labels():
    with pytest.raises(TellError, match="no label"):
        LabelScorer([" "])
