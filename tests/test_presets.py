"""What the presets leave to the data and the model."""

from __future__ import annotations

from tell.config import load_config
from tell.presets import general_tokens_for, learning_rate_for, repeat_for


def test_few_rows_are_seen_oftener() -> None:
    assert [repeat_for(n) for n in (1, 15, 30, 45, 60, 115, 230, 1000)] == [24, 24, 16, 16, 16, 8, 4, 4]
    times = [repeat_for(n) for n in range(1, 400)]
    assert times == sorted(times, reverse=True)


def test_general_data_stays_within_what_was_measured() -> None:
    assert [general_tokens_for(n) for n in (0, 1_000, 8_000, 60_000, 500_000)] == [0, 1e4, 3e4, 6e4, 5e5]


def test_an_amount_given_goes_over_that_of_the_task() -> None:
    config = load_config().general
    assert config.amount(60_000) == {"tokens": 6e4} and config.by_task
    ratio = load_config(flags={"general": {"ratio": 3.0}}).general
    assert ratio.amount(60_000) == {"ratio": 3.0} and ratio.by_task
    rows = load_config(flags={"general": {"rows": 7}}).general
    assert rows.amount(60_000) == {"rows": 7} and not rows.by_task
    none = load_config(flags={"general": {"ratio": 0}}).general
    assert none.amount(60_000) == {"ratio": 0} and not none.by_task
    assert load_config(flags={"preset": "paper"}).general.amount(60_000) == {"ratio": 20.0}


def test_rate_falls_with_size() -> None:
    for mixed, best in ((False, 1e-3), (True, 2e-3)):
        rates = [learning_rate_for(size, mixed=mixed) for size in (135_000_000, 1_000_000_000, 7_000_000_000)]
        assert rates[0] == best and best > rates[1] > rates[2] > best / 10


def test_the_papers_numbers_are_fixed() -> None:
    config = load_config(flags={"preset": "paper"})
    assert (config.train.learning_rate, config.mix.repeat, config.mix.order) == (1e-4, 1, "shuffle")
    assert (config.train.lora_r, config.train.lora_alpha, config.train.lora_dropout) == (8, 32, 0.05)
    drawn = config.generate
    assert (drawn.temperature, drawn.top_k, drawn.top_p, drawn.repetition_penalty) == (0.3, 20, 0.7, 1.05)
    assert not drawn.greedy


def test_modern_answers_with_the_likeliest_tokens() -> None:
    config = load_config().generate
    assert config.greedy and config.repetition_penalty == 1
    sampled = load_config(overrides=["generate.greedy=false", "generate.temperature=0.8"]).generate
    assert not sampled.greedy and sampled.temperature == 0.8


def test_modern_leaves_rate_and_repetition_open() -> None:
    config = load_config()
    assert config.train.learning_rate is None and config.mix.repeat is None
