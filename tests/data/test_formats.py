import csv
import gzip
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import tell
from tell.data.file_read import FileRead
from tell.data.formats import column_names, read_records
from tell.errors import TellError

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
rows = st.lists(st.fixed_dictionaries({"prompt": text, "completion": text}), min_size=1, max_size=8)


def encode(records, name):
    """The records as bytes in the format of the file name."""
    kind = name.removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)[1]
    if kind == "jsonl":
        out = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    elif kind == "json":
        out = json.dumps(records, ensure_ascii=False, indent=1).encode()
    elif kind == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), buffer)
        out = buffer.getvalue()
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(
            buffer, ["prompt", "completion"], delimiter="," if kind == "csv" else "\t", quoting=csv.QUOTE_ALL
        )
        writer.writeheader()
        writer.writerows(records)
        out = buffer.getvalue().encode()
    if name.endswith(".gz"):
        return gzip.compress(out)
    return zstandard.compress(out) if name.endswith(".zst") else out


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.csv", "a.tsv", "a.csv.zst", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(records=rows)
def test_every_format_returns_what_was_written(tmp_path_factory, name, records):
    path = tmp_path_factory.mktemp("round") / name
    path.write_bytes(encode(records, name))
    assert [record for _, record in read_records(path)] == records


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_mark_is_tolerated(tmp_path, name):
    records = [{"prompt": "é", "completion": "ü"}]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + encode(records, name))
    assert [record for _, record in read_records(tmp_path / name)] == records


