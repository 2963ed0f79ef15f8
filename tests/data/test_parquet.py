"""Parquet values as plain text: types, class names, cells that cannot be read, files that grow."""

import datetime
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tell.data import bounds
from tell.data.formats import read_records
from tell.data.sources import load
from tell.errors import TellError


def answers(tmp_path, values, name="answer"):
    """The answers that a column of an Arrow array gives."""
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"question": [f"q{i}" for i in range(len(values))], name: values}), path)
    return [example.answer for example in load(str(path)).examples]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (pa.array([b"one"], pa.binary()), "one"),
        (pa.array([datetime.date(2024, 1, 2)], pa.date32()), "2024-01-02"),
        (pa.array([datetime.datetime(2024, 1, 2, 3)], pa.timestamp("us")), "2024-01-02T03:00:00"),
        (pa.array([Decimal("0.50")], pa.decimal128(5, 2)), "0.50"),
        (pa.array([0.1], pa.float32()), "0.1"),
        (pa.array([0.1], pa.float64()), "0.1"),
        (pa.array([[0.1, 2.5]], pa.list_(pa.float32())), "[0.1, 2.5]"),
        (
            pa.array([{"p": 0.1, "n": None}], pa.struct([("p", pa.float32()), ("n", pa.int64())])),
            '{"p": 0.1, "n": null}',
        ),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), '{"a": 1}'),
        (pa.array(["x"]).dictionary_encode(), "x"),
    ],
)
def test_types_as_plain_text(tmp_path, values, text):
    assert answers(tmp_path, values) == [text]


def test_nan_is_no_answer(tmp_path):
    with pytest.raises(TellError, match=r"f.parquet:2: has no answer"):
        answers(tmp_path, pa.array([0.5, float("nan")]))


def write_features(path, label, features):
    table = pa.table({"text": [f"t{i}" for i in range(len(label))], "label": label})
    note = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": features}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(note)}), path)
    return str(path)


NAMES = {"names": ["neg", "pos"], "_type": "ClassLabel"}


def test_class_labels_are_their_names(tmp_path):
    path = write_features(tmp_path / "f.parquet", pa.array([1, 0]), NAMES)
    assert [example.answer for example in load(path).examples] == ["pos", "neg"]
    path = write_features(tmp_path / "f.parquet", pa.array([1, -1]), NAMES)
    with pytest.raises(TellError, match=r"f.parquet:2: has no answer"):
        load(path)


@pytest.mark.parametrize("features", [[NAMES], {"feature": NAMES, "_type": "Sequence"}])
def test_class_labels_in_lists(tmp_path, features):
    path = write_features(tmp_path / "f.parquet", pa.array([[1], [0]]), features)
    assert [example.answer for example in load(path).examples] == ["pos", "neg"]


@pytest.mark.parametrize("note", ["not json", "5", '{"info": 5}', '{"info": {"features": {"label": 5}}}'])
def test_notes_of_another_form_are_passed_over(tmp_path, note):
    table = pa.table({"text": ["t"], "label": ["x"]}).replace_schema_metadata({"huggingface": note})
    pq.write_table(table, tmp_path / "f.parquet")
    assert load(str(tmp_path / "f.parquet")).examples[0].answer == "x"


def bad_text(*cells):
    data = b"".join(cells)
    offsets = pa.array([sum(map(len, cells[:i])) for i in range(len(cells) + 1)], pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(len(cells), offsets, pa.py_buffer(data))


FAR = pa.array([0, 2**60], pa.timestamp("us"))


@pytest.mark.parametrize(
    ("values", "what"), [(bad_text(b"ok", b"\x80"), "not UTF-8 (byte 0x80)"), (FAR, "cannot be read")]
)
def test_a_cell_that_cannot_be_read_costs_its_row_alone(tmp_path, values, what):
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "more": values}), path)
    assert len(load(str(path)).examples) == 2
    pq.write_table(pa.table({"question": ["a", "b"], "answer": values}), path)
    with pytest.raises(TellError) as caught:
        load(str(path))
    assert caught.value.where == f"{path}:2" and what in caught.value.what


def test_a_column_named_twice(tmp_path):
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["text", "label", "label"]), tmp_path / "f.parquet")
    with pytest.raises(TellError, match=r"f.parquet: names the column 'label' twice"):
        load(str(tmp_path / "f.parquet"))


def test_a_file_that_grows_beyond_all_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "FLOOR", 10**6)
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"prompt": ["x" * 10_000] * 5_000, "completion": ["y"] * 5_000}), path)
    with pytest.raises(TellError, match=r"f.parquet: has [\d,]+ bytes and decompresses to more than 1,000,000"):
        list(read_records(path))
