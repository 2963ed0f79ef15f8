"""`tell gate`: outcomes by the ends of intervals, and exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tell.cli.main import run as tell_command
from tell.errors import TellError
from tell.score.decide import MOST_ROWS, decide, paired_interval, rows_needed, scaled_interval, share_interval
from tell.score.intervals import difference, wilson
from tell.score.means import mean_metric
from tell.verbs.gate import Limit, NotWorse, gate
from verbs.scored_run import scored_run

RIGHT_80 = [1, 1, 1, 1, 0] * 40


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return scored_run(tmp_path / "new", {"tell": RIGHT_80, "base": [0, 1] * 100}).root


@pytest.mark.parametrize(
    ("limit", "passed", "code"),
    [(0.7, True, 0), (0.9, False, 1), (0.78, None, 3), (0.82, None, 3)],
)
def test_a_limit_is_judged_by_the_intervals_end(run: Path, limit: float, passed: bool | None, code: int):
    found = gate(run, [Limit("accuracy", limit)])
    (outcome,) = found["conditions"]
    low, high = outcome["ci"]
    assert found["passed"] is outcome["passed"] is passed and found["exit_code"] == code
    assert decide(low, high, limit) is passed
    assert tell_command(["gate", str(run), "--min", f"accuracy={limit}"]) == code
    if passed is None:  # so many rows decide it, and one fewer do not
        n = outcome["rows_needed"]
        assert n > 200
        assert decide(*wilson(0.8 * n, n), limit) is not None and decide(*wilson(0.8 * (n - 1), n - 1), limit) is None


def test_an_estimate_at_the_limit_is_never_decided(run: Path):
    (outcome,) = gate(run, [Limit("accuracy", 0.8)])["conditions"]
    assert outcome["passed"] is None and outcome["rows_needed"] is None and "no number of rows" in outcome["text"]


def test_one_failure_outweighs_what_cannot_be_told(run: Path):
    both = [Limit("accuracy", 0.78), Limit("accuracy", 0.95)]
    assert gate(run, both)["exit_code"] == 1
    assert gate(run, [Limit("accuracy", 0.78), Limit("accuracy", 0.5)])["exit_code"] == 3


def test_another_arm(run: Path):
    assert gate(run, [Limit("accuracy", 0.6)], arm="base")["exit_code"] == 1


@pytest.mark.parametrize(
    ("old", "margin", "code"),
    [
        ([1, 1, 0, 0, 0] * 40, 0.0, 0),  # better by 40 points
        ([1] * 200, 0.0, 1),  # worse by 20 points
        ([1] * 200, 0.3, 0),  # worse, but within the margin
        (RIGHT_80, 0.0, 3),  # equal: no number of rows shows that it is not worse at all
        (RIGHT_80, 0.02, 0),
    ],
)
def test_not_worse_than_is_paired(tmp_path: Path, run: Path, old: list[int], margin: float, code: int):
    before = scored_run(tmp_path / "old", {"tell": old}).root
    found = gate(run, [NotWorse(str(before), margin)])
    assert found["exit_code"] == code
    (outcome,) = found["conditions"]
    gap = difference(mean_metric(RIGHT_80, binary=True), mean_metric(old, binary=True), seed=0)
    assert list(outcome["ci"]) == gap["ci"] and outcome["n"] == 200
    assert tell_command(["gate", str(run), "--not-worse-than", f"{before}:{margin}"]) == code


def test_only_shared_rows_are_paired_and_said(tmp_path: Path, run: Path):
    before = scored_run(tmp_path / "old", {"tell": [1] * 100}, first=150).root
    (outcome,) = gate(run, [NotWorse(str(before), 0.5)])["conditions"]
    assert outcome["n"] == 50 and outcome["value"] == pytest.approx(-0.2)
    assert "50 test rows in common of 200 and 100" in outcome["text"]


def test_runs_without_a_common_row_are_refused(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    before = scored_run(tmp_path / "old", {"tell": [1] * 100}, first=500).root
    assert tell_command(["gate", str(run), "--not-worse-than", str(before)]) == 2
    assert "no test row in common" in capsys.readouterr().err


def test_a_metric_of_the_corpus_is_scored_again_from_the_answers(tmp_path: Path):
    texts = [scored_run(tmp_path / name, {"tell": [1, 0] * 20}, kind="text").root for name in ("a", "b")]
    (outcome,) = gate(texts[0], [NotWorse(str(texts[1]), 0.5)])["conditions"]
    assert outcome["passed"] is True and outcome["value"] == 0.0


def test_junit_and_json(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "deep" / "gate.xml"
    limits = [part for limit in (0.7, 0.78, 0.95) for part in ("--min", f"accuracy={limit}")]
    assert tell_command(["gate", str(run), *limits, "--junit", str(out), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [c["passed"] for c in found["conditions"]] == [True, None, False] and found["exit_code"] == 1
    suite = ElementTree.parse(out).getroot()
    assert suite.attrib == {"name": "tell gate", "tests": "3", "failures": "1", "errors": "1"}
    assert [[child.tag for child in case] for case in suite] == [[], ["error"], ["failure"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no condition is given"),
        (["--min", "accurcy=0.9"], "no metric 'accurcy'; did you mean accuracy"),
        (["--min", "accuracy"], "is not a number"),
        (["--min", "accuracy=nan"], "is not a number"),
        (["--min", "accuracy=90"], "between 0 and 1. Write a share, e.g. accuracy=0.9"),
        (["--min", "accuracy=0.9", "--arm", "icl"], "has no scores of the arm icl"),
        (["--min", "accuracy=0.9", "--arm", "tel"], "unknown arm 'tel'"),
        (["--not-worse-than", "nowhere"], "no such run folder"),
        (["--not-worse-than", "nowhere:-1"], "margin is negative"),
        (["--not-worse-than", "nowhere:x"], "is not a number"),
    ],
)
def test_bad_input_ends_in_one_line(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert tell_command(["gate", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_without_scores_or_with_damaged_ones_is_refused(tmp_path: Path, run: Path):
    (run / "predictions" / "tell.jsonl").unlink()
    with pytest.raises(TellError, match="keeps no answers of tell"):
        gate(run, [NotWorse(str(run))])
    for text in ("[]", "{", '{"arms": {"tell": {"accuracy": {"value": "high"}}}}', '{"arms": 3}'):
        (run / "metrics.json").write_text(text)
        with pytest.raises(TellError, match=re.compile("not|damaged|no value|no scores")):
            gate(run, [Limit("accuracy", 0.5)])
    (run / "metrics.json").unlink()
    with pytest.raises(TellError, match=r"no metrics\.json"):
        gate(run, [Limit("accuracy", 0.5)])


def test_rows_needed_shrink_the_interval_to_the_limit():
    n = rows_needed(scaled_interval(2.0, 1.0, 3.0, 100), 1.9)
    assert n == 10_000  # the lower end has to come ten times nearer
    assert rows_needed(share_interval(1.0), 0.9) == 35  # n / (n + 1.96 ** 2) >= 0.9
    assert rows_needed(share_interval(0.5), 0.5) is None and MOST_ROWS >= 10**7
    rng = np.random.default_rng(0)
    a, b = (mean_metric((rng.random(100) < p).astype(float), binary=True) for p in (0.9, 0.85))
    gap = difference(a, b, seed=0)
    interval = paired_interval(a, b, gap)
    assert interval(100) == pytest.approx(gap["ci"], abs=1e-6)
