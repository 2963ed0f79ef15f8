"""From an engine's answers to the figures that are printed."""

from __future__ import annotations

import numpy as np
import pytest
from bench.decode import summary as decoding_summary
from bench.rows import Prompts, Rows
from bench.train import summary, turn_speed, turn_tokens

from tell.errors import TellError

LENGTHS = np.array([1, 2, 4, 8, 16, 32])
ROWS = Rows(np.zeros(63, np.int32), np.concatenate([[0], np.cumsum(LENGTHS)]), LENGTHS // 2, np.zeros(6, bool))
CEILING = {"linear_parameters": 100, "output_parameters": 63, "gflops": 1e-5}


def test_a_turn_has_the_tokens_of_its_own_rows():
    assert turn_tokens(ROWS, 2, [1, 2]) == [1 + 2, 4 + 8 + 16 + 32]
    assert turn_tokens(ROWS, 1, [2, 1, 3]) == [3, 4, 56]


def test_an_engine_fed_other_tokens_is_refused():
    assert turn_speed({"tokens": 60, "seconds": 4.0}, 60) == 15
    with pytest.raises(TellError, match="64 tokens where a turn has 60"):
        turn_speed({"tokens": 64, "seconds": 4.0}, 60)


def test_training_is_summed_up_by_the_median_turn_and_its_share_of_the_ceiling():
    turns = [
        {"tokens": 12, "seconds": seconds, "peak_rss_mb": peak, "trainable_parameters": 7}
        for seconds, peak in ((1.0, 300.0), (4.0, 500.0), (2.0, 400.0))
    ]
    result = {"turns": turns, "setting": {}, "tries": [], "versions": {}}
    out = summary(result, [12, 12, 12], ROWS, CEILING)
    assert (out["tokens_per_s"], out["spread"], out["peak_rss_mb"]) == (6, [3, 12], 500)
    trained = 63 - (0 + 1 + 2 + 4 + 8 + 16)
    assert out["ceiling_share"] == 6 * (4 * 100 + 4 * trained) / 1e4
    with pytest.raises(TellError, match="12 tokens where a turn has 13"):
        summary(result, [12, 13, 12], ROWS, CEILING)


def test_decoding_is_summed_up_over_new_tokens():
    turns = [{"seconds": s, "answers": [[1], [2, 2, 2]], "peak_rss_mb": 10.0 * s} for s in (1.0, 2.0)]
    prompts = Prompts([[1, 2, 3], [4]], [1, 3])
    out = decoding_summary({"turns": turns, "setting": {}, "tries": []}, prompts, [[1], [2, 2, 3]])
    assert (out["tokens_per_s"], out["spread"]) == (3, [2, 4])
    assert (out["same_answers_as_tell"], out["peak_rss_mb"]) == (0.5, 20)
