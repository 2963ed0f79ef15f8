"""Agreement with human scores, against scipy and counts by hand; and the check on WMT21."""

from __future__ import annotations

import gzip
import importlib.util
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from news import ENGLISH, write_wmt
from tell.errors import TellError
from tell.score.means import mean_metric

ROOT = Path(__file__).parents[2]
CHECKS = ROOT / "recipes/checks"
SCRIPT = CHECKS / "wmt21_metrics.py"
_SPEC = importlib.util.spec_from_file_location("correlation", CHECKS / "correlation.py")
correlation = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(correlation)
DATA = Path(os.environ.get("TELL_DATA") or ROOT.parent / "shared" / "data") / "wmt21_news"


@pytest.fixture
def judged():
    """Scores of a metric, raw and standardised judgements of 60 units by 5 systems, a fifth of them missing."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(60, 5)) + np.linspace(-1, 1, 5)
    raw = np.clip(50 + 20 * truth + 10 * rng.normal(size=truth.shape), 0, 100)
    raw[rng.random(raw.shape) < 0.2] = np.nan
    scores = truth + rng.normal(size=truth.shape)
    return scores, raw, (raw - 50) / 20


def found(scores, raw, z, **options):
    return correlation.correlations([mean_metric(column) for column in scores.T], raw, z, **{"samples": 200, **options})


def test_values_are_those_of_scipy_and_of_counting(judged):
    scores, raw, z = judged
    result = found(scores, raw, z)
    there = np.isfinite(raw)
    assert result["pearson"]["value"] == pytest.approx(stats.pearsonr(scores[there], z[there])[0], abs=1e-6)
    assert result["pearson"]["n"] == there.sum()
    system, people = scores.mean(axis=0), np.nanmean(z, axis=0)
    assert result["system_pearson"]["value"] == pytest.approx(stats.pearsonr(system, people)[0], abs=1e-6)
    agree = [(system[a] > system[b]) == (people[a] > people[b]) for a, b in combinations(range(5), 2)]
    assert result["pairwise_accuracy"] == {**result["pairwise_accuracy"], "value": np.mean(agree), "n": 10}
    counts = [0, 0]
    for unit in range(60):
        for a, b in combinations(range(5), 2):
            if abs(raw[unit, a] - raw[unit, b]) >= 25:
                counts[int((raw[unit, a] > raw[unit, b]) != (scores[unit, a] > scores[unit, b]))] += 1
    assert result["kendall_like"]["n"] == sum(counts)
    assert result["kendall_like"]["value"] == pytest.approx((counts[0] - counts[1]) / sum(counts), abs=1e-6)
    for part in result.values():
        assert part["ci"][0] <= part["value"] <= part["ci"][1]


def test_a_perfect_and_a_reversed_metric(judged):
    raw = np.nan_to_num(judged[1], nan=50.0)
    for sign in (1, -1):
        result = found(sign * raw, raw, (raw - 50) / 20)
        assert [part["value"] for part in result.values()] == [sign, sign, sign, max(sign, 0)]
        assert all(part["ci"] == [part["value"]] * 2 for part in list(result.values())[:3])


def test_ties_of_the_metric_count_against_it(judged):
    _, raw, z = judged
    result = found(np.zeros_like(raw), raw, z)
    assert result["kendall_like"]["value"] == -1
    assert result["pearson"]["value"] is None and result["pearson"]["ci"] == [None, None]


def test_noise_is_told_from_a_signal_by_the_interval(judged):
    scores, raw, z = judged
    noise = found(np.random.default_rng(5).normal(size=scores.shape), raw, z, samples=500)
    signal = found(scores, raw, z, samples=500)
    for name in ("kendall_like", "pearson"):
        assert noise[name]["ci"][0] < 0 < noise[name]["ci"][1] and signal[name]["ci"][0] > noise[name]["ci"][1]


def test_the_order_of_units_and_systems_changes_nothing(judged):
    scores, raw, z = judged
    rows, columns = np.random.default_rng(1).permutation(60), np.random.default_rng(2).permutation(5)
    moved = found(scores[rows][:, columns], raw[rows][:, columns], z[rows][:, columns])
    for name, part in found(scores, raw, z).items():
        assert moved[name]["value"] == pytest.approx(part["value"], abs=1e-6) and moved[name]["n"] == part["n"]


@pytest.mark.parametrize("shape", [(1, 5), (60, 1), (59, 5)])
def test_shapes_that_do_not_match(judged, shape):
    scores, raw, z = judged
    with pytest.raises(TellError, match="scores of shape"):
        found(
            scores[: shape[0], : shape[1]],
            *(p[:, : shape[1]] if shape[0] == 59 else p[: shape[0], : shape[1]] for p in (raw, z)),
        )


def run_script(*argv):
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, argv)], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_the_check_reads_scores_in_the_order_of_document_ids(tmp_path):
    """A system that people and metrics agree on wholly: good in the segments that come first by id."""
    spoil = {"paper.10": [0, 1], "paper.9": [0, 0]}  # which segments the worse system spoils
    worse = {
        doc: [("xyz " * 4 if bad else line) for line, bad in zip(ENGLISH[doc], spoil[doc], strict=True)]
        for doc in ENGLISH
    }
    write_wmt(tmp_path / "newstest2021.is-en.all.xml.gz", "is-en", systems={"Best.1": ENGLISH, "Worse": worse})
    flags = [*spoil["paper.10"], *spoil["paper.9"]]
    lines = ["SYS SID RAW.SCR Z.SCR N"]
    for name, bad in (("Best.1.0", [0] * 4), ("Worse.1", flags)):
        lines += [f"{name} {i} {20 if b else 90} {-1 if b else 1} 1 " for i, b in enumerate(bad, 1)]
    scores = tmp_path / "ad-seg-scores-is-en.csv.gz"
    scores.write_bytes(gzip.compress("\n".join(lines).encode()))
    code, out, _ = run_script(tmp_path, "--samples", 20)
    rows = [line for line in out.splitlines() if line.startswith("| ") and "metric" not in line]
    assert code == 0 and [row.split(" | ")[0] for row in rows] == ["| chrF++", "| BLEU", "| ROUGE-L"]
    assert all(row.split(" | ")[1].startswith("1.000") for row in rows)  # the one pair 25 points apart
    assert out.splitlines()[-1].startswith("n: Kendall-like 1, Pearson 8, Pearson, documents 4")
    scores.write_bytes(gzip.compress("\n".join([*lines, "Other.2 1 5 5 1"]).encode()))
    code, _, err = run_script(tmp_path)
    assert code == 2 and "ad-seg-scores-is-en.csv.gz:10: is no judgement of these outputs" in err


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}: set TELL_DATA to the folder that holds wmt21_news")
def test_people_agree_with_chrf_on_wmt21():
    code, out, err = run_script(DATA, "--samples", 20, "--documents", 6)
    assert code == 0, err
    chrf = next(line for line in out.splitlines() if line.startswith("| chrF++"))
    pearson = float(chrf.split(" | ")[2].split()[0])
    assert 0.1 < pearson < 0.6  # about 0 where segments are counted in the file's own order
