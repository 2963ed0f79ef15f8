"""One place decides how a metric is called and written: on the screen, in the verdict and on pages."""

from __future__ import annotations

import pytest
from rich.console import Console

from tell.cli.tables import arms_table
from tell.metric_names import FIELD, METRICS, SCORES, metric
from tell.names import ARMS, arm, arm_order
from tell.number_text import show, show_interval
from tell.score.scored import KINDS, ScoredTask, scorer
from tell.score.scorers import make_scorer
from tell.score.verdict import verdict

WORTH = {"base": 6.0, "tell": 7.5}
ANSWERS = {
    "json": (['{"a": [1]}', "no"], ['{"a": [1]}', '{"a": [2]}']),
    "label": (["x", "y"], ["x", "x"]),
    "labels": (['["x"]', "y"], ['["x", "y"]', '["x"]']),
    "text": (["one two", ""], ["one three", "two"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scorers_return_what_they_declare(kind):
    found = make_scorer(kind, schema={"type": "object"}, labels=["x", "y"]).score(*ANSWERS[kind])
    names = {FIELD if name.startswith(FIELD) else name for name in found}
    assert names == set(KINDS[kind].metrics) - {"bleurt"}
    assert set(KINDS[kind].metrics) - {FIELD} <= set(SCORES) <= METRICS.keys()


def test_an_undeclared_metric_and_a_second_scorer_of_a_kind_are_errors_at_import():
    with pytest.raises(ValueError, match=r"undeclared metrics \['rouge_3'\]"):
        scorer("new", "rouge_3")
    with pytest.raises(ValueError, match="registered twice"):
        scorer("json", "accuracy")
    assert KINDS["label"].made_by.of(ScoredTask(labels=("x",))).primary == "accuracy"


def test_a_users_own_metric_is_no_share():
    arms = {arm: {"my_score": {"value": value, "ci": [value - 1, value + 1], "n": 9}} for arm, value in WORTH.items()}
    gap = {"tell - base": {"my_score": {"value": 1.5, "ci": [1.0, 2.0], "n": 9}}}
    metrics = {"task": {"kind": "text", "primary": "my_score"}, "arms": arms, "differences": gap}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(arms_table(metrics))
    assert "7.500 [6.500, 8.500]" in console.export_text()
    text = verdict(metrics)
    assert "my_score from 6 (" in text and "to 7.5" in text and "%" not in text.split("95 %")[0]
    assert show(7.5, metric("my_score").unit) == "7.500"


@pytest.mark.parametrize(
    ("name", "label", "unit", "higher"),
    [
        ("schema_adherence", "Schema adherence", "share", True),
        ("answer_loss", "Answer loss", "nats", False),
        ("field:urgency", "Field urgency", "share", True),
        ("field:urgency change", "Change of field urgency", "points", True),
        ("probe", "Loss on general text", "nats", False),
        ("general held out loss change", "Change of loss on held-out general rows", "nats", False),
        ("witness task format", "General prompts answered in the task's format", "share", False),
        ("benchmark gsm8k", "gsm8k", "share", True),
        ("benchmark gsm8k change", "Change of gsm8k", "points", True),
        ("chrf change", "Change of chrF++", "score", True),
        ("my_score", "My score", "plain", True),
        ("my_score change", "Change of my_score", "plain", True),
        ("F1", "F1", "plain", True),
    ],
)
def test_metrics_of_runs_and_studies_are_looked_up_by_name(name, label, unit, higher):
    spec = metric(name)
    assert (spec.label, spec.unit, spec.higher_is_better) == (label, unit, higher)


def test_labels_inside_a_sentence():
    phrases = [metric(name).phrase for name in ("valid_json", "macro_f1", "rouge_l", "chrf", "mmd2", "field:x")]
    assert phrases == ["valid JSON", "macro-F1", "ROUGE-L", "chrF++", "MMD²", "accuracy of the field x"]
    own = [metric(name).phrase for name in ("MyMetric", "my_score", "my_score change")]
    assert own == ["MyMetric", "my_score", "change of my_score"]  # as the user wrote them


def test_unknown_arms_keep_their_name_and_come_last():
    assert arm("other").label == "other" and arm("tell") is ARMS["tell"]
    assert arm_order(["other", "tell", "base", "tell"]) == ["base", "tell", "other"]


def test_exact_numbers_stay_apart_from_nothing_and_from_all():
    shown = [show(value, "share", exact=True) for value in (0.0, 0.0002, 0.5, 0.9997, 1.0)]
    assert shown == ["0\u202f%", "0.02\u202f%", "50\u202f%", "99.97\u202f%", "100\u202f%"]
    assert show_interval([-0.00001, 0.25], "points", exact=True) == "−0.001 to 25"
