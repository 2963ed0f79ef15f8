"""The example tasks hold what their READMEs say."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from tell.anchor.anchor import Anchor
from tell.data.example import Message

EXAMPLES = Path(__file__).parents[2] / "examples"
KEYS = ["category", "urgency", "sentiment", "order_id", "products", "summary"]
PRODUCTS = {"tent", "backpack", "stove", "headlamp", "jacket", "sleeping bag", "boots", "bottle", "app", "gift card"}
PRODUCTS |= {"membership"}


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


def answers(name: str) -> list[dict]:
    return [json.loads(row["completion"]) for row in read(f"support/{name}.jsonl")]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads((EXAMPLES / "support/schema.json").read_text(encoding="utf-8"))


def test_schema_demands_every_key_and_no_other(schema):
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    answer = answers("train")[0]
    assert list(schema["properties"]) == schema["required"] == KEYS
    assert validator.is_valid(answer)
    for key in KEYS:
        assert not validator.is_valid({k: v for k, v in answer.items() if k != key})
    assert not validator.is_valid({**answer, "note": "x"})
    assert not validator.is_valid({**answer, "category": "refund"})
    assert not validator.is_valid({**answer, "order_id": "48213"})


@pytest.mark.parametrize(("name", "least"), [("train", 64), ("test", 104)])
def test_support_rows_are_valid(schema, name, least):
    rows = read(f"support/{name}.jsonl")
    assert len(rows) >= least
    validator = Draft202012Validator(schema)
    for number, row in enumerate(rows, 1):
        where = f"{name}.jsonl:{number}"
        assert list(row) == ["prompt", "completion"], where
        answer = json.loads(row["completion"])
        assert row["completion"] == json.dumps(answer, ensure_ascii=False), where
        assert list(answer) == KEYS, where
        assert not list(validator.iter_errors(answer)), where
        assert set(answer["products"]) <= PRODUCTS, where
        assert len(set(answer["products"])) == len(answer["products"]), where
        assert answer["summary"].endswith(".") and len(answer["summary"].split()) <= 12, where
        assert answer["order_id"] is None or str(answer["order_id"]) in row["prompt"], where


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize("key", ["category", "urgency", "sentiment"])
def test_no_label_rules_the_file(schema, name, key):
    counts = Counter(answer[key] for answer in answers(name))
    values = schema["properties"][key]["enum"]
    assert set(counts) == set(values)
    assert max(counts.values()) < 0.6 * sum(counts.values())
    assert min(counts.values()) > 0.4 * sum(counts.values()) / len(values)


@pytest.mark.parametrize("name", ["train", "test"])
def test_readme_counts_are_those_of_the_file(schema, name):
    readme = (EXAMPLES / "support/README.md").read_text(encoding="utf-8")
    values = [value for key in KEYS[:3] for value in schema["properties"][key]["enum"]]
    head, *_ = re.findall(r"^\| \| (billing.*) \|$", readme, re.M)
    line, *_ = re.findall(rf"^\| {name} \| (.*) \|$", readme, re.M)
    counts = Counter(answer[key] for answer in answers(name) for key in KEYS[:3])
    told = dict(zip(head.split(" | "), map(int, line.split(" | ")), strict=True))
    assert told == {value: counts[value] for value in values}


@pytest.mark.parametrize(("task", "column"), [("support", "prompt"), ("reviews", "text"), ("titles", "prompt")])
def test_no_duplicates_within_or_across_files(task, column):
    train, test = ([row[column] for row in read(f"{task}/{name}.jsonl")] for name in ("train", "test"))
    folded = [" ".join(text.lower().split()) for text in train + test]
    assert len(set(folded)) == len(folded)
    for (a, left), (b, right) in product([(t, shingles(t)) for t in train], [(t, shingles(t)) for t in test]):
        assert not left & right, (a, b)  # not even five words in a row


def test_the_anchor_names_every_key_and_value(schema):
    text = (EXAMPLES / "support/anchor.txt").read_text(encoding="utf-8").strip()
    for key, rule in schema["properties"].items():
        assert key in text
        assert all(value in text for value in rule.get("enum", []))
    (turn,) = Anchor(text).apply([Message("user", read("support/test.jsonl")[0]["prompt"])])
    assert turn.content.count(text) == 1
    # A mail that quoted the anchor would hold it twice.
    assert not any(text in row["prompt"] for name in ("train", "test") for row in read(f"support/{name}.jsonl"))


@pytest.mark.parametrize("name", ["train", "test"])
def test_reviews_are_balanced(name):
    rows = read(f"reviews/{name}.jsonl")
    assert all(list(row) == ["text", "label"] for row in rows)
    assert Counter(row["label"] for row in rows) == {"positive": 8, "negative": 8, "mixed": 8}


@pytest.mark.parametrize("name", ["train", "test"])
def test_titles_are_headlines(name):
    rows = read(f"titles/{name}.jsonl")
    assert len(rows) == 20
    for row in rows:
        assert list(row) == ["prompt", "completion"]
        assert 2 <= len(row["completion"].split()) <= 8
        assert not row["completion"].endswith(".")
        assert 30 <= len(row["prompt"].split()) <= 60, len(row["prompt"].split())
