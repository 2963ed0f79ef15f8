"""Several tables of one source as one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tell.data.example import Example
from tell.rows.row_table import joined
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import RowRules, tokenize


def test_joined_tables_are_as_tokenised_at_once(tiny_model):
    chat = ChatTokenizer(tiny_model("llama"))
    rows = [Example.pair(f"What is {i}? " * (i + 1), f"It is {i}.", origin=f"rows:{i}") for i in range(7)]
    rules = RowRules(max_length=95)

    def table(part):
        return tokenize(part, chat, source="task", rules=rules)

    whole = table(rows)
    assert whole.dropped and len(whole) > 2
    for cuts in ([0, 7], [0, 3, 7], [0, 0, 2, 7], [0, 6, 7]):  # parts without a row, and with dropped ones alone
        found = joined([table(rows[a:b]) for a, b in pairwise(cuts)])
        for name in ("hashes", "origins", "tokens", "trained", "unit", "ids", "mask", "starts"):
            assert np.array_equal(getattr(found, name), getattr(whole, name)), (cuts, name)
        assert found.dropped == whole.dropped and found.source == "task"
        assert all(np.array_equal(found.row(i)[0], whole.row(i)[0]) for i in range(len(whole)))
