"""Run folders with made-up contents."""

from __future__ import annotations

import json

from tell.files import write_json, write_jsonl
from tell.folder import RunFolder
from tell.report.page import write_page
from tell.ui.ui_root import UiRoot


def make_run(root: UiRoot, name: str, *, state: str = "done", text: str = "hello") -> RunFolder:
    """A run folder whose every text is ``text``."""
    folder = RunFolder(root.path / name)
    folder.root.mkdir(parents=True)
    folder.config.write_text(f"task:\n  data: {json.dumps(text)}\neval:\n  arms: [base, tell]\n")
    folder.set_status(state, stage=text, seconds=61.0, error=text)
    value = {"value": 0.9, "ci": [0.8, 1.0], "n": 3}
    arms = {arm: {"accuracy": value} for arm in ("base", "tell")}
    write_json(folder.metrics, {"task": {"kind": "label", "primary": "accuracy"}, "arms": arms})
    write_json(folder.plan, {"arms": {"tell": {"steps": 4}, text: {"steps": 2}}, "notices": [text]})
    write_json(folder.findings, {"notices": [text], "kind": {"name": "label", "why": text, "labels": [text]}})
    rows = [
        {"hash": f"{i:016x}", "origin": text, "prompt": f"{text}{i}", "reference": text, "answer": text}
        for i in range(3)
    ]
    folder.predictions.mkdir()
    write_jsonl(folder.prediction("tell"), [row | {"scores": {"accuracy": 1.0}} for row in rows])
    folder.logs.mkdir()
    folder.losses("tell").write_text('{"step": 1, "loss": 2.0, "by_source": {"task": 2.0}}\n{"step": 2, "lo')
    if state == "done":
        write_page(folder)
    return folder
