"""The general rows on board: complete, apart from each other, and long enough for a run of the default size."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files

import pytest

from tell.data.builtin import PROMPTS, WITNESS, load_builtin, load_prompts, load_witness
from tell.run.self_written import is_good
from tell.score.probe import load_probe


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    text = files("tell.data.builtin").joinpath(PROMPTS).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_there_are_enough(rows):
    loaded = load_builtin()
    assert len(load_prompts()) == len(rows) >= 1000 and len(loaded.examples) >= 1000 and len(load_witness()) == 200
    assert {example.source for example in loaded.examples} == {"general"}
    assert sum(len(e.question.split()) + len(e.answer.split()) for e in loaded.examples) > 75_000  # 1.09e5 tokens


def test_witness_and_probe_are_in_no_mix(rows):
    mixed = {words(row["prompt"]) for row in rows}
    assert len(mixed) == len(rows)
    assert not mixed & {words(e.question) for e in [*load_witness(), *load_probe()]}


def test_they_are_varied(rows):
    kinds, languages = (Counter(row[key] for row in rows) for key in ("kind", "language"))
    assert len(kinds) >= 12 and max(kinds.values()) < 0.2 * len(rows)
    assert len(languages) >= 10 and 0.7 < languages["en"] / len(rows) < 0.95
    lengths = sorted(len(row["prompt"].split()) for row in rows)
    assert lengths[len(lengths) // 4] < 12 and lengths[-len(lengths) // 20] > 50
    openings = Counter(row["prompt"].split()[0].lower() for row in rows)
    assert max(openings.values()) < 0.08 * len(rows)


def test_answers_pass_the_filters_that_others_must_pass():
    for example in [*load_builtin().examples, *load_witness()]:
        assert is_good(example.question, example.answer) in (None, "instruction too short"), example.origin


def test_origins_name_the_line(rows):
    example = load_builtin().examples[-1]
    line = rows[int(example.origin.split(":")[1]) - 1]
    assert (line["prompt"], line["completion"]) == (example.question, example.answer)
    assert load_witness()[0].origin == f"{WITNESS}:1"
