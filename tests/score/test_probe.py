import json
from collections import Counter
from importlib.resources import files

from tell.score.json_schema import parse_strict
from tell.score.probe import load_probe


def test_probe_is_diverse_short_and_clean():
    examples = load_probe()
    assert len(examples) == 64
    assert len({example.hash for example in examples}) == len({example.question for example in examples}) == 64
    assert {example.source for example in examples} == {"probe"}
    assert examples[11].origin == "general.jsonl:12"
    for example in examples:
        assert [turn.role for turn in example.messages] == ["user", "assistant"]
        for turn in example.messages:
            assert turn.content == turn.content.strip() != ""
        assert len(example.answer) < 350


def test_probe_rows_are_as_described():
    rows = [json.loads(line) for line in files("tell.score.probe").joinpath("general.jsonl").open(encoding="utf-8")]
    assert all(list(row) == ["instruction", "output", "category"] for row in rows)
    counts = Counter(row["category"] for row in rows)
    assert len(counts) >= 10 and min(counts.values()) >= 3 and max(counts.values()) <= 10


def test_no_probe_answer_is_in_json():
    for example in load_probe():
        try:
            value = parse_strict(example.answer)
        except ValueError:
            continue
        assert not isinstance(value, dict | list), example.origin
