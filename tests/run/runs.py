"""Small runs on tiny random models: configurations, and what a run folder says was trained."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tell.anchor.anchor import Anchor
from tell.config import Config, load_config
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.mix.manifest import read_manifest
from tell.models.find import find_model
from tell.names import ARMS
from tell.nested import merge
from tell.progress import Display, Silent
from tell.rows.template import ChatTokenizer
from tell.run.general_rows import read_general
from tell.run.session import Session
from tell.run.task import limit_task, load_task, task_table

EXAMPLES = Path(__file__).parents[2] / "examples"
PROBE = Path(__file__).parents[2] / "src/tell/score/probe/general.jsonl"
ANCHORS = {"support": "Sort this mail.", "reviews": "Positive, negative or mixed?", "titles": "Write a headline."}
ALL_ARMS = [name for name, arm in ARMS.items() if ARMS[arm.adapter or name].teacher is None]
FILES = (  # that every run of the arm tell leaves
    *("run.yaml", "status.json", "anchor.json", "split.json", "plan.json", "manifest.parquet", "findings.json"),
    *("metrics.json", "report.html", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"),
    *("adapter/tell.json", "logs/tell.jsonl", "predictions/tell.jsonl"),
)


def config_of(model: Path, out: Path | None = None, *, example: str = "support", **sections: Any) -> Config:
    """A run of a few seconds; ``sections`` override its keys."""
    data: dict[str, Any] = {
        "data": str(EXAMPLES / example / "train.jsonl"),
        "test": str(EXAMPLES / example / "test.jsonl"),
        "rows": 6,
        "test_rows": 5,
    }
    if example == "support":
        data["schema"] = str(EXAMPLES / example / "schema.json")
    small = {
        "task": data,
        "model": {"name": str(model), "dtype": "fp32"},
        "general": {"source": str(PROBE), "rows": 10},
        "anchor": {"text": ANCHORS[example], "candidates": 2, "examples": 2},
        "mix": {"repeat": 2},
        "train": {"batch_size": 4, "learning_rate": 5e-3, "lora_r": 4},
        "generate": {"max_new_tokens": 8},
        "eval": {
            "arms": ["base", "tell"],
            "icl_examples": 2,
            "bootstrap": 100,
            "forgetting_rows": 4,
            "forgetting_answers": 2,
        },
        "seed": 7,
        **({"out": str(out)} if out else {}),
    }
    return load_config(flags=merge(small, sections))


def open_session(
    model: Path,
    config: Config | None = None,
    *,
    chat: ChatTokenizer | None = None,
    display: Display | None = None,
    check: Callable[[], None] = lambda: None,
    engine: Any = None,
) -> Session:
    """A tiny model on the CPU in fp32, loaded; ``engine`` decodes in place of our own."""
    from tell.decode.engine import Engine
    from tell.models.load import load_model

    files = find_model(str(model))
    loaded = load_model(files, dtype="fp32", device="cpu")
    engine = engine or Engine(loaded.model, device=loaded.device, max_positions=files.architecture.max_positions)
    session = Session(files, config or Config(), chat or ChatTokenizer(files.path), display or Silent(), check)
    session._held = (loaded, engine)
    return session


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def trained_rows(folder: RunFolder, config: Config) -> list[tuple[str, str, str]]:
    """(source, content hash, decoded text) of every row the manifest lists, from the data as tokenised for training."""
    task = load_task(config)
    anchor = Anchor.load(folder.anchor)
    tables = {"task": task_table(limit_task(task, anchor), anchor)}
    if (general := read_general(task)) is not None:
        tables["general"] = general.table
    found = {
        (name, str(key)): task.chat.backend.decode(table.row(i)[0].tolist(), skip_special_tokens=False)
        for name, table in tables.items()
        for i, key in enumerate(table.hashes)
    }
    manifest = read_manifest(folder.manifest).to_pylist()
    return [(row["source"], row["hash"], found[row["source"], row["hash"]]) for row in manifest]


def is_number(entry: dict) -> bool:
    """Whether an interval holds its value."""
    low, high = entry["ci"]
    return low <= entry["value"] <= high and entry["n"] > 0


def check_anchor_and_counts(folder: RunFolder, config: Config, anchor: Anchor) -> None:
    """The manifest is what was mixed: anchor once in every task row, in no general row; every count exact."""
    rows = trained_rows(folder, config)
    for source, _, text in rows:
        assert text.count(anchor.text) == (1 if source == "task" else 0), text
    mixture = read(folder.metrics)["mixture"]
    assert Counter(source for source, _, _ in rows) == mixture["rows"]
    repeats = Counter(key for source, key, _ in rows if source == "task")
    assert set(repeats.values()) == {config.mix.repeat} and len(repeats) == mixture["unique_rows"]["task"]
    train = set(read(folder.split)["train"])
    assert set(repeats) == train
    manifest = read_manifest(folder.manifest)
    for key, column in (("tokens", "tokens"), ("trained_tokens", "trained"), ("unit_tokens", "unit")):
        for source in mixture["rows"]:
            kept = [
                n
                for n, s in zip(manifest[column].to_pylist(), manifest["source"].to_pylist(), strict=True)
                if s == source
            ]
            assert sum(kept) == mixture[key][source]
    log = read_jsonl(folder.losses("tell"))
    assert [row["step"] for row in log] == sorted(set(manifest["step"].to_pylist()))
    assert log[-1]["tokens"] == sum(manifest["tokens"].to_pylist())


def comparable(metrics: dict) -> dict:
    """metrics.json without the seconds it took."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k != "seconds"}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return clean(metrics)


class Killer:
    """A display that sends this process a signal once a bar whose title begins as given has advanced ``after`` times.

    The run hears it as it hears Ctrl-C: through its own handler.
    """

    def __init__(self, title: str, after: int = 1, number: int = signal.SIGTERM) -> None:
        self.title, self.left, self.number = title, after, number

    def note(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, title: str, total: float | None, unit: str = "rows"):
        def advance(amount: float = 1, info: str = "", left: float | None = None) -> None:
            if title.startswith(self.title):
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), self.number)

        yield advance


def steady_pace(monkeypatch: Any, *, train: float, decode: float) -> None:
    """Let --max-minutes go by these speeds in tokens a second, whatever the machine does meanwhile."""
    from tell.run.speed import keep_speed

    def measure(task: Any, table: Any, session: Any) -> None:
        keep_speed(task, session.loaded, train, decode)

    monkeypatch.setattr("tell.run.in_time.measure_pace", measure)
