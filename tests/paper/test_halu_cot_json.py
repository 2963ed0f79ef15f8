import gzip
import json
import os
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell.errors import TellError
from tell.files import read_jsonl
from tell.paper import ANCHOR, SCHEMA, OfflineTeacher, Replace, build_halu_cot_json
from tell.paper.halu_cot_json import subset
from tell.paper.halueval import HaluRow, read_rows
from tell.paper.offline import compose
from tell.paper.teacher import concluded, contradicts

DATA = Path(os.environ.get("TELL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "halu_cot_json"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no {DATA}: set TELL_DATA to the folder that holds halu_cot_json"
)

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)
halu_rows = st.builds(
    HaluRow,
    id=st.integers(0, 9999).map(str),
    query=texts,
    response=texts,
    label=st.sampled_from(["yes", "no"]),
    spans=st.lists(texts.filter(str.strip), max_size=3).map(tuple),
    origin=st.just("f:1"),
)


def row(query, response, label, *spans, id="1"):
    return HaluRow(id, query, response, label, spans, "f:1")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def upstream(n):
    return [
        {
            "ID": str(i),
            "user_query": f"Name {i} rivers.",
            "chatgpt_response": f"The Rhine, {i} times.",
            "hallucination": "yes" if i % 4 == 0 else "no",
            "hallucination_spans": [f"{i} times"] if i % 4 == 0 else [],
        }
        for i in range(n)
    ]


@given(halu_rows)
def test_a_thought_is_short_agrees_with_the_label_and_never_changes(halu):
    thought = compose(halu)
    assert thought == compose(halu) == OfflineTeacher().write([halu])[0].text
    assert thought.strip() and "\n" not in thought and len(thought) < 600
    # the verdict is ours: nothing quoted from the row can turn it round
    if "hallucinat" not in (halu.query + halu.response + "".join(halu.spans)).lower():
        assert not contradicts(thought, halu.label)


def test_a_thought_quotes_the_marked_passage_and_names_the_task():
    halu = row(
        "Name the author of Faust.", "Faust is a play. It was written by Friedrich Schiller.", "yes", "by Schiller"
    )
    halu = row(halu.query, halu.response, "yes", "It was written by Friedrich Schiller.")
    thought = compose(halu)
    assert "name the author of Faust" in thought and "'It was written by Friedrich Schiller'" in thought


@pytest.mark.parametrize(
    ("halu", "expected"),
    [
        (row("Draw a cat.", "Sorry, as an AI language model I cannot.", "yes", "I cannot."), "I cannot"),
        (row("Add 2 and 35.", "Adding both gives 41, which is odd.", "yes", "41"), "'41'"),
        (row("Make a table.", "| a | b |", "yes", "Incomplete"), "incomplete"),
        (row("Make a pie chart.", "- 10 %\n- 20 %", "yes", "where is the pie chart?"), "'where is the pie chart?'"),
        (row("Tell a story.", "No.", "yes"), "answer"),
        (row("List two trees.", "1. Oak\n2. Fir", "no"), "2 points"),
        (row("Write a poem.", "Roses are red.", "no"), "inven"),
        (row("What is rain?", "Water that falls from clouds.", "no"), "'What is rain?'"),
    ],
)
def test_kinds_of_rows(halu, expected):
    assert expected in compose(halu)


def test_a_long_passage_is_shortened_at_a_word():
    span = "The quick brown fox jumps over the lazy dog and " * 8
    thought = compose(row("Name a fox.", span + "runs. " * 90, "yes", span))
    quoted = re.search(r"'(The quick.*)\.\.\.'", thought)[1]
    assert len(quoted) <= 140 and span.startswith(quoted) and span[len(quoted)] == " "


@pytest.mark.parametrize(
    ("thought", "label"),
    [
        ("The date is wrong. Therefore it is a hallucination.", "yes"),
        ("There is no evidence for this, so it is a hallucination.", "yes"),
        ("It is not accurate and is hallucinated.", "yes"),
        ("No hallucination was found.", "no"),
        ("The response does not contain any hallucinations.", "no"),
        ("It isn't a hallucination.", "no"),
        ("It is free of hallucinations.", "no"),
        ("No part of it has to be judged a hallucination.", "no"),
        ("The hallucination label is 'no'.", "no"),
        ("Thus hallucination: yes", "yes"),
        ("Hallucinations are absent.", "no"),
        ("It might be a hallucination at first sight. All of it was checked and is right.", None),
    ],
)
def test_what_a_thought_concludes(thought, label):
    assert concluded(thought) == label


def test_build_from_halueval_rows(tmp_path):
    source = write(tmp_path / "general_data.json", upstream(3010))
    built = build_halu_cot_json(source, tmp_path / "out")
    assert (built.train, built.test, built.dropped, built.usage) == (3001, 9, [], None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "anchor.txt",
        "schema.json",
        "test.jsonl",
        "train.jsonl",
    ]
    assert (tmp_path / "out" / "anchor.txt").read_text() == ANCHOR
    schema = json.loads((tmp_path / "out" / "schema.json").read_text())
    for name, records in (("train", upstream(3001)), ("test", upstream(3010)[3001:])):
        made = read_jsonl(tmp_path / "out" / f"{name}.jsonl")
        assert [json.loads(line["completion"])["hallucination"] for line in made] == [
            r["hallucination"] for r in records
        ]
        for line, record in zip(made, records, strict=True):
            assert set(line) == {"prompt", "completion"}
            jsonschema.validate(json.loads(line["completion"]), schema)
            assert record["user_query"] in line["prompt"] and "Role and Goal" not in line["prompt"]
    assert built.lines()[0].startswith("3,001 training rows (2,250 no, 751 yes) and 9 test rows")


