"""Drawings and text helpers on their own."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell.number_text import show, show_count, show_duration, show_interval, show_power
from tell.report.html_text import HIDDEN, plain, visible, word_diff
from tell.report.svg import Scale, gaps, interval_strip, loss_chart, nice, outcome_figure, smooth, stream_figure


def svg(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_scale_covers_values_with_round_ticks(values: list[float]) -> None:
    scale = Scale.over(values)
    slack = 1e-6 * max(1.0, *map(abs, values))
    assert scale.low - slack <= min(values) and max(values) <= scale.high + slack
    assert 2 <= len(scale.ticks) <= 8
    assert all(0 <= scale.at(v) <= 100 for v in values)


def test_nice_steps() -> None:
    assert [nice(x) for x in (0.21, 1.0, 1.1, 3.0, 7.0, 180)] == [0.5, 1, 2, 5, 10, 200]


@pytest.mark.parametrize("n", [100, 1440, 6000, 50_000])
def test_stream_draws_every_task_row_and_stays_small(n: int) -> None:
    rng = np.random.default_rng(0)
    task = np.zeros(n, dtype=bool)
    task[rng.choice(n, n // 20, replace=False)] = True
    step = np.arange(n) // 16 + 1
    picture, how = stream_figure(task, step)
    root = svg(picture)
    assert len(picture) < 60_000
    rects = [r for r in root.iter("rect") if "class" not in r.attrib]
    if step[-1] <= 160:
        assert len(rects) == task.sum()
    assert rects and how
    for rect in rects:
        assert float(rect.get("x")) >= 0 and float(rect.get("x")) + float(rect.get("width")) <= 100.01
    assert f"{task.sum():,} task rows among {n:,} rows" in root.find("desc").text


def test_stream_cell_lies_at_its_step_and_place() -> None:
    task = np.zeros(40, dtype=bool)
    task[[0, 25]] = True  # first row of step 1; row 5 of the third step of 10
    picture, _ = stream_figure(task, np.arange(40) // 10 + 1)
    cells = [(float(r.get("x")), r.get("y")) for r in svg(picture).iter("rect") if "class" not in r.attrib]
    assert [(round(x // 25), y) for x, y in cells] == [(0, "0"), (2, "5")]


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_longest_gap_is_the_longest(flags: list[bool]) -> None:
    text = gaps(np.array(flags))
    if any(flags) and not all(flags):
        longest = max(len(run) for run in "".join("t" if f else "." for f in flags).split("t"))
        assert f"is {longest:,} row" in text
    else:
        assert "stretch" not in text


def test_loss_chart_is_xml_with_escaped_names_and_skips_gaps() -> None:
    series = {"<b>&task": ([1, 2, 3, 4, 5], [2.0, 1.5, float("nan"), 1.0, 0.9]), "one": ([1], [1.0])}
    root = svg(loss_chart(series, key="k", title="a <i> title", y=Scale.over([2.0], hold=[0.0])))
    assert root.find("title").text == "a <i> title" and "<b>&task: 2.00 at step 1" in root.find("desc").text
    assert len(list(root.iter("circle"))) == 5 and len(list(root.iter("polyline"))) == 1


def test_long_loss_chart_stays_small() -> None:
    steps = list(range(1, 20_001))
    assert (
        len(loss_chart({"task": (steps, [1.0] * 20_000)}, key="k", title="t", y=Scale.over([1.0], hold=[0.0]))) < 50_000
    )


def test_smoothing_keeps_constants_and_length() -> None:
    assert np.allclose(smooth(np.full(50, 1.25)), 1.25)
    assert len(smooth(np.arange(7.0))) == 7


def test_interval_strip_places_dot_and_span() -> None:
    root = svg(interval_strip(0.5, [0.25, 0.75], Scale(0, 1, (0.0, 1.0))))
    span = next(e for e in root.iter("line") if e.get("class") == "span")
    assert (span.get("x1"), span.get("x2"), next(root.iter("circle")).get("cx")) == ("25.0%", "75.0%", "50.0%")
    assert not [e for e in svg(interval_strip(None, None, Scale(0, 1, (0.0,)))).iter("circle")]


def test_outcomes_of_many_rows_are_binned() -> None:
    picture = outcome_figure({"tell": np.ones(5000), "x<": np.full(5000, np.nan)}, "t")
    assert len([r for r in svg(picture).iter("rect") if "opacity" in r.attrib]) == 400


@given(st.text(), st.text())
def test_diff_holds_both_texts(a: str, b: str) -> None:
    marked = word_diff(a, b)
    if marked is not None:
        shown = str(marked)
        assert re.sub(r"<del>.*?</del>|</?ins>", "", shown, flags=re.S) == str(visible_escaped(b))
        assert re.sub(r"<ins>.*?</ins>|</?del>", "", shown, flags=re.S) == str(visible_escaped(a))


def visible_escaped(text: str) -> str:
    from markupsafe import escape

    return escape(visible(text))


def test_diff_marks_words_and_gives_up_on_strangers() -> None:
    assert word_diff("a big red dog", "a small red dog") == "a <del>big</del><ins>small</ins> red dog"
    assert word_diff("a b c d e", "a x y d e") == "a <del>b c</del><ins>x y</ins> d e"
    assert word_diff('{"a": 1}', "Thank you for reaching out to us today") is None


@given(st.text(st.characters(codec=None, categories=("Cc", "Cf", "Cs", "Ll", "Po"))))
def test_no_hidden_character_survives(text: str) -> None:
    assert not HIDDEN.search(visible(text)) and not HIDDEN.search(plain(text))


def test_joiners_of_emoji_and_persian_survive() -> None:
    assert visible("👩\u200d💻 می\u200cخواهم") == "👩\u200d💻 می\u200cخواهم"


def test_numbers_as_people_read_them() -> None:
    assert show(0.934, "share") == "93.4\u202f%"
    assert show(-0.012, "points", sign=True) == "−1.2"
    assert [show(x, "points", sign=True) for x in (0.0, -0.0001, 0.0001)] == ["0.0"] * 3
    assert show(54.26, "score") == "54.3" and show(1.70449) == "1.704"
    assert show(None) == show(float("nan")) == show(True) == "–"
    assert (
        show_interval([0.9, 0.96], "share") == "90.0 to 96.0" and show_interval(None) == show_interval([None, 1]) == ""
    )
    assert show_power(1.53e14) == "1.5 × 10¹⁴" and show_power(9.99e13) == "1.0 × 10¹⁴" and show_power(1234) == "1,234"
    assert [show_duration(s) for s in (2.34, 48, 59.7, 210.4, 7500)] == [
        "2.3 s",
        "48 s",
        "1 min 0 s",
        "3 min 30 s",
        "2 h 5 min",
    ]
    assert show_count(52002) == "52,002" and show_count(20.1) == "20.10"
