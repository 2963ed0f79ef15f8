"""The number that an answer to a word problem ends with."""

from decimal import Decimal

import pytest

from tell.score.arithmetic import last_number, solved
from tell.score.custom import CustomScorer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72", 72),
        ("#### 1,234.50 dollars, not 7", "1234.5"),
        ("She has 3 left, so the answer is -4.", -4),
        ("none", None),
        ("5 apples ####", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_solved_as_a_scorer():
    metrics = CustomScorer("tell.evaluate.arithmetic:solved").score(["so 72", "71", "many"], ["#### 72"] * 3)
    assert metrics["solved"].per_row.tolist() == [1.0, 0.0, 0.0]


def test_a_reference_without_a_number():
    with pytest.raises(ValueError, match="has no number"):
        solved(["1"], ["one"])