def test_numbers_are_lines_in_text_and_rows_in_parquet(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": 2}\r\n{"a": "\u2028"}\n', encoding="utf-8")
    assert [n for n, _ in read_records(lines)] == [1, 3, 4]
    array = tmp_path / "a.json"
    array.write_text('\n[\n  {"a": 1},\n  {\n   "a": 2}\n  , {"a": 3}]')
    assert list(read_records(array)) == [(3, {"a": 1}), (4, {"a": 2}), (6, {"a": 3})]
    table = tmp_path / "a.csv"
    table.write_text('a,b\n"one\ntwo",2\nthree,4\n')
    assert list(read_records(table)) == [(2, {"a": "one\ntwo", "b": "2"}), (4, {"a": "three", "b": "4"})]
    pq.write_table(pa.table({"a": [5, 6]}), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == [(1, {"a": 5}), (2, {"a": 6})]


def test_object_that_holds_one_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"version": 1, "names": ["x"],\n "data": [\n  {"a": [1, 2]},\n  {"a": []}\n ]}')
    assert list(read_records(path)) == [(3, {"a": [1, 2]}), (4, {"a": []})]
    path.write_text('{"train": [{"a": 1}], "test": [{"a": 2}]}')
    with pytest.raises(TellError, match=r"2 arrays of objects \(train, test\)"):
        list(read_records(path))


def test_json_lines_and_json_under_each_others_names(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert list(read_records(path)) == [(1, {"a": 1}), (2, {"a": 2})]
    path = tmp_path / "a.jsonl"
    path.write_text('[{"a": 1},\n {"a": 2}]')
    assert list(read_records(path)) == [(1, {"a": 1}), (2, {"a": 2})]
    path = tmp_path / "b.json"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}')
    assert [n for n, _ in read_records(path)] == [1]


def test_compressed_files_joined_end_to_end(tmp_path):
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(compress(b'{"a": 1}\n') + compress(b'{"a": 2}\n'))
        assert [record for _, record in read_records(tmp_path / name)] == [{"a": 1}, {"a": 2}]


def test_semicolons_of_spreadsheets(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text;label\nhello, you;1\n")
    assert list(read_records(path)) == [(2, {"text": "hello, you", "label": "1"})]


@pytest.mark.parametrize("line", ["sep=;\r", '"sep=;"', "SEP=;"])
def test_the_separator_that_excel_writes_into_the_first_line(tmp_path, line):
    path, found = tmp_path / "a.csv", FileRead()
    path.write_text(f"{line}\nid;text;a,b\n1;hello, you;2\n", newline="")
    assert list(read_records(path, found)) == [(3, {"id": "1", "text": "hello, you", "a,b": "2"})]
    assert found.notices == ["a.csv: the first line says that cells are separated by ';'"]
    path.write_text(f"{line}\n")
    with pytest.raises(TellError, match="has no rows"):
        list(read_records(path))


def test_nan_of_pandas_is_null(tmp_path):
    for name, text in (("a.jsonl", '{"a": NaN, "b": {"c": NaN}}'), ("a.json", '[{"a": NaN, "b": {"c": NaN}}]')):
        (tmp_path / name).write_text(text)
        assert [record for _, record in read_records(tmp_path / name)] == [{"a": None, "b": {"c": None}}]


SIX = 'text\tlabel\nLine 1.\tpos\n"I will be back, she said.\tneg\nLine 3.\tpos\nThe door closed."\tpos\n'


def read(path, text):
    path.write_text(text)
    found = FileRead()
    return [list(record.values()) for _, record in read_records(path, found)], found.notices


def test_quotes_of_a_tsv_that_are_text(tmp_path):
    path = tmp_path / "a.tsv"
    rows, told = read(path, SIX)
    assert rows[1] == ['"I will be back, she said.', "neg"] and len(rows) == 4
    assert told == ["a.tsv: quotes are read as part of the text, since every line has its cells without them"]
    assert read(path, 'a\tb\n"so" he said\tx\n') == ([['"so" he said', "x"]], told)
    assert read(path, 'a\tb\n"one\ntwo"\tx\n"three ""3"""\ty\n') == ([["one\ntwo", "x"], ['three "3"', "y"]], [])
    assert read(path, 'a\tb\n"one"\tx\n') == ([["one", "x"]], [])
    assert read(path, '"a"\t"b"\n""\t"\n\t"\n') == ([["", "\n\t"]], [])  # by a writer that quotes every cell
    with pytest.raises(TellError, match="not valid TSV"):
        read(path, 'a\tb\n"one\ntwo" and\tx\n')


def test_empty_columns_of_spreadsheets_are_skipped(tmp_path):
    path = tmp_path / "a.csv"
    assert read(path, "text,label,,\na,b,,\nc,d\n") == ([["a", "b"], ["c", "d"]], [])
    assert read(path, "text,label\na,b,,\n") == ([["a", "b"]], [])
    rows, told = read(path, ",text,label\n0,a,b\n1,c,d\n")
    assert rows == [["a", "b"], ["c", "d"]]
    assert told == ["a.csv: columns without a name are not used, the first with text is in line 2"]


def test_many_columns_take_no_longer_than_they_must(tmp_path):
    names = [f"c{i}" for i in range(40_000)]
    rows, _ = read(tmp_path / "a.csv", f"{','.join(names)}\n{','.join('x' * 40_000)}\n")
    assert len(rows[0]) == 40_000


def test_the_limit_of_csv_cells_is_put_back(tmp_path):
    before = csv.field_size_limit()
    assert read(tmp_path / "a.csv", f"a,b\n{'x' * 300_000},y\n")[0][0][1] == "y"
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("turns.json", '{"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}'),
        ("one.json", '{"prompt": {"q": "x"}, "completion": {"a": "y"}}'),
        ("lines.jsonl", '{"prompt": {"q": "x"}, "completion": {"q": "y"}}\n' * 2),
    ],
)
def test_records_whose_cells_are_objects_are_records(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert next(read_records(tmp_path / name))[1] == json.loads(text.partition("\n")[0])


def test_json_is_read_in_one_place():
    folder = Path(tell.__file__).parent / "data"
    found = [path.name for path in folder.glob("*.py") if re.search(r"json\.loads?\(|JSONDecoder", path.read_text())]
    # What tell itself wrote into a message, and offsets in text that was read before.
    assert sorted(found) == ["example.py", "json_files.py", "json_text.py"]


BAD = [
    ("twice.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', "twice.jsonl:2", "key a occurs twice"),
    ("twice.json", b'[{"a": 1},\n{"a": 1, "a": 2}]', "twice.json:2", "key a occurs twice"),
    ("wrapped.json", b'{"data": [{"a": 1}], "data": [{"a": 2}]}', "wrapped.json:1", "key data occurs twice"),
    ("one.json", b'{"a": 1, "a": 2}', "one.json:1", "key a occurs twice"),
    ("huge.jsonl", b'{"a": 1e400}', "huge.jsonl:1", "number 1e400 is too large"),
    ("huge.json", b'[{"a": 1},\n {"a": 1e400}]', "huge.json:2", "number 1e400 is too large"),
    ("digits.json", b'[{"a": ' + b"9" * 5000 + b"}]", "digits.json:1", "too large"),
    ("digits.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "digits.jsonl:1", "too large"),
    ("infinite.jsonl", b'{"a": -Infinity}', "infinite.jsonl:1", "-Infinity is not a JSON number"),
    ("levels.jsonl", b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "levels.jsonl:1", "nested too deeply"),
    ("levels.json", b'[{"a": ' + b"[" * 70 + b"]" * 70 + b"}]", "levels.json:1", "nested too deeply"),
    ("deep.json", b"[" * 100_000, "deep.json:1", "nested too deeply"),
    ("pandas.json", b'{"a": {"0": "x", "1": "y"}, "b": {"0": 1, "1": 2}}', "pandas.json", "as pandas' to_json writes"),
    ("index.json", b'{"0": {"a": "x", "b": 1}, "1": {"a": "y", "b": 2}}', "index.json", "as pandas' to_json writes"),
    ("names.json", b'{"q": {"a": "x", "b": "y"}, "answer": {"a": "1", "b": "2"}}', "names.json", "as pandas' to_json"),
    ("named.json", b'{"a": {"q": "x", "answer": "y"}, "b": {"q": "x", "answer": "z"}}', "named.json", "not rows"),
    ("names.jsonl", b'\n{"q": {"a": "x"}, "answer": {"a": "1"}} \n', "names.jsonl", "as pandas' to_json writes"),
    ("pandas.jsonl", b'{"a": {"0": "x", "1": "y"}, "b": {"0": 1, "1": 2}}', "pandas.jsonl", "as pandas' to_json"),
    ("empty.jsonl", b"", "empty.jsonl", "is empty"),
    ("blank.json", b" \n\n", "blank.json", "is empty"),
    ("empty.parquet", b"", "empty.parquet", "is empty"),
    ("header.csv", b"a,b\n", "header.csv", "has no rows"),
    ("none.json", b"[]", "none.json", "has no rows"),
    ("broken.jsonl", b'{"a": 1}\n{"a": \n', "broken.jsonl:2", "not valid JSON"),
    ("broken.json", b'[\n{"a": 1},\n{"a" 2}]', "broken.json:3", "not valid JSON"),
    ("truncated.json", b'[\n{"a": 1},\n', "truncated.json:3", "not valid JSON"),
    ("deep.jsonl", b"[" * 100_000, "deep.jsonl:1", "not valid JSON"),
    ("list.jsonl", b'{"a": 1}\n[1]\n', "list.jsonl:2", "is [1], not an object"),
    ("list.json", b'[{"a": 1},\n"x"]', "list.json:2", 'is "x", not an object'),
    ("number.json", b"5", "number.json:1", "is 5, not an object"),
    ("latin.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "latin.jsonl:2", "not UTF-8 (byte 0xe9 at offset 19)"),
    ("mark.csv", b"\xef\xbb\xbfa,b\n1,\xff\n", "mark.csv:2", "byte 0xff at offset 9"),
    ("wide.csv", "a,b\n1,2\n".encode("utf-16"), "wide.csv:1", "is UTF-16"),
    ("cells.csv", b"a,b\n1,2\n1,2,3\n", "cells.csv:3", "has 3 cells where the header has 2"),
    ("quote.csv", b'a,b\n1,2\n"1,2\n', "quote.csv:3", "not valid CSV"),
    ("twice.tsv", b"a\ta\n1\t2\n", "twice.tsv:1", "names the column 'a' twice"),
    ("bad.jsonl.gz", gzip.compress(b'{"a": 1}')[:-4], "bad.jsonl.gz", "not a complete .gz file"),
    ("bad.jsonl.zst", b"not zst", "bad.jsonl.zst", "not a complete .zst file"),
    ("cut.jsonl.zst", zstandard.compress(b'{"a": 1}' * 999)[:-5], "cut.jsonl.zst", "not a complete .zst file"),
    ("bad.parquet", b"PAR1 no", "bad.parquet", "not a readable Parquet file"),
    ("notes.txt", b"hello", "notes.txt", "unknown file type (.txt)"),
    ("notes", b"hello", "notes", "unknown file type (no extension)"),
]


@pytest.mark.parametrize(("name", "content", "where", "what"), BAD, ids=[bad[0] for bad in BAD])
def test_bad_files_name_file_line_and_remedy(tmp_path, name, content, where, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TellError) as caught:
        list(read_records(tmp_path / name))
    assert caught.value.where == str(tmp_path / where)
    assert what in caught.value.what
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", ["tikets.jsonl", "Tickets.JSONL", "tickets", "tickets.csv"])
def test_missing_file_names_the_nearest(tmp_path, asked):
    (tmp_path / "tickets.jsonl").write_text("{}")
    (tmp_path / "zebra.csv").write_text("")
    with pytest.raises(TellError, match=r"no such file. Did you mean .*tickets.jsonl\?"):
        list(read_records(tmp_path / asked))


def test_missing_folder_and_folder(tmp_path):
    with pytest.raises(TellError, match="no such file"):
        list(read_records(tmp_path / "nowhere" / "tickets.jsonl"))
    (tmp_path / "tickets.jsonl").write_text("{}")
    with pytest.raises(TellError, match=r"no such file. Check the path."):
        list(read_records(tmp_path / "orders.jsonl"))
    with pytest.raises(TellError, match=r"is a folder, not a file. Name one file, e.g. .*tickets.jsonl"):
        list(read_records(tmp_path))


def test_column_names_are_those_of_the_first_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": 1}\n{"q": 2, "a": 3}\n{"z": 1}\n')
    assert column_names(path, 2) == ["q", "a"] and column_names(path) == ["q", "a", "z"]
    (tmp_path / "b.csv").write_bytes("Größe,Farbe\n1,2\n".encode("cp1252"))
    assert column_names(tmp_path / "b.csv") == ["Größe", "Farbe"]
    with pytest.raises(TellError, match="no such file"):
        column_names(tmp_path / "c.csv")
