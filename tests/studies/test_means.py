"""Means over seeds and rows, their intervals and paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from studies.made import outcome, study_of
from tell.score.intervals import difference, newcombe_paired, wilson
from tell.score.means import mean_metric
from tell.studies.measured import Number
from tell.studies.stats.seed_means import Bootstrap
from tell.studies.stats.shared_rows import SharedRows


def bootstrap(outcomes, samples: int = 1000, seed: int = 0) -> Bootstrap:
    return Bootstrap(study_of(outcomes), samples, seed)


def coin(rng, share: float, n: int = 100) -> np.ndarray:
    return (rng.uniform(size=n) < share).astype(float)


def test_the_mean_is_over_seeds():
    group = [outcome([1, 1, 1, 0], seed=1), outcome([0, 0], seed=2)]
    draws = bootstrap(group).of(group, "m")
    assert draws.value == 0.375 and draws.by_seed == {1: 0.75, 2: 0.0} and draws.rows == 6
    found = draws.summary()
    assert found["n"] == 6 and found["seeds"] == 2 and found["ci"][0] <= 0.375 <= found["ci"][1]
    assert bootstrap(group).of(group, "other") is None


def test_one_seed_is_the_bootstrap_over_rows():
    """Against the textbook standard error of a share."""
    rng = np.random.default_rng(1)
    group = [outcome(coin(rng, 0.4, 400))]
    found = bootstrap(group, 4000).of(group, "m")
    p = found.value
    assert np.std(found.draws) == pytest.approx(np.sqrt(p * (1 - p) / 400), rel=0.08)


def test_spread_between_seeds_is_not_understated():
    """Seeds that agree within and differ between: the standard error of a mean of n values."""
    values = [0.2, 0.5, 0.8]
    n = 1000
    group = [outcome((np.arange(n) < v * n).astype(float), seed=i) for i, v in enumerate(values)]
    draws = bootstrap(group, 4000).of(group, "m").draws
    assert np.std(draws) == pytest.approx(np.std(values, ddof=1) / np.sqrt(3), rel=0.06)


def test_rows_that_seeds_share_are_one_row():
    """Three seeds on the same rows, right on the same ones, know no more about rows than one seed does.

    On rows of their own they do, by less than the square root of 3: rows make seeds differ too, which counts twice.
    """
    rng = np.random.default_rng(2)
    right = coin(rng, 0.5, 200)
    shared = [outcome(right, seed=s, rows="same") for s in range(3)]
    apart = [outcome(right, seed=s) for s in range(3)]
    wide, narrow = (np.std(bootstrap(g, 4000).of(g, "m").draws) for g in (shared, apart))
    one = np.std(bootstrap(shared[:1], 4000).of(shared[:1], "m").draws)
    assert wide == pytest.approx(one, rel=0.08) and narrow == pytest.approx(np.sqrt(2 / 3) * one, rel=0.08)


@pytest.mark.parametrize(("between", "least"), [(0.0, 0.98), (0.1, 0.84)])
def test_coverage(between, least):
    """Share of simulated studies, three seeds of 100 rows, whose interval holds the truth."""
    rng = np.random.default_rng(3)
    held, n = 0, 80
    for i in range(n):
        group = [outcome(coin(rng, 0.6 + rng.normal(0, between)), seed=s) for s in range(3)]
        low, high = bootstrap(group, 300, i).of(group, "m").summary()["ci"]
        held += low <= 0.6 <= high
    assert held / n >= least


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rows_that_all_agree_have_wilson_intervals(value):
    group = [outcome([value] * 20, seed=s) for s in range(3)]
    assert bootstrap(group).of(group, "m").summary()["ci"] == pytest.approx(wilson(int(60 * value), 60), abs=1e-6)
    other = [outcome([1 - value] * 20, seed=s, arm="sft") for s in range(3)]
    gap = bootstrap([*group, *other]).difference(group, other, "m")
    expected = newcombe_paired(np.full(60, value), np.full(60, 1 - value))
    assert gap["value"] == 2 * value - 1 and gap["ci"] == pytest.approx(expected, abs=1e-6)


def test_differences_are_paired_by_row_and_seed():
    """An arm that is right on the same rows and a few more: the difference is known far better than either."""
    rng = np.random.default_rng(4)
    low = [coin(rng, share, 200) for share in (0.3, 0.5, 0.7)]
    high = [np.maximum(right, np.arange(200) % 20 == 0) for right in low]
    a = [outcome(right, seed=s) for s, right in enumerate(high)]
    b = [outcome(right, seed=s, arm="sft") for s, right in enumerate(low)]
    draws = bootstrap([*a, *b])
    gap = draws.difference(a, b, "m")
    assert gap["value"] == pytest.approx(
        np.mean([h.mean() - r.mean() for h, r in zip(high, low, strict=True)]), abs=1e-6
    )
    assert gap["ci"][0] > 0 and np.ptp(gap["ci"]) < 0.2 * np.ptp(draws.of(a, "m").summary()["ci"])
    assert gap["seeds"] == 3 and draws.difference(a[:1], b[1:], "m") is None
    assert draws.difference(a[:2], b, "m")["seeds"] == 2
    assert draws.difference(a, a, "m")["ci"] == [0, 0]


def test_numbers_without_rows_have_their_own_spread():
    """Seeds measure on the same text, so its noise does not average out over them."""
    group = [outcome([1], seed=s, **{"probe loss": Number(2.0, 0.1)}) for s in range(3)]
    found = bootstrap(group, 4000).of(group, "probe")
    assert found.value == 2.0 and found.rows == 0 and np.std(found.draws) == pytest.approx(0.1, rel=0.1)


def test_rows_a_metric_does_not_apply_to_weigh_nothing():
    """An optional field: one seed has the intervals of the run's own report, over the rows that have the field."""
    rng = np.random.default_rng(7)
    a, b = coin(rng, 0.9), coin(rng, 0.5)
    a[50:] = b[40:] = np.nan
    groups = [[outcome(right, arm=arm, rows="same")] for right, arm in ((a, "tell"), (b, "sft"))]
    draws = bootstrap([*groups[0], *groups[1]])
    found = draws.of(groups[0], "m").summary()
    assert found["n"] == 50 and found["ci"] == pytest.approx(wilson(int(np.nansum(a)), 50), abs=1e-6)
    gap, report = draws.difference(*groups, "m"), difference(mean_metric(a), mean_metric(b), seed=0)
    assert {key: gap[key] for key in report} == report and report["n"] == 40 and gap["seeds"] == 1
    none = [outcome(np.full(100, np.nan), arm="base", rows="same")]
    assert bootstrap([*groups[0], *none]).difference(groups[0], none, "m")["value"] is None


