"""What is shown steers no terminal, is of bounded length, and gives no secret away."""

from __future__ import annotations

from tell.errors import TellError
from tell.shown import LONGEST_LINE, MOST_REASONS, brief, clean, left_out, one_line, shorten, without_secrets


def test_sequences_and_marks_are_gone_and_languages_stay():
    assert clean("a\x1b]0;title\x07b\u202ec\x9bd\ud800e\n\tf") == "a]0;titlebcde\n\tf"
    assert clean("naïve 東京 \U0001f600 Ω") == "naïve 東京 \U0001f600 Ω"
    assert one_line("a\n b\x1b[2J\u2066c") == "a b [2J c"


def test_length_is_bounded_and_both_ends_are_kept():
    assert shorten("abc", 10) == "abc"
    short = shorten("start" + "x" * 10**6 + "end.", 100)
    assert len(short) <= 100 and short.startswith("start") and short.endswith("end.")
    assert len(one_line("y " * 10**6)) <= LONGEST_LINE
    error = TellError("value " + "9" * 10**6, where="f" * 10**5, remedy="Mend it. " * 10**4)
    assert len(str(error)) < LONGEST_LINE and "Mend it." in str(error)


def test_values_are_shown_on_one_line_that_can_be_written():
    assert brief({"a": ["é", 1, None]}) == '{"a": ["é", 1, null]}' and brief("é\nb") == "é b" and brief(None) == "null"
    cut = brief(["x" * 100, "last"])
    assert len(cut) <= 40 and cut.startswith('["xxx') and cut.endswith('"last"]')
    brief("half of a pair \ud83d").encode()


def test_keys_and_passwords_are_left_out():
    assert without_secrets("https://me:pw@host/v1 says sk-123456", "sk-123456") == "https://***@host/v1 says ***"
    assert without_secrets("http://host/a@b", None) == "http://host/a@b"


def test_rows_left_out_are_counted_by_reason_whatever_its_numbers():
    rows = [(f"a.jsonl:{n}", f"{2049 + n:,} tokens, longer than max_length 2,048") for n in range(1, 501)]
    rows.insert(0, ("a.jsonl:9", "the answer is empty"))
    assert left_out(rows) == [
        "500 rows left out, the first: a.jsonl:1: 2,050 tokens, longer than max_length 2,048",
        "1 row left out: a.jsonl:9: the answer is empty",
    ]
    assert left_out([]) == []


def test_reasons_are_bounded():
    rows = [(f"a.jsonl:{n}", f"the token {'x' * n} has no embedding") for n in range(MOST_REASONS + 3)]
    lines = left_out([*rows, rows[-1]])
    assert len(lines) == MOST_REASONS + 1 and lines[-1] == "and 3 more left out, for 3 other reasons"
