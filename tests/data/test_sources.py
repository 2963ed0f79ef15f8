import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tell.data.sources import _is_path, _rows, file_fingerprint, load
from tell.errors import TellError

DATA = Path(os.environ.get("TELL_DATA") or Path(__file__).parents[3] / "shared" / "data")
ALPACA = DATA / "general" / "alpaca_en.jsonl.gz"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_load_keeps_order_source_and_origin(tmp_path):
    path = write(tmp_path / "f.jsonl", [{"prompt": str(i), "response": "a"} for i in range(5)])
    loaded = load(path, name="general")
    assert [example.question for example in loaded.examples] == list("01234")
    assert [example.origin for example in loaded.examples] == [f"f.jsonl:{i}" for i in range(1, 6)]
    assert {example.source for example in loaded.examples} == {"general"}
    assert (loaded.layout, loaded.path, loaded.dropped) == ("prompt/response", path, ())


def test_fingerprint_follows_content_columns_and_name(tmp_path):
    path = write(tmp_path / "f.jsonl", [{"a": "1", "b": "2"}] * 2)
    base = load(path, columns="prompt=a,answer=b").fingerprint
    assert base == load(path, columns="prompt=a,answer=b").fingerprint == file_fingerprint(path, "prompt=a,answer=b")
    assert base != load(path, columns="prompt=b,answer=a").fingerprint
    assert base != load(path, columns="prompt=a,answer=b", name="general").fingerprint
    write(tmp_path / "f.jsonl", [{"a": "1", "b": "3"}] * 2)
    assert base != load(path, columns="prompt=a,answer=b").fingerprint


def test_no_usable_row(tmp_path):
    path = write(tmp_path / "f.jsonl", [{"prompt": "q", "response": ""}] * 2)
    with pytest.raises(TellError, match="no row is usable; the first has no answer") as caught:
        load(path, name="general")
    assert caught.value.where == f"{path}:1"


@pytest.mark.parametrize(
    "source", ["x.jsonl", "./x", "~/x", "a/b/c", "a/b.csv", "x.txt", "C:\\x", "x y", "/x", "x" * 300 + ".csv"]
)
def test_paths(source):
    assert _is_path(source)


@pytest.mark.parametrize(
    "source", ["imdb", "tatsu-lab/alpaca", "openai/gsm8k:main@test", "a/b@train[:50%]", "a/b-v1.5"]
)
def test_hub_names(source):
    assert not _is_path(source)


def test_hub_rows_have_class_names():
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    assert _rows(dataset) == [
        {"text": "a", "label": "pos"},
        {"text": "b", "label": "neg"},
        {"text": "c", "label": None},
    ]


def test_import_stays_light():
    code = (
        "import sys; import tell.data.sources, tell.data.split, tell.data.subset, tell.data.overlap, tell.data.kind; "
        "print([m for m in ('torch', 'pyarrow', 'datasets', 'datasketch', 'genson', 'jsonschema', 'zstandard')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not ALPACA.exists(), reason=f"needs {ALPACA}; set TELL_DATA to the folder of public data")
def test_alpaca():
    loaded = load(str(ALPACA), name="general")
    assert len(loaded.examples) == 51_974 and len(loaded.dropped) == 28
    assert loaded.layout == "Alpaca instruction/input/output"
