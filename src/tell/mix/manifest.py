"""The manifest: every training row in order, as Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tell.errors import TellError
from tell.files import atomic_path
from tell.mix.mixture import Mixture
from tell.rows.row_table import RowTable

if TYPE_CHECKING:
    import pyarrow as pa

STRINGS = frozenset({"source", "hash", "origin"})
COLUMNS = ("position", "step", "source", "hash", "origin", "tokens", "trained", "unit", "repetition")


@cache
def _schema() -> pa.Schema:
    import pyarrow as pa  # imported here, because planning imports this module and writes no manifest

    return pa.schema([(name, pa.string() if name in STRINGS else pa.int32()) for name in COLUMNS])


def manifest_table(mixture: Mixture, tables: Mapping[str, RowTable], batch_size: int) -> pa.Table:
    """n rows in training order; position and repetition count from 0, step from 1 as the training log does."""
    import pyarrow as pa

    schema = _schema()
    mixture.steps(batch_size)  # refuses a batch size below 1
    mixture = replace(mixture, tables=tables)
    position = np.arange(len(mixture))
    columns = {
        "position": position,
        "step": position // batch_size + 1,
        "source": np.array(mixture.sources)[mixture.source],
        "hash": mixture.column("hashes"),
        "origin": mixture.column("origins"),
        "tokens": mixture.column("tokens"),
        "trained": mixture.column("trained"),
        "unit": mixture.column("unit"),
        "repetition": mixture.repetition,
    }
    metadata = {"tell.batch_size": str(batch_size), "tell.digest": mixture.digest(), "tell.seed": str(mixture.seed)}
    arrays = [pa.array(columns[f.name].tolist(), type=f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))


def write_manifest(path: str | Path, mixture: Mixture, tables: Mapping[str, RowTable], batch_size: int) -> None:
    """Write ``manifest.parquet``; the same mixture gives the same bytes (no time, no machine in the file).

    Args:
        path: file to write, replaced whole or not at all.
        mixture: the rows in order.
        tables: hashes, origins and token counts of each source.
        batch_size: examples per optimiser step.

    Raises:
        TellError: the path cannot be written.
    """
    import pyarrow.parquet as pq

    table = manifest_table(mixture, tables, batch_size)
    with atomic_path(Path(path)) as temporary:
        pq.write_table(table, temporary, compression="zstd", version="2.6")


def read_manifest(path: str | Path) -> pa.Table:
    """The manifest's columns; ``schema.metadata`` holds batch size, digest and seed.

    Raises:
        TellError: no such file, or not a manifest.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise TellError("no such file", where=str(path), remedy="Name the manifest.parquet of a run folder.")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        what = f"cannot be read as Parquet ({error})"
        raise TellError(what, where=str(path), remedy="Make it again with `tell plan`.") from error
    if not table.schema.equals(_schema()) or b"tell.digest" not in (table.schema.metadata or {}):
        remedy = "Make it again with `tell plan` or `tell tune`."
        raise TellError("is not a manifest of this version", where=str(path), remedy=remedy)
    return table
