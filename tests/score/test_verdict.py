import itertools
import re

import pytest

from tell.score.intervals import difference, estimate
from tell.score.means import mean_metric
from tell.score.verdict import verdict

M = "schema_adherence"


def rate(value, low, high, n=100):
    return {"value": value, "ci": [low, high], "n": n}


def make(arms: dict, differences: dict, *, metric: str = M, forgetting: dict | None = None, n: int = 100) -> dict:
    """metrics.json from ``{arm: value}`` and ``{"tell - base": (value, low, high)}``."""
    return {
        "task": {"kind": "json", "primary": metric},
        "arms": {
            arm: {metric: rate(value, max(value - 0.05, 0), min(value + 0.05, 1), n)} for arm, value in arms.items()
        },
        "differences": {key: {metric: rate(*gap, n)} for key, gap in differences.items()},
        "forgetting": forgetting or {},
    }


def probe(losses: dict, differences: dict, leaks: dict | None = None, rows: int = 60) -> dict:
    """``losses`` by arm; ``differences`` and ``leaks`` are (value, low, high) by key."""
    gaps = {key: {"probe": {"loss": rate(*gap, rows)}} for key, gap in differences.items()}
    arms = {arm: {"probe": {"loss": rate(loss, loss - 0.2, loss + 0.2, rows)}} for arm, loss in losses.items()}
    for key, gap in (leaks or {}).items():
        gaps.setdefault(key, {"probe": {}})["probe"]["task_format"] = rate(*gap, rows)
        arms["tell"]["probe"]["task_format"] = rate(gap[0], 0, 1, rows)
    sets = {"general held out": {"in_mix_source": True}, "probe": {"in_mix_source": False}}
    return {"sets": sets, "arms": arms, "differences": gaps}


def test_arms_that_failed_are_named():
    metrics = make({"base": 0.2, "tell": 0.9}, {"tell - base": (0.7, 0.6, 0.8)})
    told = verdict({**metrics, "failed": {"sft": "training diverged at step 3 of 5 (loss nan)"}})
    assert told == verdict(metrics)[:-1] + "; SFT was not scored (training diverged at step 3 of 5 (loss nan))."
    assert "general data alone was not scored (why)." in verdict({"arms": {}, "failed": {"general": "why"}})


def one_sentence(text: str) -> str:
    assert text[0].isupper() or text[0].isdigit()
    assert text.endswith(".") and not re.search(r"[.!?]\s", text), text
    assert "None" not in text and "nan" not in text
    return text


def test_the_example():
    forgetting = probe(
        {"base": 1.71, "tell": 1.72, "sft-matched": 2.21},
        {
            "tell - base": (0.01, -0.02, 0.04),
            "tell - sft-matched": (-0.49, -0.6, -0.4),
            "sft-matched - base": (0.5, 0.4, 0.6),
        },
    )
    arms = {"base": 0.0, "base+anchor": 0.0, "sft-matched": 0.95, "sft": 0.14, "tell": 0.94}
    gaps = {
        "tell - base": (0.94, 0.91, 0.96),
        "tell - sft-matched": (-0.01, -0.04, 0.02),
        "tell - sft": (0.8, 0.7, 0.9),
    }
    assert one_sentence(verdict(make(arms, gaps, forgetting=forgetting))) == (
        "TELL raises schema adherence from 0 % (untuned model) to 94 % (difference 94 points, 95 % interval 91 to 96; "
        "100 test rows); step-matched SFT does as well (TELL minus it: -1 point, -4 to 2) but forgets more (loss on "
        "general text 2.21 against 1.72); TELL is ahead of SFT (by 80 points, 70 to 90)."
    )


