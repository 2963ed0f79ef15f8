"""A few questions of each benchmark: files as published, and the same rows as the hub's datasets hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TOPICS = ("sun", "moon", "sea", "wind", "stone", "tree")
_SUMS = [
    {
        "question": f"Ann has {n} pens and gets {n + 1}. How many?",
        "answer": f"{n} + {n + 1} = {2 * n + 1}\n#### {2 * n + 1}",
    }
    for n in range(1, 7)
]
_BOOK = [
    {
        "question_stem": f"The {topic} is",
        "choices": ["small", f"a {topic}", "never there", "blue"],
        "answer": "ABCD"[i % 4],
    }
    for i, topic in enumerate(_TOPICS)
]
_SAT = [
    {
        "passage": "",
        "question": f"What is {n} + {n}?",
        "options": [f"({c}){n + k}" for k, c in enumerate("ABCD")],
        "label": "B",
    }
    for n in range(1, 7)
]
_LAW = [
    {"passage": None, "question": "下列哪些正确?", "options": ["(A)甲", "(B)乙", "(C)丙", "(D)丁"], "label": ["A", "C"]}
] * 3
_MATH = [
    {"passage": None, "question": f"Find ${n}+1$.", "options": None, "label": None, "answer": str(n + 1)}
    for n in range(3)
]
FILES: dict[str, list[dict]] = {
    "gsm8k_test.jsonl": _SUMS[:4],
    "gsm8k_train.jsonl": _SUMS[2:],
    "openbookqa_test.jsonl": _BOOK[:4],
    "openbookqa_train.jsonl": _BOOK[3:],
    "agieval/sat-math.jsonl": _SAT,
    "agieval/jec-qa-kd.jsonl": _LAW,
    "agieval/math.jsonl": _MATH,
}


def _book(rows: list[dict]) -> list[dict]:
    return [
        {
            "id": str(i),
            "question_stem": row["question_stem"],
            "choices": {"text": row["choices"], "label": ["A", "B", "C", "D"]},
            "answerKey": row["answer"],
        }
        for i, row in enumerate(rows)
    ]


HUB: dict[str, dict[str, Any]] = {
    "gsm8k": {"path": "openai/gsm8k", "rows": {"train": _SUMS[2:], "test": _SUMS[:4]}},
    "openbookqa": {
        "path": "allenai/openbookqa",
        "rows": {"train": _book(_BOOK[3:]), "validation": _book(_BOOK[:1]), "test": _book(_BOOK[:4])},
    },
    "agieval_sat_math": {
        "path": "hails/agieval-sat-math",
        "rows": {
            "test": [
                {
                    "query": f"Q: What is {n} + {n}? Answer Choices: (A){n} (B){n + 1} (C){n + 2} (D){n + 3}\n"
                    "A: Among A through D, the answer is",
                    "choices": [f"(A){n}", f"(B){n + 1}", f"(C){n + 2}", f"(D){n + 3}"],
                    "gold": [1],
                }
                for n in range(1, 7)
            ]
        },
    },
    "agieval_jec_qa_kd": {
        "path": "hails/agieval-jec-qa-kd",
        "rows": {
            "test": [
                {
                    "query": "问题：下列哪些正确? 选项：(A)甲 (B)乙 (C)丙 (D)丁\n答案：从A到D, 我们应选择",
                    "choices": ["(A)甲", "(B)乙", "(C)丙", "(D)丁"],
                    "gold": [0, 2],
                }
            ]
            * 3
        },
    },
    "agieval_math": {
        "path": "hails/agieval-math",
        "rows": {"test": [{"query": f"Q: Find ${n}+1$.\nA: The answer is", "answer": str(n + 1)} for n in range(3)]},
    },
}


def write_questions(folder: Path) -> Path:
    """Write `FILES` there."""
    for name, rows in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder
