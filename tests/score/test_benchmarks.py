"""Local files of benchmarks in the harness's columns, and the mean over tasks."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tell.errors import TellError
from tell.score.benchmark_tasks import GROUPS, SHOTS, benchmark_tasks, group_mean, local_tasks, read_task, task_shots
from tell.score.intervals import difference, estimate
from tell.score.means import mean_metric

DATA = Path(os.environ.get("TELL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "high_resource"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no {DATA}: set TELL_DATA to the folder that holds high_resource"
)
# Rows and bytes that the cards of the hub's copies give: hails/agieval-*, for aqua-rat and gaokao-physics dmayhem93's.
PUBLISHED = {
    "agieval_sat_en": (206, 1019867),
    "agieval_sat_en_without_passage": (206, 155279),
    "agieval_math": (1000, 226532),
    "agieval_gaokao_mathcloze": (118, 24078),
    "agieval_aqua_rat": (254, 93696),
    "agieval_gaokao_physics": (200, 136757),
}


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as out:
        out.write(text)
    return path


def test_names_and_shots():
    assert benchmark_tasks(["gsm8k", "agieval_math"]) == {"gsm8k": ("gsm8k",), "agieval_math": ("agieval_math",)}
    assert len(benchmark_tasks(["agieval"])["agieval"]) == 21
    assert set(GROUPS["agieval"]) == {*GROUPS["agieval_en"], *GROUPS["agieval_cn"]}
    with pytest.raises(TellError, match=r"unknown benchmark 'openbokqa'; did you mean openbookqa\?"):
        benchmark_tasks(["openbokqa"])
    with pytest.raises(TellError, match="unknown benchmark ''"):
        benchmark_tasks(["gsm8k", ""])
    assert [task_shots(task, None) for task in ("gsm8k", "openbookqa", "agieval_sat_en")] == [5, 0, 0]
    assert [task_shots(task, 2) for task in ("gsm8k", "openbookqa", "agieval_sat_en")] == [2, 2, 0]


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        (
            "agieval_sat_math",
            {"passage": "P. ", "question": "What is 1 + 1?", "options": ["(A)1", "(B)2"], "label": "B"},
            {
                "query": "P. Q: What is 1 + 1? Answer Choices: (A)1 (B)2\nA: Among A through B, the answer is",
                "choices": ["(A)1", "(B)2"],
                "gold": [1],
            },
        ),
        (
            "agieval_gaokao_physics",
            {"passage": None, "question": "甲？", "options": ["(A)一", "(B)二", "(C)三"], "label": ["A", "C"]},
            {
                "query": "问题：甲？ 选项：(A)一 (B)二 (C)三\n答案：从A到C, 我们应选择",
                "choices": ["(A)一", "(B)二", "(C)三"],
                "gold": [0, 2],
            },
        ),
        (
            "agieval_math",
            {"passage": None, "question": "1 + 1?", "options": None, "label": None, "answer": "2"},
            {"query": "Q: 1 + 1?\nA: The answer is", "answer": "2"},
        ),
        (
            "openbookqa",
            {"question_stem": "The sun is", "choices": ["cold", "hot"], "answer": "B", "fact1": "..."},
            {
                "question_stem": "The sun is",
                "choices": {"text": ["cold", "hot"], "label": ["A", "B"]},
                "answerKey": "B",
            },
        ),
    ],
)
def test_rows_become_the_hubs(task, row, expected, tmp_path):
    place = tmp_path / (f"{task}_test.jsonl" if task in SHOTS else f"agieval/{task[8:].replace('_', '-')}.jsonl.gz")
    write(place, [row, row])
    found = read_task(task, tmp_path, shots=0)
    assert found.test == [expected, expected] and found.train == [] and found.dropped == 0
    write(place, [expected])  # the hub's own rows are taken as they are
    again = read_task(task, tmp_path, shots=0)
    assert again.test == [expected] and again.digest != found.digest


def test_rows_without_a_usable_key_are_left_out(tmp_path):
    row = {"question": "甲？", "options": ["(A)一", "(B)二"]}
    rows = [{**row, "label": label} for label in (["A", "。"], [], "A B", None, ["C"])]
    write(tmp_path / "agieval/jec-qa-ca.jsonl", rows)
    found = read_task("agieval_jec_qa_ca", tmp_path, shots=0)
    assert [row["gold"] for row in found.test] == [[0, 1]] and found.dropped == 4


def test_bad_files(tmp_path):
    with pytest.raises(TellError, match="no such folder"):
        local_tasks(benchmark_tasks(["gsm8k"]), tmp_path / "nowhere")
    with pytest.raises(TellError, match=r"has no file for agieval\. Put e\.g\. agieval/gaokao-biology\.jsonl there"):
        local_tasks(benchmark_tasks(["agieval"]), tmp_path)
    write(tmp_path / "agieval/sat-en.jsonl", [{"question": "?", "options": ["a", "b"], "label": "A"}])
    assert local_tasks(benchmark_tasks(["agieval"]), tmp_path) == {"agieval": ("agieval_sat_en",)}
    with pytest.raises(TellError, match="has no file for "):
        local_tasks({"": ("gsm8k",)}, tmp_path)
    write(tmp_path / "gsm8k_test.jsonl", [{"question": "?", "answer": "#### 1"}])
    assert read_task("gsm8k", tmp_path, shots=0).train == []
    with pytest.raises(TellError, match=r"gsm8k_train\.jsonl: no such file"):
        read_task("gsm8k", tmp_path, shots=2)
    write(tmp_path / "gsm8k_train.jsonl", [{"question": "?", "answer": "#### 1"}])
    with pytest.raises(TellError, match=r"gsm8k_train\.jsonl: has 1 usable rows"):
        read_task("gsm8k", tmp_path, shots=2)
    write(tmp_path / "gsm8k_test.jsonl", [{"question": "?", "answer": "#### 1"}, {"prompt": "?"}])
    with pytest.raises(TellError, match=r"gsm8k_test\.jsonl:2: has no column question\. Columns of this row: prompt"):
        read_task("gsm8k", tmp_path, shots=0)
    write(tmp_path / "openbookqa_test.jsonl", [{"question_stem": "?", "choices": ["a", "b"], "answer": "C"}])
    with pytest.raises(TellError, match="the answer 'C' is not one of A, B"):
        read_task("openbookqa", tmp_path, shots=0)


def test_a_group_is_the_mean_of_its_tasks_means():
    """Tasks weigh the same, rows do not; a difference pairs the same questions."""
    rng = np.random.default_rng(0)
    before = [mean_metric((rng.random(n) < p).astype(float)) for n, p in ((10, 0.2), (200, 0.5), (40, 0.8))]
    after = [mean_metric(task.per_row) for task in before]
    after[0] = mean_metric(np.ones(10))
    group, changed = group_mean(before), group_mean(after)
    assert group.value == pytest.approx(np.mean([task.value for task in before]))
    found = estimate(group, seed=1)
    assert found["n"] == 250 and found["ci"][0] < found["value"] < found["ci"][1]
    # by formula, of the mean of three independent means
    spread = 1.96 / 3 * np.sqrt(sum(t.per_row.var() / len(t.per_row) for t in before))
    assert (found["ci"][1] - found["ci"][0]) / 2 == pytest.approx(spread, rel=0.1)
    gap = difference(changed, group, seed=1)
    assert gap["value"] == pytest.approx((1 - before[0].value) / 3, abs=1e-6)
    assert gap["ci"][0] > 0 and gap["ci"][1] - gap["ci"][0] < found["ci"][1] - found["ci"][0]
    assert difference(group, group, seed=1)["ci"] == [0, 0]
    alone = group_mean(before[:1])
    assert alone is before[0]


@needs_data
@pytest.mark.parametrize("task", PUBLISHED)
def test_published_files_become_what_the_hub_holds(task):
    from datasets import Dataset

    rows = read_task(task, DATA, shots=0).test
    assert (len(rows), Dataset.from_list(rows).data.nbytes) == PUBLISHED[task]
