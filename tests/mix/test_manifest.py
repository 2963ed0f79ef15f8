import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell.errors import TellError
from tell.mix import build, general_rows, read_manifest, write_manifest
from tell.mix.manifest import COLUMNS

from .tables import make_table


def example(task, general, rows, seed, repeat=2):
    tables = {"task": make_table("task", task), "general": make_table("general", general)}
    draw = general_rows(tables["general"].unit, task_tokens=1, rows=rows, seed=seed)
    return build(tables, general=draw, repeat=repeat, ordering="shuffle", seed=seed), tables


lengths = st.lists(st.integers(3, 40), min_size=1, max_size=20)


@settings(max_examples=25)
@given(task=lengths, general=lengths, rows=st.integers(0, 40), seed=st.integers(0, 99), batch=st.integers(1, 20))
def test_round_trip(tmp_path_factory, task, general, rows, seed, batch):
    path = tmp_path_factory.mktemp("manifest") / "manifest.parquet"
    mixture, tables = example(task, general, rows, seed)
    write_manifest(path, mixture, tables, batch)
    table = read_manifest(path)
    assert table.schema.names == list(COLUMNS) and table.num_rows == len(mixture)
    read = table.to_pydict()
    assert read["position"] == list(range(len(mixture)))
    assert read["step"] == [i // batch + 1 for i in range(len(mixture))]
    assert max(read["step"]) == mixture.steps(batch)
    assert read["repetition"] == mixture.repetition.tolist()
    for i, (source, row) in enumerate(zip(read["source"], mixture.row, strict=True)):
        here = tables[source]
        assert read["hash"][i] == here.hashes[row] and read["origin"][i] == here.origins[row]
        assert (read["tokens"][i], read["trained"][i], read["unit"][i]) == (
            here.tokens[row],
            here.trained[row],
            here.unit[row],
        )
    assert table.schema.metadata[b"tell.digest"].decode() == mixture.digest()


def test_same_mixture_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        mixture, tables = example([9, 5, 7], list(range(3, 40)), 60, seed)
        write_manifest(tmp_path / name, mixture, dict(reversed(tables.items())), 16)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing left beside


def test_a_refused_manifest_leaves_the_old_one(tmp_path):
    path = tmp_path / "manifest.parquet"
    mixture, tables = example([9, 5], [5, 6], 3, 0)
    write_manifest(path, mixture, tables, 2)
    before = path.read_bytes()
    with pytest.raises(TellError, match=r"train\.batch_size"):
        write_manifest(path, mixture, tables, 0)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_is_no_manifest_is_named(tmp_path):
    with pytest.raises(TellError, match=r"absent\.parquet: no such file"):
        read_manifest(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(TellError, match=r"text\.parquet: cannot be read as Parquet"):
        read_manifest(tmp_path / "text.parquet")
    pq.write_table(pa.table({"x": np.arange(3)}), tmp_path / "other.parquet")
    with pytest.raises(TellError, match=r"other\.parquet: is not a manifest"):
        read_manifest(tmp_path / "other.parquet")
