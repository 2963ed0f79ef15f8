"""A whole run by the calls that `tell tune` makes: data, anchor, rows, training, scores, report.

python examples/minimal.py [MODEL [OUT]]
"""

from __future__ import annotations

import sys
from pathlib import Path

import tell

SUPPORT = Path(__file__).parent / "support"


def main(model: str = "smollm2-135m", out: str = "runs/minimal") -> tell.RunFolder:
    config = tell.load_config(
        flags={
            "task": {
                "data": str(SUPPORT / "train.jsonl"),
                "test": str(SUPPORT / "test.jsonl"),
                "rows": 15,
                "test_rows": 20,
            },
            "anchor": {"text": f"@{SUPPORT / 'anchor.txt'}"},
            "general": {"source": "builtin", "rows": 60},
            "mix": {"repeat": 4},
            "eval": {"arms": ["base", "sft-matched", "tell"], "forgetting_answers": 0},
            "model": {"name": model},
            "out": out,
        }
    )
    folder = tell.RunFolder(out)
    task, general = tell.read_inputs(config)  # every fault of the input is reported here
    journal = tell.Journal.of(folder)
    session = tell.open_session(task, journal)  # the model, loaded at first use
    with journal.open(config):
        anchor = tell.settle_anchor(task, session, journal)
        prepared = tell.prepare(task, anchor, general)  # the exact order of rows of every arm
        tell.write_plan(folder, prepared)
        trained = tell.train_arms(prepared, prepared.trained, session, journal)
        measured = tell.measure_arms(prepared, trained, session, journal)
        metrics = tell.run_metrics(prepared, trained, measured)
        tell.write_results(folder, metrics, tell.Findings.of(prepared, session, seconds=journal.seconds))
    for arm, found in metrics.arms.items():
        print(arm, {name: score["value"] for name, score in found.items()})
    print(tell.write_report(folder))
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