@pytest.mark.parametrize(
    ("gap", "says"),
    [
        ((0.5, 0.4, 0.6), "TELL raises schema adherence from 30 % (untuned model) to 80 %"),
        ((0.5, -0.01, 0.6), "TELL does not clearly change schema adherence: 30 % (untuned model) before, 80 % after"),
        ((0.5, 0.0, 0.6), "TELL does not clearly change"),
        ((-0.1, -0.2, -0.01), "TELL lost: schema adherence falls from 30 %"),
    ],
)
def test_against_the_untuned_model(gap, says):
    assert one_sentence(verdict(make({"base": 0.3, "tell": 0.8}, {"tell - base": gap}))).startswith(says)


def test_the_stronger_untuned_arm_is_the_measure():
    arms = {"base": 0.1, "base+anchor": 0.5, "tell": 0.45}
    text = verdict(make(arms, {"tell - base": (0.35, 0.3, 0.4), "tell - base+anchor": (-0.05, -0.1, -0.01)}))
    assert one_sentence(text).startswith("TELL lost: schema adherence falls from 50 % (untuned model with the anchor)")


@pytest.mark.parametrize(
    ("gap", "says"),
    [
        ((-0.06, -0.1, -0.02), "; step-matched SFT does better (by 6 points, 2 to 10)"),
        ((-0.01, -0.04, 0.02), "; step-matched SFT does as well (TELL minus it: -1 point, -4 to 2)"),
        ((0.0, 0.0, 0.0), "; step-matched SFT does as well (TELL minus it: 0 points, 0 to 0)"),
        ((0.03, -0.01, 0.07), "; step-matched SFT is not clearly worse (TELL minus it: 3 points, -1 to 7)"),
        ((0.03, 0.01, 0.05), "; TELL is ahead of step-matched SFT (by 3 points, 1 to 5)"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_against_a_rival(gap, says, turned):
    gaps = {"tell - base": (0.9, 0.8, 0.95)}
    if turned:  # written down the other way round
        gaps["sft-matched - tell"] = (-gap[0], -gap[2], -gap[1])
    else:
        gaps["tell - sft-matched"] = gap
    text = one_sentence(verdict(make({"base": 0.0, "tell": 0.9, "sft-matched": 0.9 - gap[0]}, gaps)))
    assert says in text


def test_rivals_come_in_order_of_danger():
    arms = {"base": 0.0, "tell": 0.8, "sft-matched": 0.8, "sft": 0.2, "icl": 0.9, "general": 0.1}
    gaps = {
        "tell - base": (0.8, 0.7, 0.9),
        "tell - sft-matched": (0.0, -0.05, 0.05),
        "tell - sft": (0.6, 0.5, 0.7),
        "tell - icl": (-0.1, -0.15, -0.05),
        "tell - general": (0.7, 0.6, 0.8),
    }
    text = one_sentence(verdict(make(arms, gaps)))
    places = [
        text.index(words)
        for words in ("in context does better", "step-matched SFT does as well", "TELL is ahead of SFT")
    ]
    assert places == sorted(places)
    assert "and tuning on general data alone (by 70 points" in text


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ({}, "No arm was scored"),
        ({"base": 0.03}, "TELL was not scored: schema adherence is 3 % for the untuned model (95 % interval 0 to 8)"),
        ({"base": 0.03, "sft": 0.5}, "3 % for the untuned model (95 % interval 0 to 8) and 50 % for SFT"),
        (
            {"tell": 0.5},
            "TELL reaches 50 % in schema adherence (95 % interval 45 to 55; 100 test rows), and as the untuned",
        ),
        ({"base": 0.1, "tell": 0.5}, "Schema adherence is 10 % (untuned model) before and 50 % with TELL"),
        ({"tell": 0.5, "icl": 0.4}, "; the untuned model with examples in context reaches 40 % (no interval"),
    ],
)
def test_missing_arms_and_differences(arms, says):
    assert says in one_sentence(verdict(make(arms, {})))


def test_content_may_be_missing_altogether():
    assert verdict({}) == verdict({"arms": {"tell": {}}}) == "No arm was scored, so there is no verdict."
    lost = make({"base": 0.1, "tell": 0.5}, {})
    lost["arms"]["tell"][M] = {"value": None, "ci": [None, None], "n": 0}
    lost["forgetting"] = None
    assert one_sentence(verdict(lost)).startswith("TELL was not scored")


def test_few_rows_give_no_verdict():
    text = one_sentence(verdict(make({"base": 0.0, "tell": 1.0}, {"tell - base": (1.0, 0.5, 1.0)}, n=5)))
    assert (
        text
        == "5 test rows are too few for a verdict: schema adherence is 0 % for the untuned model and 100 % for TELL."
    )
    assert verdict(make({"tell": 1.0}, {}, n=1)).startswith("1 test row is too few")


@pytest.mark.parametrize(
    ("metric", "values", "says"),
    [
        ("chrf", (20.14, 45.2), "raises chrF++ from 20.1 (untuned model) to 45.2 (difference 25.1 points"),
        ("bleurt", (0.2, 0.4517), "raises BLEURT from 0.2 (untuned model) to 0.452 (difference 0.252, 95 % interval"),
        ("macro_f1", (0.2, 0.4517), "raises macro-F1 from 20 % (untuned model) to 45.2 % (difference 25.2 points"),
        (
            "field:amount",
            (0.2, 0.21),
            "raises accuracy of the field amount from 20 % (untuned model) to 21 % (difference 1 point,",
        ),
        (
            "politeness",
            (0.20, 3.4567),
            "raises politeness from 0.2 (untuned model) to 3.457 (difference 3.257, 95 % interval",
        ),
        (M, (0.0002, 0.9997), "from 0.02 % (untuned model) to 99.97 %"),
    ],
)
def test_units(metric, values, says):
    gap = round(values[1] - values[0], 6)
    text = one_sentence(
        verdict(
            make(
                dict(zip(("base", "tell"), values, strict=True)),
                {"tell - base": (gap, gap * 0.9, gap * 1.1)},
                metric=metric,
            )
        )
    )
    assert says in text


@pytest.mark.parametrize(
    ("gap", "rows", "says"),
    [
        ((0.12, 0.08, 0.16), 60, True),
        ((0.12, -0.01, 0.25), 60, False),
        ((-0.3, -0.4, -0.2), 60, False),
        ((0.12, 0.08, 0.16), 3, False),
    ],
)
def test_forgetting_is_told_where_it_is_significant(gap, rows, says):
    forgetting = probe({"base": 1.7, "tell": 1.7 + gap[0]}, {"tell - base": gap}, rows=rows)
    text = one_sentence(
        verdict(make({"base": 0.0, "tell": 0.9}, {"tell - base": (0.9, 0.8, 0.95)}, forgetting=forgetting))
    )
    assert ("TELL forgets: loss on general text outside the mix rises by 0.12 (0.08 to 0.16)" in text) is says
    assert ("forgets" in text) is says


def test_loss_on_the_mixed_source_is_no_evidence():
    forgetting = {
        "sets": {"general held out": {"in_mix_source": True}},
        "arms": {},
        "differences": {"tell - base": {"general held out": {"loss": rate(0.5, 0.4, 0.6, 60)}}},
    }
    metrics = make({"base": 0.0, "tell": 0.9}, {"tell - base": (0.9, 0.8, 0.95)}, forgetting=forgetting)
    assert "forgets" not in verdict(metrics)


def test_leaking_format_is_told():
    forgetting = probe(
        {"base": 1.7, "tell": 1.6}, {"tell - base": (-0.1, -0.2, 0.0)}, {"tell - base": (0.25, 0.1, 0.4)}
    )
    metrics = make({"base": 0.0, "tell": 0.9}, {"tell - base": (0.9, 0.8, 0.95)}, forgetting=forgetting)
    assert "TELL answers 25 % of general prompts in the task's format" in one_sentence(verdict(metrics))


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ({"tell - sft-matched": (-0.5, -0.6, -0.4), "sft-matched - base": (0.2, 0.1, 0.3)}, "but forgets more"),
        (
            {"tell - sft-matched": (-0.5, -0.6, -0.4), "sft-matched - base": (0.0, -0.1, 0.1)},
            "but ends with a higher loss",
        ),
        ({"tell - sft-matched": (-0.5, -1.1, 0.1), "sft-matched - base": (0.2, 0.1, 0.3)}, None),
        ({"tell - sft-matched": (0.5, 0.4, 0.6)}, "and ends with a lower loss"),
        ({"tell - base": (-0.3, -0.4, -0.2), "sft-matched - base": (0.2, 0.1, 0.3)}, "but forgets more"),
        ({"tell - base": (0.1, 0.0, 0.2), "sft-matched - base": (0.2, 0.1, 0.3)}, None),
        ({}, None),
    ],
)
def test_a_rival_is_charged_with_forgetting_only_where_it_is_significant(differences, says):
    forgetting = probe({"tell": 1.4, "sft-matched": 1.9, "base": 1.7}, differences)
    arms = {"base": 0.0, "tell": 0.9, "sft-matched": 0.9}
    gaps = {"tell - base": (0.9, 0.8, 0.95), "tell - sft-matched": (0.0, -0.05, 0.05)}
    text = one_sentence(verdict(make(arms, gaps, forgetting=forgetting)))
    assert (says in text) if says else ("loss" not in text)