def probe(losses, base, *, keep: bool = True, arm: str = "tell", seed: int = 1, rows: str = "probe"):
    """An outcome with losses on general rows and their changes; ``keep`` the rows themselves."""

    def number(values) -> Number:
        spread = float(np.std(values, ddof=1) / np.sqrt(len(values)))
        kept = SharedRows("probe", np.array([f"{rows}-{i}" for i in range(len(values))]), mean_metric(values))
        return Number(float(np.mean(values)), spread, None, kept if keep else None)

    change = losses - base
    return outcome([1, 0], arm=arm, seed=seed, **{"probe loss": number(losses), "probe loss change": number(change)})


def test_losses_on_the_same_general_rows_are_paired():
    """Two arms that change each row alike, up to little noise: what they differ by is known far better than either."""
    rng = np.random.default_rng(4)
    base, alike = rng.normal(2.3, 0.6, 200), rng.normal(0.3, 0.3, 200)
    gaps = []
    for keep in (True, False):
        a, b = (
            probe(base + alike + shift + rng.normal(0, 0.02, 200), base, keep=keep, arm=arm)
            for arm, shift in (("tell", 0.0), ("sft", 0.1))
        )
        gaps.append(bootstrap([a, b], 4000).difference([a], [b], "probe"))
        assert gaps[-1]["value"] == pytest.approx(-0.1, abs=0.01) and gaps[-1]["n"] == 0
    paired, apart = (float(np.ptp(gap["ci"])) for gap in gaps)
    assert paired == pytest.approx(2 * 1.96 * 0.02 * np.sqrt(2 / 200), rel=0.1)  # of a mean of 200 paired differences
    assert apart == pytest.approx(2 * 1.96 * 0.3 * np.sqrt(2 / 200), rel=0.15)  # of two means of 200 changes


def test_general_rows_are_drawn_once_for_all_seeds_that_share_them():
    rng = np.random.default_rng(5)
    base = rng.normal(2.3, 0.6, 300)
    same = [probe(base, base, seed=s) for s in range(3)]
    apart = [probe(base, base, seed=s, rows=f"held out of {s}") for s in range(3)]
    draws = [bootstrap(group, 4000).of(group, "probe").draws for group in (same, apart)]
    one = np.std(base) / np.sqrt(300)
    assert np.std(draws[0]) == pytest.approx(one, rel=0.05)
    assert np.std(draws[1]) == pytest.approx(one * np.sqrt(2 / 3), rel=0.08)  # as of test rows: seeds' rows count twice


def test_general_rows_do_not_move_with_as_many_test_rows():
    values = np.random.default_rng(6).normal(size=100)
    kept = SharedRows("probe", np.array([f"g{i}" for i in range(100)]), mean_metric(values))
    group = [outcome((values > 0).astype(float), **{"probe loss": Number(float(values.mean()), 0.1, None, kept)})]
    drawn = bootstrap(group, 4000)
    assert abs(np.corrcoef(drawn.of(group, "m").draws, drawn.of(group, "probe").draws)[0, 1]) < 0.06


