"""One place decides how a metric is written: in the table, in the verdict and on the page."""

from __future__ import annotations

import pytest
from rich.console import Console

from tell.cli.tables import arms_table
from tell.names import NAMES, unit_of
from tell.report.glossary import METRICS, term
from tell.report.html_text import number
from tell.score.verdict import verdict


@pytest.mark.parametrize("metric", [*NAMES, "field:urgency", "my_score"])
def test_the_page_has_the_unit_of_the_screen(metric):
    assert term(metric).unit == unit_of(metric)
    assert metric not in METRICS or METRICS[metric].unit == unit_of(metric)


def test_a_users_own_metric_is_no_share():
    arms = {arm: {"my_score": {"value": value, "ci": [value - 1, value + 1], "n": 9}} for arm, value in WORTH.items()}
    gap = {"tell - base": {"my_score": {"value": 1.5, "ci": [1.0, 2.0], "n": 9}}}
    metrics = {"task": {"kind": "text", "primary": "my_score"}, "arms": arms, "differences": gap}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(arms_table(metrics))
    assert "7.500 [6.500, 8.500]" in console.export_text()
    assert (
        "from 6 (" in verdict(metrics) and "to 7.5" in verdict(metrics) and "%" not in verdict(metrics).split("95 %")[0]
    )
    assert number(7.5, term("my_score").unit) == "7.500"


WORTH = {"base": 6.0, "tell": 7.5}
