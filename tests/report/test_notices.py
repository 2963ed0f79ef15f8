"""What a run dropped, guessed or shrank."""

from __future__ import annotations

import json

import tell
from run.runs import config_of, read
from tell.report.notices import run_notices


def test_each_row_left_out_is_said_once(tiny_model, tmp_path, capsys):
    """Rejected task and test rows, empty general rows: in the list at the end, and in no notice beside it."""

    def written(name, rows):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return str(tmp_path / name)

    pairs = [{"prompt": f"Is {n} even?", "completion": "no" if n % 2 else "yes", "label": True} for n in range(12)]
    test = [row | {"prompt": f"And {row['completion']} to {n}?"} for n, row in enumerate(pairs)]
    marked = {"prompt": "Is it?", "completion": "yes", "label": False}
    general = [{"instruction": f"What is {n}?", "output": "" if n == 3 else f"It is {n}."} for n in range(20)]
    config = config_of(
        tiny_model("llama"),
        tmp_path / "run",
        task={"data": written("a.jsonl", [*pairs, marked]), "test": written("b.jsonl", [marked, *test])}
        | {"schema": None, "rows": 6},
        general={"source": written("g.jsonl", general), "rows": 5},
        eval={"arms": ["base"], "forgetting_rows": 0},
    )
    findings = read(tell.tune(config).findings)
    said = run_notices(findings, {})
    assert [text for text in said if "left out" in text or "dropped" in text] == [
        "2 rows left out, the first: a.jsonl:13: label is false",
        f"1 row left out: g.jsonl:4: {findings['dropped_rows'][-1]['reason']}",
    ]
    assert tell.plan(config)["dropped_rows"] == findings["dropped_rows"]
