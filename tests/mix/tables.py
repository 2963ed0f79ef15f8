"""Row tables of made-up tokens for the tests of mixing."""

from __future__ import annotations

import numpy as np

from tell.rows.row_table import RowTable


def make_table(source: str, lengths: list[int]) -> RowTable:
    """A table whose row i has lengths[i] tokens, of which a third is trained; unit is tokens less 2."""
    tokens = np.array(lengths, dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
    return RowTable(
        source=source,
        hashes=np.array([f"{source[0]}{i:015x}" for i in range(len(tokens))], dtype="<U16"),
        origins=np.array([f"{source}.jsonl:{i + 1}" for i in range(len(tokens))], dtype=object),
        tokens=tokens,
        trained=(tokens // 3 + 1).astype(np.int32),
        unit=np.maximum(tokens - 2, 0).astype(np.int32),
        ids=np.zeros(int(starts[-1]), dtype=np.int32),
        mask=np.zeros(int(starts[-1]), dtype=bool),
        starts=starts,
    )