def test_the_schema_refuses_other_keys_and_labels():
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    good = {"thought": "x", "hallucination": "yes"}
    assert validator.is_valid(good)
    for bad in ({**good, "extra": 1}, {"thought": "x"}, {**good, "hallucination": "maybe"}, {**good, "thought": 1}):
        assert not validator.is_valid(bad)


def test_subsets_are_random_nested_and_seeded(tmp_path):
    rows, _ = read_rows(write(tmp_path / "h.jsonl", upstream(400)))
    ids = {n: [int(r.id) for r in subset(rows, n, 1)] for n in (15, 115)}
    assert set(ids[15]) < set(ids[115]) and ids[15] == sorted(ids[15])
    assert max(ids[15]) > 200 and ids[15] != [int(r.id) for r in subset(rows, 15, 2)]
    source = write(tmp_path / "h.jsonl", upstream(400))
    for name in ("a", "b"):
        build_halu_cot_json(source, tmp_path / name, rows=15, seed=1)
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()
    assert len(read_jsonl(tmp_path / "a" / "train.jsonl")) == 15


def test_the_papers_files_are_read(tmp_path):
    rows, _ = read_rows(write(tmp_path / "h.jsonl", upstream(6)))
    train = [{"prompt": f"{ANCHOR}\n\n{r.prompt}", "label": r.label, "spans": r.spans, "ID": r.id} for r in rows[:4]]
    test = [{"prompt": f"{ANCHOR}\n\n{r.prompt}", "response": r.label} for r in rows[3:]]
    with gzip.open(tmp_path / "train_inputs.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(record) + "\n" for record in train))
    test_file = write(tmp_path / "test.jsonl", test)
    built = build_halu_cot_json(tmp_path / "train_inputs.jsonl.gz", tmp_path / "out", test=test_file)
    assert (built.train, built.test) == (3, 3)
    assert built.notices == ["1 training rows are test rows too and were left out"]
    assert [line["prompt"] for line in read_jsonl(tmp_path / "out" / "train.jsonl")] == [r.prompt for r in rows[:3]]
    alone = build_halu_cot_json(tmp_path / "train_inputs.jsonl.gz", tmp_path / "alone")
    assert alone.test == 0 and "pass the test rows with --test" in alone.notices[0]
    assert not (tmp_path / "alone" / "test.jsonl").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"user_query": "q", "hallucination": "no"}, r"h\.jsonl:2: column chatgpt_response is missing \(found: user_q"),
        ({**upstream(1)[0], "hallucination": "maybe"}, r"h\.jsonl:2: hallucination is 'maybe'\. Make it yes or no"),
        ({**upstream(1)[0], "hallucination_spans": "x"}, r"h\.jsonl:2: hallucination_spans is not a list"),
        ({"prompt": "Translate this.", "label": "no"}, r"h\.jsonl:2: prompt is not one of Halu-CoT-JSON"),
        ({"prompt": 3, "label": "no"}, r"h\.jsonl:2: column prompt is int, not text"),
        ({"text": "x"}, r"column prompt is missing"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_written(tmp_path, record, message):
    source = write(tmp_path / "h.jsonl", [*upstream(1), record])
    with pytest.raises(TellError, match=message):
        build_halu_cot_json(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dataset_is_not_overwritten_unasked(tmp_path):
    source = write(tmp_path / "h.jsonl", upstream(5))
    build_halu_cot_json(source, tmp_path / "out")
    with pytest.raises(TellError, match="already has a dataset"):
        build_halu_cot_json(source, tmp_path / "out", rows=2)
    assert len(read_jsonl(tmp_path / "out" / "train.jsonl")) == 5
    assert build_halu_cot_json(source, Replace(tmp_path / "out"), rows=2).train == 2
    for rows in (0, 6):
        with pytest.raises(TellError, match="--rows: "):
            build_halu_cot_json(source, tmp_path / "other", rows=rows)
    with pytest.raises(TellError, match="is a file, not a folder"):
        build_halu_cot_json(source, source)


@needs_data
def test_anchor_and_prompt_make_the_published_prompts():
    ours, _ = read_rows(DATA / "halueval_general.jsonl.gz")
    published = []
    for name in ("train_inputs", "test"):
        with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            published += [json.loads(line) for line in lines]
    assert len(ours) == len(published) == 4507
    for mine, theirs in zip(ours, published, strict=True):
        assert f"{ANCHOR}\n\n{mine.prompt}" == theirs["prompt"]
        assert mine.label == theirs.get("label", theirs.get("response"))
        assert list(mine.spans) == theirs.get("spans", list(mine.spans))


@needs_data
def test_every_thought_of_the_real_rows(tmp_path):
    rows, _ = read_rows(DATA / "halueval_general.jsonl.gz")
    thoughts = [compose(row) for row in rows]
    assert not [t for t, row in zip(thoughts, rows, strict=True) if contradicts(t, row.label)]
    assert len(set(thoughts)) > 0.99 * len(rows) and max(map(len, thoughts)) < 500
    built = build_halu_cot_json(DATA / "halueval_general.jsonl.gz", tmp_path / "out", rows=115)
    assert (built.train, built.test) == (115, 1506)
    gold = [json.loads(line["completion"])["hallucination"] for line in read_jsonl(tmp_path / "out" / "test.jsonl")]
    assert (gold.count("yes"), gold.count("no")) == (282, 1224)
