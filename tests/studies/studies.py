"""Small studies, and what of them must be the same however they were run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from run.runs import EXAMPLES, PROBE, comparable, read
from tell.nested import merge
from tell.studies.study_folder import StudyFolder


def recipe_of(model: Path, **keys: Any) -> dict[str, Any]:
    """Four cells: base, sft, and tell at two amounts of general data."""
    support = EXAMPLES / "support"
    config = {
        "task": {
            "data": str(support / "train.jsonl"),
            "test": str(support / "test.jsonl"),
            "schema": str(support / "schema.json"),
            "rows": 6,
            "test_rows": 4,
        },
        "model": {"name": str(model), "dtype": "fp32"},
        "general": {"source": str(PROBE)},
        "anchor": {"text": "Sort this mail."},
        "mix": {"repeat": 2},
        "train": {"batch_size": 4, "learning_rate": 5e-3, "lora_r": 4, "checkpoint_every": 1},
        "generate": {"max_new_tokens": 8},
        "eval": {"bootstrap": 100, "forgetting_rows": 4, "forgetting_answers": 0},
    }
    own = {"config": config, "grid": {"general.rows": [0, 8]}, "arms": ["base", "sft", "tell"], "seeds": [42]}
    return {**merge(own, keys), **({"grid": keys["grid"]} if "grid" in keys else {})}


def numbers(folder: StudyFolder, root: Path) -> dict[str, Any]:
    """The study's rows, its table, and all that its cells measured, without seconds."""
    data = folder.read()
    assert {cell["state"] for cell in data["cells"].values()} == {"done"}
    cells = {name: comparable(read(root / "cells" / name / "metrics.json")) for name in data["cells"]}
    answers = {
        (name, path.name): [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name in data["cells"]
        for path in sorted((root / "cells" / name / "predictions").glob("*.jsonl"))
    }
    return {"rows": data["rows"], "cells": cells, "answers": answers}
