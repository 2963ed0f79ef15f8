"""The tables printed at the end of a run."""

from __future__ import annotations

import io

from rich.console import Console

from tell.cli.display import make_console
from tell.cli.tables import answers_side_by_side, arms_table, clean, plan_box, show_metrics
from tell.files import write_jsonl
from tell.folder import RunFolder

METRICS = {
    "task": {"kind": "json", "primary": "schema_adherence"},
    "arms": {
        "base": {
            "field:urgency": {"value": 0.5, "ci": [0.4, 0.6], "n": 108},
            "schema_adherence": {"value": 0.0, "ci": [0.0, 0.034], "n": 108},
        },
        "tell": {"schema_adherence": {"value": 0.926, "ci": [0.86, 0.96], "n": 108}},
    },
    "differences": {"tell - base": {"schema_adherence": {"value": 0.926, "ci": [0.87, 0.97], "n": 108}}},
    "forgetting": {
        "sets": {"general held out": {"in_mix_source": True}, "probe": {"in_mix_source": False}},
        "arms": {
            "base": {"probe": {"loss": {"value": 1.71, "ci": [1.6, 1.8], "n": 60}}},
            "tell": {"probe": {"loss": {"value": 1.4, "ci": [1.3, 1.5], "n": 60}}},
        },
    },
}


def shown(renderable, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_arms_with_intervals_and_loss_outside_the_mix():
    text = shown(arms_table(METRICS))
    rows = {cells[1].strip(): cells for line in text.splitlines() if len(cells := line.split("│")) > 3}
    assert [cell.strip() for cell in rows["tell"][2:4]] == ["92.6 % [86, 96]", "1.40 [1.30, 1.50]"]
    assert [cell.strip() for cell in rows["base"][2:4]] == ["0.0 % [0, 3]", "1.71 [1.60, 1.80]"]
    assert "108 test rows" in text and "urgency" not in text and "loss, probe" in text


def test_scores_of_a_hundred_are_no_shares():
    metrics = {"task": {"primary": "chrf"}, "arms": {"tell": {"chrf": {"value": 41.27, "ci": [38.0, 44.0], "n": 9}}}}
    assert "41.3 [38.0, 44.0]" in shown(arms_table(metrics))
    learned = {"bleurt": {"value": 0.4127, "ci": [-0.01, 0.44], "n": 9}}
    assert "0.413 [-0.010, 0.440]" in shown(arms_table({"task": {"primary": "bleurt"}, "arms": {"tell": learned}}))


def test_missing_numbers_are_dashes():
    metrics = {"task": {"primary": "accuracy"}, "arms": {"base": {}, "tell": {"accuracy": {"value": 0.5, "n": 2}}}}
    text = shown(arms_table(metrics))
    assert "50.0 %" in text and " - " in text
    assert "tell" not in shown(arms_table({"arms": {}}))


def test_the_verdict_follows_the_table():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_metrics(console, METRICS)
    assert "TELL raises schema adherence from 0 %" in console.export_text()


def row(key: str, answer: str, score: float) -> dict:
    return {"hash": key, "prompt": f"prompt {key}", "reference": "ref", "answer": answer, "scores": {"m": score}}


def test_answers_that_differ_come_first(tmp_path):
    run = RunFolder(tmp_path)
    write_jsonl(run.prediction("base"), [row("a", "same", 0), row("b", "poor", 0), row("c", "left out", 0)])
    write_jsonl(run.prediction("tell"), [row("a", "same", 0), row("b", "good [red]\x1b[2Jx", 1), row("d", "more", 0)])
    text = shown(answers_side_by_side(run, ["base", "tell", "icl"]))
    assert text.index("prompt b") < text.index("prompt a")
    assert "good [red][2Jx" in text  # markup and terminal sequences of a model are text
    assert "left out" not in text and "more" not in text
    assert answers_side_by_side(run, ["icl"]) is None


def test_clean_keeps_letters_of_all_languages():
    assert clean("né\tß\n日本 \u200d👩\u200d🚀") == "né\tß\n日本 \u200d👩\u200d🚀"
    assert clean("a\x1b[31mb\x07\r\x9b1m\u202ec") == "a[31mb1mc"


def test_plan_box_has_a_row_a_source():
    plan = {
        "model": {"name": "m", "parameters": 135e6},
        "task": {"kind": "json", "test_rows": 22},
        "mixture": {
            "rows": {"task": 180, "general": 1484},
            "unique_rows": {"task": 45, "general": 1484},
            "unit_tokens": {"task": 34736, "general": 173628},
            "tokens": {"task": 40316, "general": 221116},
            "trained_tokens": {"task": 9556, "general": 142464},
            "ratio": 20.0,
            "order": "spread",
            "repeat": 4,
        },
        "train": {
            "steps": 104,
            "batch_size": 16,
            "tokens": 261432,
            "flops": 1.36e14,
            "learning_rate": 1e-3,
            "examples_per_step": {"task": 1.73, "general": 14.27},
        },
        "arms": {"tell": {"steps": 104, "tokens": 261432, "flops": 1.36e14, "seconds": 853}},
        "predicted": {"seconds": 900, "basis": "measured on this machine", "memory_gb": 2.5},
        "dropped_rows": [{"origin": "a.jsonl:3", "reason": "too long"}],
        "notices": ["general data is used 1.2 times"],
    }
    text = " ".join(shown(plan_box(plan)).split())
    assert "task 180 45 34,736 40,316 9,556 1.73" in text
    assert "general 1,484 1,484 173,628 221,116 142,464 14.27" in text
    for part in ("104 steps of 16", "1.36e+14 FLOPs", "tell 104 261,432 1.36e+14 14:13", "15:00 (measured", "2.5 GB"):
        assert part in text
    assert "1 row left out: a.jsonl:3: too long" in text and "general data is used 1.2 times" in text


def test_brackets_in_names_of_metrics_are_no_markup():
    metrics = {"task": {"primary": "[/]"}, "arms": {"base": {"[/]": {"value": 0.5, "ci": [0.4, 0.6], "n": 3}}}}
    console = make_console()
    console.file = stream = io.StringIO()
    console.print(arms_table(metrics))
    assert "[/]" in stream.getvalue()