def test_draws_stay_within_what_a_share_can_be():
    group = [outcome([1] * 19 + [0], seed=0), outcome([1] * 20, seed=1), outcome([1] * 10 + [0] * 10, seed=2)]
    draws = bootstrap(group).of(group, "m").draws
    assert draws.min() >= 0 and draws.max() <= 1


def test_a_seed_that_is_missing_leaves_the_others():
    whole = [outcome([1, 0] * 10, seed=s) for s in range(3)]
    part = [outcome([1, 0] * 10, seed=s, arm="sft") for s in (0, 2)]
    found = bootstrap([*whole, *part]).of(part, "m")
    assert found.value == 0.5 and 0 < np.isnan(found.draws).mean() < 0.1  # resamples of the third seed alone
    assert np.isfinite(found.summary()["ci"]).all()


def test_the_same_seed_draws_the_same():
    group = [outcome([1, 0, 0], seed=s) for s in range(2)]
    assert bootstrap(group, seed=5).of(group, "m").summary() == bootstrap(group, seed=5).of(group, "m").summary()


@pytest.mark.parametrize(("name", "held"), [("linear_probe", True), ("silhouette", False)])
def test_a_share_without_rows_stays_within_0_and_1(name, held):
    """By the run's standard error alone it would not."""
    outcomes = [outcome([1, 0], seed=seed) for seed in (42, 43)]
    for each, value in zip(outcomes, (0.99, 0.01), strict=True):
        each.measured.numbers[name] = Number(value, 0.05)
    draws = bootstrap(outcomes).of(outcomes, name).draws
    assert (draws.min() >= 0 and draws.max() <= 1) == held


def test_one_seed_of_yes_and_no_has_the_intervals_of_a_run():
    """Wilson's, and Newcombe's for the difference of the same rows: a bootstrap of few rows is too narrow."""
    right = np.array([1.0] * 28 + [0.0] * 2), np.array([1.0] * 27 + [0.0] * 3)
    a, b = outcome(right[0], rows="same"), outcome(right[1], rows="same", arm="sft")
    draws = bootstrap([a, b])
    assert draws.of([a], "m").summary()["ci"] == pytest.approx(wilson(28, 30), abs=1e-6)
    assert draws.difference([a], [b], "m")["ci"] == pytest.approx(newcombe_paired(*right), abs=1e-6)
    other = outcome(right[1], rows="other", arm="sft")  # nothing to pair
    ci = bootstrap([a, other]).difference([a], [other], "m")["ci"]
    assert ci[0] < 1 / 30 < ci[1] and ci != pytest.approx(newcombe_paired(*right), abs=1e-6)


def test_only_seeds_that_both_have_are_compared():
    """A metric that one side lacks under a seed takes that seed out of both."""
    values = (0.9, 0.9, 0.0)
    a = [outcome([1] * 20, seed=s, score=Number(v, 0.0)) for s, v in enumerate(values)]
    b = [outcome([1] * 20, seed=s, arm="sft", score=Number(v, 0.0)) for s, v in enumerate(values[:2])]
    b.append(outcome([1] * 20, seed=2, arm="sft"))
    gap = bootstrap([*a, *b]).difference(a, b, "score")
    assert gap["value"] == 0 and gap["seeds"] == 2


def test_a_seed_whose_answers_are_gone_counts_by_its_number():
    group = [outcome([1, 0] * 10, seed=0), outcome([1], seed=1, m=Number(0.7, 0.1))]
    object.__setattr__(group[1].measured, "metrics", {})
    found = bootstrap(group).of(group, "m")
    assert found.value == pytest.approx(0.6) and found.by_seed == {0: 0.5, 1: 0.7}


def test_one_seed_without_rows_keeps_the_interval_of_the_run():
    """A probe that is right on all 16 rows: Wilson's interval lies below it, not around it."""
    group = [outcome([1], linear_probe=Number(1.0, 0.05, (0.806, 1.0)))]
    assert bootstrap(group).of(group, "linear_probe").summary()["ci"] == [0.806, 1.0]


def test_losses_on_general_text_are_compared_as_changes():
    """The level's own spread is that of the text, which both sides share."""
    a, b = (
        outcome([1], arm=arm, **{"probe loss": Number(v, 0.2), "probe loss change": Number(v - 2, 0.01)})
        for arm, v in (("tell", 1.7), ("sft", 2.0))
    )
    draws = bootstrap([a, b])
    gap = draws.difference([a], [b], "probe")
    assert gap == draws.difference([a], [b], "probe loss change") and gap["value"] == pytest.approx(-0.3)
    assert np.ptp(gap["ci"]) < 0.1
