"""Runs paired on the test rows they share: differences, and the rows that flipped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from report.sample import make_sample
from tell.cli.main import run as tell_command
from tell.files import read_jsonl, write_jsonl
from tell.folder import RunFolder
from tell.report.compare import compare, paired
from tell.score.intervals import difference
from tell.score.means import mean_metric
from verbs.scored_run import scored_run

OLD = [1, 1, 0, 0, 1, 0] * 10
NEW = [1, 1, 1, 0, 0, 1] * 10


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    return [
        scored_run(tmp_path / "old", {"base": [0] * 60, "tell": OLD}),
        scored_run(tmp_path / "new", {"tell": NEW, "icl": [0] * 60}),
    ]


def test_differences_and_flips_of_the_arms_that_both_have(runs: list[RunFolder]):
    (found,) = paired(runs)
    assert found.names == ("new", "old") and found.rows == 60 and found.of == (60, 60)
    assert [arm for arm, _ in found.grid.rows] == ["tell"]
    cells = dict(zip([spec.name for spec in found.grid.terms], found.grid.rows[0][1], strict=True))
    expected = difference(mean_metric(NEW, binary=True), mean_metric(OLD, binary=True), seed=0)
    assert cells["accuracy"].value == expected["value"] and list(cells["accuracy"].ci) == expected["ci"]
    assert {"macro_f1", "valid_label"} <= set(cells)
    assert (found.gained, found.lost, found.right) == (20, 10, "right") and len(found.flips) == 30
    rows = [i for i in range(60) if NEW[i] != OLD[i]]
    assert [flip.question for flip in found.flips] == [f"mail {i}" for i in rows]
    for flip, i in zip(found.flips, rows, strict=True):
        assert flip.better == ("new" if NEW[i] else "old")
        assert {run: answer == flip.reference for run, answer, _ in flip.answers} == {
            "new": bool(NEW[i]),
            "old": bool(OLD[i]),
        }


def test_page_and_terminal_show_them(runs: list[RunFolder], capsys: pytest.CaptureFixture[str]):
    assert tell_command(["report", *(str(run.root) for run in runs)]) == 0
    printed = capsys.readouterr()
    path = Path(printed.out.strip())
    assert path.name == "compare.html"
    assert "60 shared test rows" in printed.err and "new is right on 20 rows where old is not, old on 10" in printed.err
    html = path.read_text(encoding="utf-8")
    section = html[html.index('id="p1"') : html.index('id="m1"')]
    assert "60 shared test rows" in section and section.count("<details") == 30
    assert "is right on 20 rows" in re.sub(r"\s+", " ", section) and "<script" not in html


def test_only_shared_rows_count(tmp_path: Path, runs: list[RunFolder]):
    later = scored_run(tmp_path / "later", {"tell": [1] * 40}, first=50)
    (found,) = paired([runs[0], later])
    assert (found.rows, found.of, found.gained, found.lost) == (10, (40, 60), 10 - sum(OLD[50:]), 0)
    assert "10 shared test rows of 40 and 60" in compare([runs[0], later])


def test_runs_without_common_rows_are_not_paired(tmp_path: Path, runs: list[RunFolder], capsys):
    other = scored_run(tmp_path / "other", {"tell": [1] * 40}, first=500)
    (found,) = paired([runs[0], other])
    assert not found.rows and not found.grid.rows and not found.flips
    assert "no test row in common" in compare([runs[0], other])
    assert tell_command(["report", str(runs[0].root), str(other.root)]) == 0
    assert "no test row in common" in capsys.readouterr().err


def test_equal_test_rows_are_kept_apart(tmp_path: Path, runs: list[RunFolder]):
    for run in runs:  # the last two rows become one row, twice
        rows = read_jsonl(run.prediction("tell"))
        rows[-1] |= {"hash": rows[-2]["hash"]}
        write_jsonl(run.prediction("tell"), rows)
    (found,) = paired(runs)
    assert found.rows == 60 and (found.gained, found.lost) == (20, 10)


def test_scores_between_0_and_1_are_better_or_worse(tmp_path: Path):
    seeds = {"a": 3, "b": 4}
    runs = [make_sample(tmp_path / n, arms=("base", "tell"), rows=40, seed=s) for n, s in seeds.items()]
    for run in runs:  # the sample's hostile rows were scored later than its metrics
        scores = [row["scores"]["field_accuracy"] for row in read_jsonl(run.prediction("tell"))]
        metrics = json.loads(run.metrics.read_text())
        metrics["task"] = {"kind": "json", "primary": "field_accuracy"}
        metrics["arms"]["tell"]["field_accuracy"] = {"value": sum(scores) / 40, "ci": [0, 1], "n": 40}
        run.metrics.write_text(json.dumps(metrics))
    (found,) = paired(runs)
    assert found.right == "better" and found.gained + found.lost == len(found.flips) > 0
    gaps = [abs(a - b) for flip in found.flips for (_, _, a), (_, _, b) in [flip.answers]]
    assert gaps == sorted(gaps, reverse=True)
    html = compare(runs)
    assert "<script>alert" not in html and "<img src=x" not in html
