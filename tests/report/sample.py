"""A run folder as `tell tune` leaves it, with plausible numbers and hostile answers, for tests and for looking at.

python tests/report/sample.py FOLDER    writes the folder and its report.html
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tell.files import write_json, write_jsonl, write_text
from tell.folder import RunFolder

HOSTILE = [
    "<script>alert('x')</script><img src=x onerror=alert(1)>",
    '"\'> <a href="https://evil.example/?q=1" onclick="x()">click</a> </style></title><style>*{display:none}',
    "before\x00\x07\x1b[31mred\x1b[0m \u202eevil\u202c \u200bzero\u2066iso\u2069 \ufeffend \ud800 lone",
    "W" * 3000,
    "{{ 7 * 7 }} {% raw %} &amp; &lt;b&gt; <!-- <b>bold</b> --> ]]>",
    "",
]
SKILL = {
    "base": 0.02,
    "base+anchor": 0.11,
    "icl": 0.46,
    "sft": 0.05,
    "sft-matched": 0.86,
    "tell": 0.95,
    "tell-anchor": 0.79,
}
MAILS = [
    (
        "Hi, I was charged twice for order 48213 on Monday. Please give the money back, this is the second time.",
        "billing",
    ),
    ("die App stürzt ab, sobald ich auf 'Rechnungen' tippe. iPhone 12, alles aktuell.", "bug"),
    ("where is my parcel??? tracking says delivered but theres nothing here. order #9917", "delivery"),
    ("Bonjour, est-ce que je peux passer au forfait Équipe en cours de mois ? Merci d'avance, Claire", "plan"),
    ("Love the new dashboard! Could you add an export to CSV one day? No hurry.", "feature"),
    (
        "I can't log in since yesterday, the code never arrives. I have a demo at 3pm so this is rather urgent.",
        "access",
    ),
]
ARMS = tuple(SKILL)
TRAINED = ("sft", "sft-matched", "tell")


def make_sample(root: Path, *, arms: tuple[str, ...] = ARMS, rows: int = 100, seed: int = 7) -> RunFolder:
    """Write every file of a finished run; deterministic."""
    folder, rng = RunFolder(root), np.random.default_rng(seed)
    good, field = {}, {}
    for arm in arms:
        good[arm] = rng.random(rows) < SKILL[arm]
        field[arm] = np.where(good[arm], rng.choice([0.6, 0.8, 1.0], rows, p=[0.1, 0.3, 0.6]), 0.0)
        write_jsonl(
            folder.prediction(arm), [_prediction(arm, i, good[arm][i], float(field[arm][i])) for i in range(rows)]
        )
    _hostile(folder, arms)
    _training(folder, arms, rng)
    _manifest(folder)
    write_json(folder.metrics, _metrics(arms, good, field, rng))
    write_json(folder.findings, FINDINGS)
    write_json(folder.anchor, ANCHOR)
    write_text(folder.config, yaml.safe_dump(CONFIG, sort_keys=False, allow_unicode=True))
    write_json(folder.plan, {"steps": 90, "seconds": 205.0})
    folder.set_status("done")
    return folder


def _prediction(arm: str, i: int, right: bool, field: float) -> dict:
    mail, topic = MAILS[i % len(MAILS)]
    gold = {
        "topic": topic,
        "urgency": ["low", "normal", "high"][i % 3],
        "order": 48213 if "48213" in mail else None,
        "languages": ["de" if "die App" in mail else "fr" if "Bonjour" in mail else "en"],
        "summary": mail.split(".")[0][:60],
    }
    said, why = dict(gold), None
    if right and field < 1:
        said["urgency"], said["summary"] = "normal", "The customer asks for help"
    answer = json.dumps(said, ensure_ascii=False)
    if not right:
        kinds = {
            "base": (
                "Thank you for reaching out! I'm sorry to hear about this.",
                "not JSON: Expecting value (line 1, column 1)",
            ),
            "icl": (f"Here is the JSON:\n```json\n{answer}\n```", "text around the JSON object"),
            "tell": (answer.replace('"urgency"', '"priority"'), "'urgency' is a required property"),
        }
        answer, why = kinds.get(arm, (answer[:-9], "not JSON: Unterminated string (line 1, column 96)"))
    row = {
        "hash": f"{i:016x}",
        "origin": f"test.jsonl:{i + 1}",
        "prompt": mail,
        "reference": json.dumps(gold, ensure_ascii=False),
        "answer": answer,
        "finish": "stop" if right or arm == "tell" else "length",
        "tokens": len(answer) // 4,
        "scores": {
            "schema_adherence": float(right),
            "field_accuracy": field,
            "exact_match": float(field == 1.0),
        },
    }
    return row | ({"why": why} if why else {})


def _hostile(folder: RunFolder, arms: tuple[str, ...]) -> None:
    """The first rows' answers, prompts and reasons replaced by hostile text in every arm."""
    for arm in arms:
        path = folder.prediction(arm)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for i, text in enumerate(HOSTILE):
            rows[i]["scores"] = {k: float(arm == "tell" and i >= 3 and i % 2) for k in rows[i]["scores"]}
            if arm != "tell" or i < 3:
                rows[i]["answer"], rows[i]["why"] = text, f"not JSON: {text[:80]}" if text else "empty answer"
            if i == 1:
                rows[i]["prompt"], rows[i]["origin"] = text, text[:40]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def _ci(values: np.ndarray, rng: np.random.Generator) -> dict:
    means = values[rng.integers(0, len(values), (500, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "ci": [float(low), float(high)], "n": len(values)}


def benchmarks(rng, arms) -> dict:
    """A benchmark of one task and a group of two, as ``metrics.json`` has them."""
    groups = {"openbookqa": ["openbookqa"], "agieval": ["agieval_sat_en", "agieval_math"]}
    right = {a: {task: rng.random(40) < 0.3 for tasks in groups.values() for task in tasks} for a in arms}

    def told(rows) -> dict:
        return {
            "openbookqa": _ci(rows["openbookqa"], rng),
            "agieval": _ci((rows["agieval_sat_en"] + rows["agieval_math"]) / 2, rng),
            "agieval_sat_en": _ci(rows["agieval_sat_en"], rng),
        }

    changes = {
        f"{a} - base": {"openbookqa": _ci(1.0 * right[a]["openbookqa"] - right["base"]["openbookqa"], rng)}
        for a in arms[1:]
    }
    shots = {"openbookqa": 0, "agieval_sat_en": 0, "agieval_math": 4}
    settings = {"harness": "0.4.9", "tasks": groups, "limit": 40, "shots": shots, "chat": False, "anchor": True}
    return {
        "settings": settings,
        "arms": {a: told({k: 1.0 * v for k, v in rows.items()}) for a, rows in right.items()},
        "differences": changes,
    }


def _metrics(arms: tuple[str, ...], good: dict, field: dict, rng: np.random.Generator) -> dict:
    def scores(arm: str) -> dict[str, np.ndarray]:
        return {
            "schema_adherence": good[arm] * 1.0,
            "field_accuracy": field[arm],
            "exact_match": (field[arm] == 1) * 1.0,
        }

    measured = {a: {m: _ci(v, rng) for m, v in scores(a).items()} for a in arms}
    differences = {}
    if "tell" in arms:
        for arm in arms:
            if arm != "tell":
                pairs = {m: scores("tell")[m] - v for m, v in scores(arm).items()}
                differences[f"tell - {arm}"] = {m: _ci(v, rng) for m, v in pairs.items()}
    metrics: dict = {
        "task": {"kind": "json", "primary": "schema_adherence"},
        "arms": measured,
        "differences": differences,
    }
    tuned = {"sft-matched": (0.46, 0.31, 0.22), "tell": (0.01, 0.0, 0.02)}
    if "base" in arms:
        losses = {"general held out": rng.normal(1.71, 0.4, 64), "probe": rng.normal(1.93, 0.5, 60)}
        told, changed = {}, {}
        before = (rng.random(60) < 0.02) * 1.0
        for arm in ("base", *(a for a in tuned if a in arms)):
            up, more, leak = tuned.get(arm, (0.0, 0.0, 0.0))
            shift = {"general held out": up, "probe": more}
            moved = {s: shift[s] + rng.normal(0, 0.05 * (arm != "base"), len(v)) for s, v in losses.items()}
            leaked = np.maximum(before, rng.random(60) < leak)
            told[arm] = {s: {"loss": _ci(v + moved[s], rng)} for s, v in losses.items()}
            told[arm]["probe"]["task_format"] = _ci(leaked, rng)
            if arm != "base":
                changed[f"{arm} - base"] = {s: {"loss": _ci(v, rng)} for s, v in moved.items()}
                changed[f"{arm} - base"]["probe"]["task_format"] = _ci(leaked - before, rng)
        metrics["forgetting"] = {
            "sets": {
                "general held out": {"origin": "self", "rows": 64, "in_mix_source": True},
                "probe": {"origin": "written for TELL", "rows": 60, "in_mix_source": False},
            },
            "arms": told,
            "differences": changed,
            "answers": [
                {
                    "prompt": "Name three rivers of Europe.",
                    "reference": "The Danube, the Rhine and the Volga.",
                    "base": "Three rivers of Europe are the Danube, the Rhine and the Loire.",
                    "tell": "The Danube, the Rhine and the Seine.",
                },
                {"prompt": HOSTILE[1], "reference": "", "base": HOSTILE[0], "tell": HOSTILE[4]},
            ],
        }
        metrics["benchmarks"] = benchmarks(rng, ["base", *(a for a in ("tell",) if a in arms)])
    trained = [a for a in TRAINED if a in arms]
    if "tell" in arms:
        metrics["mixture"] = {
            "rows": {"task": 240, "general": 1200},
            "unique_rows": {"task": 60, "general": 1200},
            "tokens": {"task": 31440, "general": 158210},
            "trained_tokens": {"task": 11520, "general": 118800},
            "unit_tokens": {"task": 6910, "general": 138900},
            "ratio": 20.1,
            "repeat": 4,
            "order": "spread",
            "notices": ["general rows: 1,200 of 1,312 used"],
        }
    if trained:
        steps = {"sft": 4, "sft-matched": 90, "tell": 90}
        metrics["train"] = {"steps": 90, "tokens": 189650, "flops": 1.53e14, "seconds": 210.4}
        metrics["train"]["arms"] = {
            a: {
                "steps": steps[a],
                "tokens": 2107 * steps[a],
                "trained_tokens": 1448 * steps[a],
                "flops": 1.7e12 * steps[a],
                "seconds": 2.34 * steps[a],
                "learning_rate": 1e-3,
                "validation_loss": {"sft": 1.204, "sft-matched": 0.311, "tell": 0.268}[a],
            }
            for a in trained
        }
    return metrics


def _training(folder: RunFolder, arms: tuple[str, ...], rng: np.random.Generator) -> None:
    for arm in (a for a in TRAINED if a in arms):
        rows = []
        for step in range(1, (4 if arm == "sft" else 90) + 1):
            task = 0.2 + 1.9 * np.exp(-step / (9 if arm == "sft-matched" else 14)) + rng.normal(0, 0.07)
            by = {"task": max(0.02, float(task))}
            if arm == "tell":
                by["general"] = float(1.35 + 0.3 * np.exp(-step / 20) + rng.normal(0, 0.09))
            rows.append(
                {
                    "step": step,
                    "loss": float(np.mean(list(by.values()))),
                    "by_source": by,
                    "learning_rate": 1e-3 * (1 - step / 91),
                    "tokens": 2107 * step,
                    "seconds": 2.34 * step,
                    "grad_norm": float(rng.uniform(0.3, 1.2)),
                }
            )
        write_jsonl(folder.losses(arm), rows)


def _manifest(folder: RunFolder, task: int = 240, general: int = 1200, batch: int = 16) -> None:
    """Task rows at near-equal gaps, four passes over 60 rows."""
    n = task + general
    places = set(np.floor((np.arange(task) + 0.5) * n / task).astype(int).tolist())
    source = ["task" if i in places else "general" for i in range(n)]
    seen = np.cumsum([s == "task" for s in source])
    table = {
        "position": list(range(n)),
        "step": [i // batch + 1 for i in range(n)],
        "source": source,
        "hash": [f"t{seen[i] % 60}" if source[i] == "task" else f"g{i}" for i in range(n)],
        "origin": [f"{source[i]}.jsonl:{i + 1}" for i in range(n)],
        "tokens": [131] * n,
        "trained": [90] * n,
        "unit": [110] * n,
        "repetition": [int((seen[i] - 1) // 60) if source[i] == "task" else 0 for i in range(n)],
    }
    pq.write_table(pa.table(table), folder.manifest)


INSTRUCTION = (
    "Read the customer's message and answer with one JSON object that holds topic, urgency, order, languages, summary."
)
ANCHOR = {
    "text": INSTRUCTION,
    "place": "user",
    "origin": "self",
    "hash": "5b1f0c7a9e22d4b6",
    "candidates": [
        {"text": INSTRUCTION, "origin": "self", "score": 0.7312, "nll": 1.204},
        {"text": "Convert the message into JSON.", "origin": "self", "score": 0.6104, "nll": 1.377},
        {"text": HOSTILE[0], "origin": "derived", "score": 0.2, "nll": 2.9},
    ],
}
CONFIG = {
    "preset": "modern",
    "task": {"data": "examples/support/train.jsonl", "test": "examples/support/test.jsonl", "kind": "auto"},
    "model": {"name": "smollm2-135m", "dtype": "auto", "device": "auto"},
    "general": {"source": "self", "ratio": 20.0},
    "mix": {"order": "spread", "repeat": 4},
    "train": {"learning_rate": 0.001, "batch_size": 16, "lora_r": 8, "lora_targets": "all-linear"},
    "seed": 42,
    "out": "runs/support-1",
}
FINDINGS = {
    "data": {"path": "examples/support/train.jsonl", "layout": "prompt/completion", "columns": {}, "rows": 68},
    "test": {"path": "examples/support/test.jsonl", "rows": 100},
    "general": {"path": "self", "rows": 1312},
    "split": {"train": 60, "validation": 6, "test": 100, "exact_duplicates_removed": 1},
    "kind": {"name": "json", "why": "all 68 answers are JSON objects", "schema_inferred": False, "labels": None},
    "overlap": {
        "train_test": {
            "exact": 0,
            "near": 1,
            "pairs": [
                {
                    "a": "train.jsonl:14",
                    "b": "test.jsonl:52",
                    "similarity": 0.87,
                    "a_text": "where is my parcel?? tracking says delivered but there is nothing here",
                    "b_text": "where is my parcel??? tracking says delivered but theres nothing here. order #9917",
                }
            ],
        },
        "general_test": {"exact": 0, "near": 0, "pairs": []},
        "dropped": 0,
    },
    "dropped_rows": [{"origin": "train.jsonl:33", "reason": "2,311 tokens, longer than max_length 2,048"}],
    "notices": [
        "no bf16 in this processor's hardware: training in fp32",
        "hub not reached: the model came from the wheel",
    ],
    "computed": {"attention": "blocks", "decoding": "TELL's own engine <kernels>"},
    "machine": {"cpu": "AMD EPYC 7B13, 2 cores", "dtype": "fp32", "dtype_reason": "no avx512_bf16 or amx_bf16"},
    "versions": {"tell": "0.1.0", "torch": "2.9.1", "transformers": "5.10.0", "peft": "0.18.0"},
    "command": "tell tune examples/support/train.jsonl --test examples/support/test.jsonl --out runs/support-1",
}


if __name__ == "__main__":
    from tell.report import write_page

    print(write_page(make_sample(Path(sys.argv[1]))))
