"""Reading a study's cells: what is there, what is missing, what is broken."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from studies.made import POINTS, make_study, outcome, study_of, write_cell
from tell.errors import TellError
from tell.files import write_jsonl
from tell.metric_names import canonical
from tell.score.intervals import newcombe_paired, wilson
from tell.score.means import mean_metric
from tell.score.text import TextScorer
from tell.studies.labels import unique_labels, value_name
from tell.studies.measured import Number
from tell.studies.results import number_of, read_results
from tell.studies.stats.results_table import keys_shown, lines, tabulated
from tell.studies.stats.seed_means import Bootstrap
from tell.studies.stats.shared_rows import SharedRows


def test_every_row_of_a_finished_study(tmp_path):
    study = read_results(make_study(tmp_path, loss=lambda arm, point: 1.7 + 0.2 * (arm == "sft")))
    assert len(study.outcomes) == len(study.rows) == 6 * 3 * 3 and not study.missing and not study.failed
    assert study.keys == ("general.tokens",) and study.primary == "schema_adherence"
    assert study.metrics() == ["schema_adherence"] and study.seeds == [42, 43, 44]
    sft = [o for o in study.outcomes if o.arm == "sft" and o.seed == 42]
    assert len(sft) == 6 and len({id(o.measured) for o in sft}) == 1  # one cell for all amounts
    measured = sft[0].measured
    assert measured.numbers["probe loss"].value == 1.9
    change = measured.numbers["probe loss change"]
    assert change.value == pytest.approx(0.2) and change.spread == pytest.approx(0.01, rel=1e-3)
    assert measured.costs == {
        "steps": 12, "tokens": 3456, "flops": 2.5e13, "learning_rate": 1e-3, "seconds": 60, 
        "flops_6nd": 6 * 1000 * 3456, "eval_flops": 1e13,
    }  # fmt: skip
    base = next(o.measured for o in study.outcomes if o.arm == "base")
    assert base.costs["flops"] == 0 and base.numbers["probe loss change"] == Number(0.0, 0.0)
    lines = (tmp_path / "cells" / sft[0].cell / "predictions/sft.jsonl").read_text().splitlines()
    assert measured.metrics["schema_adherence"].per_row.tolist() == [
        json.loads(line)["scores"]["schema_adherence"] for line in lines
    ]


def test_unfinished_and_broken_cells_are_counted(tmp_path):
    folder = make_study(tmp_path, states={("sft", 43): "waiting", ("base", 44): "running", ("tell", 44): "failed"})
    whole = read_results(folder)
    assert whole.missing == {"waiting": 6, "running": 6, "failed": 6}
    assert len(whole.failed) == 6 and set(whole.failed.values()) == {"out of memory <here>"}
    cells = [o.cell for o in whole.outcomes if o.arm == "tell" and o.seed == 42]
    shutil.rmtree(tmp_path / "cells" / cells[0])
    (tmp_path / "cells" / cells[1] / "metrics.json").write_text("{", encoding="utf-8")
    (tmp_path / "cells" / cells[2] / "predictions/tell.jsonl").write_text("{}\n", encoding="utf-8")
    study = read_results(folder)
    assert study.missing["unreadable"] == 3 and len(study.outcomes) == len(whole.outcomes) - 3


def test_an_arm_that_diverged_is_a_failure(tmp_path):
    folder = make_study(tmp_path, points=POINTS[:1], seeds=[42], arms=["sft"])
    (cell,) = (tmp_path / "cells").iterdir()
    metrics = json.loads((cell / "metrics.json").read_text())
    metrics |= {"arms": {}, "failed": {"sft": "training diverged at step 3"}}
    (cell / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    study = read_results(folder)
    assert not study.outcomes and study.failed == {cell.name: "training diverged at step 3"}
    assert study.primary == "" and study.metrics() == []


def test_metrics_alone_are_enough(tmp_path):
    """The repository keeps metrics.json of a cell, not its answers."""
    folder = make_study(tmp_path)
    whole = read_results(folder)
    for path in (tmp_path / "cells").rglob("predictions"):
        shutil.rmtree(path)
    study = read_results(folder)
    for a, b in zip(whole.outcomes, study.outcomes, strict=True):
        number = b.measured.numbers["schema_adherence"]
        assert number.value == pytest.approx(a.measured.metrics["schema_adherence"].value, abs=1e-6)
        assert number.spread == pytest.approx(0.03, rel=1e-3) and not b.measured.metrics and len(b.measured.hashes) == 0


def test_metrics_of_the_corpus_come_from_the_answers(tmp_path):
    """Corpus BLEU and chrF++ are no means of rows: they are scored again, and equal what the run wrote."""
    folder = make_study(tmp_path, points=POINTS[:1], seeds=[42], arms=["tell"])
    (cell,) = (tmp_path / "cells").iterdir()
    pairs = [("the cat sat down", "a cat sat down"), ("we left", "we left at noon"), ("no", "yes, it is")]
    found = TextScorer().score(*map(list, zip(*pairs, strict=True)))
    rows = [
        {
            "hash": str(i),
            "answer": a,
            "reference": r,
            "scores": {n: float(m.per_row[i]) for n, m in found.items()} | {"bleurt": 0.1 * i},
        }
        for i, (a, r) in enumerate(pairs)
    ]
    (cell / "predictions/tell.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    metrics = json.loads((cell / "metrics.json").read_text())
    scores = {name: {"value": metric.value, "ci": [0, 1], "n": 3} for name, metric in found.items()}
    scores |= {"bleurt": {"value": 0.1, "ci": [0, 0.2], "n": 3}, "human": {"value": 3.0, "ci": [2, 4], "n": 3}}
    metrics |= {"task": {"kind": "text", "primary": "chrf"}, "arms": {"tell": scores}}
    (cell / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    measured = read_results(folder).outcomes[0].measured
    assert set(measured.metrics) == {*found, "bleurt"}
    for name, metric in found.items():
        assert measured.metrics[name].value == pytest.approx(metric.value)
        np.testing.assert_array_equal(measured.metrics[name].stats, metric.stats)
    assert measured.numbers["human"].value == 3.0


def test_benchmarks_and_names(tmp_path):
    folder = make_study(
        tmp_path, points=POINTS[:1], seeds=[42], arms=["tell"], recipe={"metrics": ["probe", "benchmarks", "nothing"]}
    )
    (cell,) = (tmp_path / "cells").iterdir()
    metrics = json.loads((cell / "metrics.json").read_text())
    number = {"value": 0.3, "ci": [0.2, 0.4], "n": 40}
    metrics["benchmarks"] = {
        "settings": {"tasks": {"openbookqa": ["openbookqa"]}},
        "arms": {"base": {"openbookqa": number}, "tell": {"openbookqa": number, "openbookqa acc_norm": number}},
        "differences": {"tell - base": {"openbookqa": {"value": 0.0, "ci": [-0.05, 0.05], "n": 40}}},
    }
    (cell / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    study = read_results(folder)
    assert study.metrics() == ["probe loss", "benchmark openbookqa"]
    assert tabulated(study) == [
        *("probe loss", "probe loss change", "benchmark openbookqa", "benchmark openbookqa change", "answer_loss")
    ]
    assert study.outcomes[0].measured.numbers["benchmark openbookqa change"].spread == pytest.approx(0.0255, rel=0.01)
    assert canonical("general held out") == "general held out loss" and canonical("bleu") == "bleu"


def test_benchmarks_are_paired_by_question(tmp_path):
    """Two arms that change 60 of 120 answers alike and differ in 20: the difference is known best."""
    folder = make_study(tmp_path, points=POINTS[:1], seeds=[42], arms=["sft", "tell"])
    study = json.loads((folder / "study.json").read_text())
    rng = np.random.default_rng(3)
    right = {"base": rng.integers(0, 2, 120)}
    alike = np.where(np.arange(120) >= 60, 1 - right["base"], right["base"])
    right["sft"], right["tell"] = alike.copy(), alike.copy()
    right["sft"][:20], right["tell"][:20] = 0, 1

    def entry(values) -> dict:
        mean, reach = float(np.mean(values)), 1.96 * float(np.std(values)) / 120**0.5
        return {"value": mean, "ci": [mean - reach, mean + reach], "n": 120}

    for keep in (False, True):
        for row in study["rows"]:
            cell, arm = tmp_path / "cells" / row["cell"], row["arm"]
            metrics = json.loads((cell / "metrics.json").read_text())
            metrics["benchmarks"] = {
                "settings": {"tasks": {"openbookqa": ["openbookqa"]}},
                "arms": {a: {"openbookqa": entry(right[a])} for a in ("base", arm)},
                "differences": {f"{arm} - base": {"openbookqa": entry(right[arm] - right["base"])}},
            }
            (cell / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
            for a in ("base", arm) if keep else ():
                rows = [{"question": i, "hash": f"{i}", "scores": {"acc": int(x)}} for i, x in enumerate(right[a])]
                path = cell / "predictions" / "benchmarks" / a / "openbookqa.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_jsonl(path, rows)
        read = read_results(folder)
        of = {o.arm: o for o in read.outcomes}
        assert all((o.measured.numbers["benchmark openbookqa"].rows is not None) == keep for o in read.outcomes)
        level = Bootstrap(read, 4000).of([of["tell"]], "benchmark openbookqa")
        assert level.value == pytest.approx(np.mean(right["tell"]))
        gap = Bootstrap(read, 4000).difference([of["tell"]], [of["sft"]], "benchmark openbookqa")
        assert gap["value"] == pytest.approx(20 / 120, abs=1e-6)
        wide = float(np.ptp(gap["ci"]))
        paired = 2 * 1.96 * np.std(right["tell"] - right["sft"]) / 120**0.5
        assert wide == pytest.approx(paired, rel=0.1) if keep else wide > 2 * paired


def test_benchmarks_that_hardly_differ_are_not_known_exactly():
    """Forty questions answered alike, or all wrong: no resample differs, yet the truth may."""

    def group(right, arm, seed=1):
        low, high = wilson(0, 40)
        hashes = np.array([f"{i}" for i in range(40)])
        numbers = {}
        for name, values in (("benchmark b", right), ("benchmark b change", right - base)):
            rows = SharedRows("benchmarks", hashes, mean_metric(values))
            value = rows.metric.value
            numbers[name] = Number(value, (high - low) / (2 * 1.96), (value + low, value + high), rows)
        return outcome([1, 0], arm=arm, seed=seed, **numbers)

    base = np.zeros(40)
    none = [[group(base, arm, seed) for seed in (1, 2, 3)] for arm in ("tell", "sft")]
    drawn = Bootstrap(study_of([*none[0], *none[1]]), 2000)
    assert drawn.of(none[0], "benchmark b").summary()["ci"][1] > 0.02
    assert np.ptp(drawn.difference(*none, "benchmark b")["ci"]) > 0.05
    one = base.copy()
    one[0] = 1
    pair = [[group(one, "tell")], [group(base, "sft")]]
    gap = Bootstrap(study_of([*pair[0], *pair[1]]), 2000).difference(*pair, "benchmark b")
    assert gap["ci"] == pytest.approx(newcombe_paired(one, base), abs=1e-6) and gap["value"] == pytest.approx(1 / 40)


@pytest.mark.parametrize(("rows", "alone"), [({"task": 60}, True), ({"task": 60, "general": 9}, False), ({}, False)])
def test_what_was_trained_without_general_rows(tmp_path, rows, alone):
    folder = make_study(tmp_path, points=POINTS[:1], seeds=[42], arms=["tell"])
    (cell,) = (tmp_path / "cells").iterdir()
    metrics = json.loads((cell / "metrics.json").read_text()) | {"mixture": {"rows": rows}}
    (cell / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert [o.measured.alone for o in read_results(folder).outcomes] == [alone]


def test_files_of_one_name_are_unique_labels(tmp_path):
    """By their folders, where no other key does; one that goes along with them stays out of the table."""
    points = [
        {"general.source": f"${{data}}/{name}/train.jsonl", "anchor.text": f"@/d/{name}/anchor.txt"}
        for name in ("alpaca", "arc")
    ]
    made = make_study(tmp_path, points=points, arms=["base", "tell"], chance=lambda arm, point, seed: 0.5)
    study = read_results(made)
    assert keys_shown(study) == ["general.source"]
    table = lines(study, Bootstrap(study, 100))
    assert [line.point["general.source"] for line in table] == ["any", "alpaca/train.jsonl", "arc/train.jsonl"]
    assert {o.point["general.source"] for o in study.outcomes} == {p["general.source"] for p in points}
    anchors = ["auto", "none", "In the and/or/not style", "f.txt", "/x/f.txt", "/y/f.txt"]
    told = unique_labels([{"anchor.text": text} for text in anchors], ["anchor.text"])["anchor.text"]
    names = [value_name(told.get(text, text), "anchor.text") for text in anchors]
    assert names == ["automatic", "none", "In the and/or/not style", "f.txt", "x/f.txt", "y/f.txt"]
    mixed = unique_labels([{"a": ["q"], "b": 1}, {"a": "/x/f.txt"}, {"a": "/y/f.txt"}], ["a"])
    assert {key: named.label for key, named in mixed["a"].items()} == {"/x/f.txt": "x/f.txt", "/y/f.txt": "y/f.txt"}
    alike = unique_labels([{"a": "/x/1/f.txt", "b": n % 2, "c": n // 2} for n in range(4)], ["a", "b", "c"])
    assert alike == {}  # one file, however often
    same = unique_labels([{"a": "f.txt"}, {"a": "/f.txt"}, {"a": "@/f.txt"}], ["a"])["a"]
    assert [named.label for named in same.values()] == ["/f.txt", "@/f.txt"]  # as written, where nothing shorter does


def test_numbers_that_yaml_reads_as_text(tmp_path):
    assert [number_of(v) for v in ("3e4", "1.5", "auto", 2.0, None, [1])] == [30000, 1.5, "auto", 2, None, [1]]
    folder = make_study(tmp_path, points=[{"general.tokens": 30000}], seeds=[42])
    text = (folder / "study.json").read_text()
    (folder / "study.json").write_text(text.replace('"general.tokens": 30000', '"general.tokens": "3e4"'))
    assert {o.point["general.tokens"] for o in read_results(folder).outcomes} == {30000}


def test_what_is_no_study(tmp_path):
    with pytest.raises(TellError, match=r"study\.json: no such file.*tell study"):
        read_results(tmp_path)
    for text in ("{", "[]", '{"rows": []}'):
        (tmp_path / "study.json").write_text(text, encoding="utf-8")
        with pytest.raises(TellError, match="is not a study"):
            read_results(tmp_path)


def test_cells_elsewhere(tmp_path):
    folder = make_study(tmp_path / "a", points=POINTS[:1], seeds=[42], arms=["tell"])
    name = json.loads((folder / "study.json").read_text())["rows"][0]["cell"]
    write_cell(tmp_path / "b" / name, "tell", 0.9, 7, 5, 1.5)
    assert read_results(folder, tmp_path / "b").outcomes[0].measured.numbers["probe loss"].value == 1.5