def test_true_in_every_combination_of_real_intervals():
    """Arms of real rows in every order of strength: the sentence never claims a win the interval does not hold."""
    shares = {"weak": 5, "middle": 60, "near": 66, "strong": 95}
    rows = {name: mean_metric([1] * k + [0] * (100 - k), binary=True) for name, k in shares.items()}
    for base, tell, rival in itertools.product(shares, repeat=3):
        scores = {"base": rows[base], "tell": rows[tell], "sft-matched": rows[rival]}
        metrics = {
            "task": {"kind": "json", "primary": M},
            "arms": {arm: {M: estimate(metric, seed=0)} for arm, metric in scores.items()},
            "differences": {
                f"tell - {arm}": {M: difference(rows[tell], scores[arm], seed=0)} for arm in ("base", "sft-matched")
            },
        }
        text = one_sentence(verdict(metrics))
        (low, high), (rival_low, rival_high) = (
            metrics["differences"][f"tell - {arm}"][M]["ci"] for arm in ("base", "sft-matched")
        )
        assert ("TELL raises" in text) == (low > 0)
        assert ("TELL lost" in text) == (high < 0)
        assert ("does not clearly change" in text) == (low <= 0 <= high)
        assert ("TELL is ahead of step-matched SFT" in text) == (rival_low > 0)
        assert ("step-matched SFT does better" in text) == (rival_high < 0)
        assert ("does as well" in text) == (rival_low <= 0 <= rival_high and shares[rival] >= shares[tell])


@pytest.mark.parametrize(("gap", "said"), [((-0.06, -0.1, -0.02), True), ((-0.06, -0.14, 0.02), False)])
def test_a_rival_ahead_in_content_is_named_although_tell_wins_the_form(gap, said):
    metrics = make(
        {"tell": 0.99, "base": 0.0, "sft-matched": 0.94},
        {"tell - base": (0.99, 0.94, 1.0), "tell - sft-matched": (0.05, 0.01, 0.1)},
    )
    for arm, value in (("tell", 0.5), ("sft-matched", 0.56)):
        metrics["arms"][arm]["field_accuracy"] = rate(value, value - 0.04, value + 0.04)
    metrics["differences"]["tell - sft-matched"]["field_accuracy"] = rate(*gap)
    text = one_sentence(verdict(metrics))
    assert ("in field accuracy step-matched SFT is ahead of TELL (by 6 points, 2 to 10)" in text) is said
