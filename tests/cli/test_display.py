"""Progress on a terminal and in a log file."""

from __future__ import annotations

import io
import re
import threading

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tell.cli.display import PlainDisplay, TerminalDisplay, clock, make_console, short


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0"), (7, "7"), (0.25, "0.2"), (1234, "1,234"), (12_345, "12.3k"), (4.56e6, "4.56M"), (1.36e14, "136T")],
)
def test_short_numbers(amount, text):
    assert short(amount) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42, "0:42"), (725, "12:05"), (3723, "1:02:03")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_plain_lines_hold_amount_and_loss():
    stream = io.StringIO()
    display = PlainDisplay(stream, every=0)
    with display.bar("train tell", 200, "tokens") as advance:
        advance(150, "loss task 0.31, general 1.40")
        advance(50)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("train tell: 150/200 tokens, ")
    assert "tokens/s" in lines[0] and " left, loss task 0.31, general 1.40" in lines[0]
    assert lines[-1].startswith("train tell: 200/200 tokens, ") and "in 0:00, loss task 0.31" in lines[-1]


def test_time_left_that_the_caller_knows_counts_down(monkeypatch):
    """Not the pace of pieces of unlike size."""
    now = [100.0]
    monkeypatch.setattr("tell.cli.display.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with PlainDisplay(stream, every=0).bar("study map", 10, "cells") as advance:
        now[0] += 10
        advance(1, left=600)
        now[0] += 90
        advance(0, "train tell 50%")
        now[0] += 900
        advance(0)
    assert stream.getvalue().splitlines()[:3] == [
        "study map: 1/10 cells, 10:00 left",
        "study map: 1/10 cells, 8:30 left, train tell 50%",
        "study map: 1/10 cells, 0:00 left, train tell 50%",
    ]


@pytest.fixture
def now(monkeypatch):
    """A clock that tests move; no thread speaks on its own."""
    times = [100.0]
    monkeypatch.setattr("tell.cli.display.time.monotonic", lambda: times[0])
    monkeypatch.setattr("tell.cli.display.threading.Thread.start", lambda self: None)
    return times


def seconds_left(line: str) -> int:
    minutes, seconds = re.search(r"(\d+):(\d\d) left", line).groups()
    return 60 * int(minutes) + int(seconds)


def test_silent_work_moves_every_five_seconds(now):
    """The last amount took 40 s of 160 s; from then on nothing reports for a minute."""
    stream = io.StringIO()
    display = PlainDisplay(stream)
    with display.bar("answer test rows", 128, "answers") as advance:
        now[0] += 40
        advance(32)
        for _ in range(240):
            now[0] += 0.25
            display.tick()
    lines = stream.getvalue().splitlines()[:-1]
    assert len(lines) == 13 and all("32/128 answers" in line for line in lines)
    assert [seconds_left(line) for line in lines] == list(range(120, 59, -5))


def test_work_of_unknown_length_tells_how_long_it_takes(now):
    stream = io.StringIO()
    display = PlainDisplay(stream)
    with display.bar("load the model", None):
        for _ in range(3):
            now[0] += 5
            display.tick()
    assert stream.getvalue().splitlines() == [
        *(f"load the model: 0:{seconds:02}" for seconds in (5, 10, 15)),
        "load the model: in 0:15",
    ]


def test_the_innermost_bar_speaks_and_the_outer_one_after_it(now):
    stream = io.StringIO()
    display = PlainDisplay(stream)
    with display.bar("outer", 10):
        with display.bar("inner", 4) as advance:
            now[0] += 5
            advance(1)
        now[0] += 5
        display.tick()
    lines = stream.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["inner", "inner", "outer", "outer"]


def test_a_thread_speaks_while_the_work_is_silent():
    heard = threading.Event()
    display = PlainDisplay(io.StringIO(), every=0.01)
    display.note = lambda text: heard.set()
    with display.bar("compile", None):
        assert heard.wait(10)
        assert display._ended is not None
    assert display._ended is None  # it has been told to end


def test_parts_of_a_row_make_whole_ones(now):
    stream = io.StringIO()
    with PlainDisplay(stream, every=0).bar("answer", 3, "answers") as advance:
        for _ in range(30):
            now[0] += 1
            advance(0.1)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("answer: 0.1/3 answers") and lines[-1].startswith("answer: 3/3 answers")
    left = [seconds_left(line) for line in lines[:-1]]
    assert left == sorted(left, reverse=True) and left[0] == 29 and left[-1] == 0


def test_a_terminal_bar_falls_by_itself(now):
    display, stream = terminal()
    with display.bar("train tell", 200, "tokens") as advance:
        now[0] += 10
        advance(100)
        display._progress.refresh()
        now[0] += 4
        stream.truncate(0)
        display._progress.refresh()
        assert "0:06 left" in stream.getvalue()


def test_plain_display_is_quiet_about_brief_work():
    stream = io.StringIO()
    display = PlainDisplay(stream)
    with display.bar("tokenise", 10) as advance:
        advance(10)
    display.note("a note")
    assert stream.getvalue() == "a note\n"


def terminal() -> tuple[TerminalDisplay, io.StringIO]:
    stream = io.StringIO()
    return TerminalDisplay(Console(file=stream, force_terminal=True, width=100)), stream


def test_bars_show_amount_and_information():
    display, stream = terminal()
    with display.bar("train tell", 200, "tokens") as advance:
        advance(150, "loss task 0.31, general 1.40")
        display._progress.refresh()
    for part in ("train tell", "150/200 tokens", "tokens/s", "left", "loss task 0.31, general 1.40"):
        assert part in stream.getvalue()


def test_bars_nest_and_the_cursor_comes_back():
    display, stream = terminal()
    with pytest.raises(KeyboardInterrupt), display.bar("outer", None), display.bar("inner", 3) as advance:
        advance(1)
        raise KeyboardInterrupt
    text = stream.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # show after hide
    with display.bar("again", 2) as advance:  # a display outlives an interrupted bar
        advance(2)


def test_brackets_in_notes_are_no_markup():
    display, stream = terminal()
    display.note("dropped [bold]row[/bold] [3]")
    assert "[bold]row[/bold] [3]" in stream.getvalue()


def test_names_and_notes_steer_no_terminal_and_end(capsys):
    PlainDisplay().note("task: a\x1b]0;owned\x07.jsonl " + "x" * 10**6)
    err = capsys.readouterr().err
    assert "\x1b" not in err and len(err) < 3000
    console = make_console()
    console.file = stream = io.StringIO()
    table = Table(title="[/] \x1b[2J")
    table.add_column("[red]f1")
    table.add_row("[/x] :smile: \ud800")
    console.print(table)
    console.print(Text("a\x9b b"))
    shown = stream.getvalue()
    assert "[/] " in shown and "[red]f1" in shown and "[/x] :smile:" in shown
    assert not any(char in shown for char in "\x1b\x9b\ud800")
