"""Pseudo-labelled rows: from unlabelled prompts to arms trained on them, in runs, plans and studies."""

from __future__ import annotations

import html
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tell
from run.runs import EXAMPLES, Killer, comparable, config_of, open_session, read
from run.test_readouts import SCHEMA, teach, write_orders
from tell.cli.tables import plan_box
from tell.config import Config
from tell.data.kind import as_label
from tell.errors import Interrupted, TellError
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.mix.manifest import read_manifest
from tell.nested import merge
from tell.run import teach as teaching
from tell.run.written_prompts import REQUEST, _request
from tell.studies.cells import make_cell

ARMS = ["sft-matched", "sft-pseudo", "sft-pseudo-free", "tell", "tell-free", "tell-pseudo", "tell-pseudo-free"]

TEACHERS = {"tell-pseudo": "tell", "sft-pseudo": "sft-matched"}
GREEDY = {"greedy": True, "repetition_penalty": 1.0, "max_new_tokens": 24, "closed": "fused"}


def rows_of(example: str, part: str = "train") -> list[dict]:
    return read_jsonl(EXAMPLES / example / f"{part}.jsonl")


def configured(model: Path, out: Path | None, example: str = "reviews", **sections) -> Config:
    given = {"task": {"rows": 12, "test_rows": 6}, "mix": {"repeat": 3}, "generate": GREEDY, "eval": {"arms": ARMS}}
    return config_of(model, out, example=example, **merge(given, sections))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A label task with a file of prompts: training rows, of which the budget leaves some, and some test rows."""
    root = tmp_path_factory.mktemp("pseudo")
    given = [{"text": row["text"]} for row in [*rows_of("reviews"), *rows_of("reviews", "test")[:4]]]
    path = write_rows(root / "prompts.jsonl", given)
    config = configured(tiny_model("qwen3"), root / "run", task={"unlabelled": path})
    return tell.tune(config), config


@pytest.fixture(scope="module")
def orders(tiny_model, tmp_path_factory):
    """A JSON task whose form the model knows, and whose fields its states tell; 30 prompts, all fields closed."""
    root = tmp_path_factory.mktemp("orders")
    torch.manual_seed(0)
    model = teach(tiny_model("llama"), root / "model", write_orders(root / "form.jsonl", 400, seed=1, told=False), 300)
    for name, n, seed in (("train", 20, 2), ("test", 8, 3), ("prompts", 30, 4)):
        write_orders(root / f"{name}.jsonl", n, seed=seed)
    (root / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    task = {"data": str(root / "train.jsonl"), "test": str(root / "test.jsonl"), "schema": str(root / "schema.json")}
    task |= {"unlabelled": str(root / "prompts.jsonl"), "rows": 20, "test_rows": 8}
    sections = {"mix": {"pseudo": 1}, "generate": {"max_new_tokens": 120}, "train": {"learning_rate": 1e-3}}
    arms = {"arms": ["tell-pseudo", "tell-pseudo-free"]}
    config = configured(model, root / "run", "support", task=task, eval=arms, **sections)
    return tell.tune(config), config


def test_a_run_with_and_without_the_readout(made):
    folder, _ = made
    metrics = read(folder.metrics)
    assert set(metrics["arms"]) == set(ARMS) and not metrics["failed"]
    assert set(metrics["train"]["arms"]) == {"tell", "sft-matched", *TEACHERS} and metrics["train"]["arm"] == "tell"
    assert {arm: found["teacher"] for arm, found in metrics["pseudo"].items()} == TEACHERS
    for pair in ("tell-pseudo-free - tell-free", "sft-pseudo-free - sft-matched", "tell-pseudo - tell"):
        assert pair in metrics["differences"]
    page = html.unescape(folder.report.read_text(encoding="utf-8"))
    assert "Unlabelled prompts, answered with the readout" in page
    one, other = (load_file(folder.adapter_of(arm).weights) for arm in ("tell", "tell-pseudo"))
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert read(folder.adapter_of("tell-pseudo").notes)["anchor"]["text"] == "Positive, negative or mixed?"


def test_no_prompt_is_a_copy_of_a_task_row(made):
    """Not even of a test row that is not scored; what is left is all answered, and its rows carry labels."""
    folder, _ = made
    texts = {row["text"] for row in rows_of("reviews", "test")}
    trained = [row["prompt"] for row in read_jsonl(folder.prediction("tell"))]
    labels = set(read(folder.findings)["kind"]["labels"])
    for teacher in TEACHERS.values():
        rows = read_jsonl(folder.pseudo_labels(teacher))
        asked = [row["prompt"][-1]["content"] for row in rows]
        assert len(set(asked)) == len(asked) == 12 and not texts & {*asked} and not {*trained} & {*asked}
        assert all(as_label(row["answer"]) in labels and row["why"] is None and 0 < row["weight"] <= 1 for row in rows)
    notices = " ".join(read(folder.findings)["notices"])
    assert "4 equal or nearly equal a test row, 12 equal or nearly equal a training or validation row" in notices
    assert "12 unlabelled prompts can be used, fewer than the 48 requested (4 per task row)" in notices


def test_each_prompt_occurs_half_as_often_as_a_task_row(made):
    folder, _ = made
    metrics = read(folder.metrics)
    for arm, teacher in TEACHERS.items():
        mixture = metrics["pseudo"][arm]["mixture"]
        manifest = read_manifest(folder.pseudo_manifest(arm)).to_pylist()
        assert Counter(row["source"] for row in manifest) == mixture["rows"]
        times = Counter(row["hash"] for row in manifest if row["source"] == "pseudo")
        assert len(times) == mixture["unique_rows"]["pseudo"] == metrics["pseudo"][arm]["kept"] == 12
        log = read_jsonl(folder.losses(arm))
        assert log[-1]["tokens"] == sum(row["tokens"] for row in manifest)
        assert {source for row in log for source in row["by_source"]} == {*mixture["rows"]}
        assert teacher in metrics["train"]["arms"]
    mixed = metrics["pseudo"]["tell-pseudo"]["mixture"]
    assert mixed["rows"] == {"task": 12 * 3, "general": 10, "pseudo": 12 * 2} and mixed["repeat"] == 3
    steps = {arm: found["steps"] for arm, found in metrics["train"]["arms"].items()}
    assert steps["sft-pseudo"] == steps["sft-matched"] == steps["tell"] < steps["tell-pseudo"]
    matched = metrics["pseudo"]["sft-pseudo"]["mixture"]["rows"]
    assert matched == {"task": round(46 * 36 / 60), "pseudo": 46 - round(46 * 36 / 60)}


def test_weights_are_the_readouts_where_it_tells_something(orders):
    folder, _ = orders
    metrics = read(folder.metrics)
    assert set(metrics["arms"]) == {"tell-pseudo", "tell-pseudo-free"}  # the teacher is trained all the same
    assert set(metrics["train"]["arms"]) == {"tell", "tell-pseudo"}
    facts = metrics["pseudo"]["tell-pseudo"]
    assert any(field["used"] for field in metrics["readout"])
    rows = read_jsonl(folder.pseudo_labels("tell"))
    kept = [row for row in rows if row["why"] is None]
    assert facts["prompts"] == len(rows) == 20 and facts["kept"] == len(kept) > 0  # mix.pseudo: one for each task row
    assert facts["left_out"] == dict(Counter(row["why"].partition(":")[0] for row in rows if row["why"]))
    assert facts["weighed_by"] == {"readout": len(kept)}
    assert facts["weight"] == pytest.approx(np.mean([row["weight"] for row in kept]), abs=1e-6)
    for row in kept:
        assert json.loads(row["answer"])["colour"] in SCHEMA["properties"]["colour"]["enum"]
        assert 0 < row["weight"] < 1
    assert len({row["weight"] for row in kept}) > len(kept) // 2


@pytest.mark.parametrize("stage", ["pseudo-label by tell", "train tell-pseudo", "answer sft-pseudo"])
def test_a_resumed_run_ends_as_if_never_stopped(stage, made, tmp_path):
    folder, config = made
    config = config.model_copy(update={"out": str(tmp_path / "again")})
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer(stage))
    again = tell.tune(config, resume=True)
    assert comparable(read(again.metrics)) == comparable(read(folder.metrics))
    for arm, teacher in TEACHERS.items():
        for path in (folder.pseudo_labels(teacher), folder.pseudo_manifest(arm), folder.adapter_of(arm).weights):
            assert (again.root / path.relative_to(folder.root)).read_bytes() == path.read_bytes()


def test_answers_are_taken_from_the_folder_and_not_asked_again(made, tmp_path):
    folder, config = made
    shutil.copytree(folder.root, tmp_path / "run")
    config = config.model_copy(update={"out": str(tmp_path / "run")})
    again = type(folder)(tmp_path / "run")
    shutil.rmtree(again.adapter_of("tell-pseudo").root)
    rows = read_jsonl(again.pseudo_labels("tell"))
    write_rows(again.pseudo_labels("tell"), rows[:5])
    for arm in ("tell-pseudo", "tell-pseudo-free"):
        again.prediction(arm).unlink()
    tell.tune(config, resume=True)
    assert read(again.metrics)["pseudo"]["tell-pseudo"]["kept"] == 5


def test_damaged_answers_are_named(made, tmp_path):
    folder, config = made
    shutil.copytree(folder.root, tmp_path / "run")
    again = type(folder)(tmp_path / "run")
    write_rows(again.pseudo_labels("tell"), [{"prompt": 1}])
    with pytest.raises(TellError, match="has damaged files") as error:
        tell.tune(config.model_copy(update={"out": str(again.root)}), resume=True)
    assert str(error.value.where).endswith("tell.jsonl")


def test_the_run_can_be_scored_again(made):
    folder, _ = made
    assert tell.evaluate(folder.root) == json.loads(json.dumps(read(folder.metrics)))


def test_a_plan_counts_them(made):
    folder, config = made
    plan = tell.plan(config)
    console = Console(width=200, record=True)
    console.print(plan_box(plan))
    assert "tell-pseudo: 24 pseudo-labelled rows, of 12 prompts" in console.export_text()
    found, real = plan["pseudo"]["tell-pseudo"], read(folder.metrics)["pseudo"]["tell-pseudo"]
    assert found["estimated"] and found["prompts"] == 12 and found["teacher"] == "tell"
    assert found["mixture"]["rows"] == real["mixture"]["rows"]
    assert plan["arms"]["tell-pseudo"]["steps"] == read(folder.metrics)["train"]["arms"]["tell-pseudo"]["steps"]
    assert read(folder.plan)["pseudo"] == plan["pseudo"]
    alone = tell.plan(configured(Path(config.model.name), None, eval={"arms": ["tell-pseudo-free"]}))
    assert alone["pseudo"]["tell-pseudo"]["source"] == "written by the model" and {*alone["arms"]} == {
        "tell",
        "tell-pseudo",
    }
    less = tell.plan(configured(Path(config.model.name), None, eval={"arms": ["tell"]}))
    assert "pseudo" not in less and less["predicted"]["seconds"] < alone["predicted"]["seconds"]


def test_without_an_arm_for_them_they_are_not_used(made):
    _, config = made
    config = configured(
        Path(config.model.name), None, task={"unlabelled": config.task.unlabelled}, eval={"arms": ["tell"]}
    )
    assert any("task.unlabelled is not used" in text for text in tell.plan(config)["notices"])
    config = configured(Path(config.model.name), None, mix={"pseudo": 2}, eval={"arms": ["tell"]})
    assert any("mix.pseudo is not used" in text for text in tell.plan(config)["notices"])


def test_a_file_of_test_rows_is_refused_before_anything_is_written(made, tmp_path):
    _, config = made
    test = str(EXAMPLES / "reviews/test.jsonl")
    config = configured(Path(config.model.name), tmp_path / "run", task={"unlabelled": test})
    for do in (tell.tune, tell.plan):
        with pytest.raises(
            TellError, match="none of the 24 unlabelled prompts can be used: 24 equal or nearly equal a t"
        ):
            do(config)
    assert not (tmp_path / "run").exists()


def test_an_arm_whose_teacher_has_no_valid_answer_is_left_out(tiny_model, tmp_path):
    """A random model writes no title within the limit, and no field is closed."""
    prompts = {"unlabelled": write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"A text about {x}."} for x in "abc"])}
    arms = {"arms": ["tell", "tell-pseudo"]}
    config = configured(tiny_model("llama"), tmp_path / "run", "titles", task=prompts, eval=arms)
    folder = tell.tune(config)
    metrics = read(folder.metrics)
    assert list(metrics["arms"]) == ["tell"] and "pseudo" not in metrics
    assert metrics["failed"] == {"tell-pseudo": "tell has no valid answer for it"}
    rows = read_jsonl(folder.pseudo_labels("tell"))
    assert rows and {row["why"] for row in rows} == {"cut off by the limit"}
    arms = {"arms": ["tell-pseudo"]}
    alone = configured(tiny_model("llama"), tmp_path / "alone", "titles", task=prompts, eval=arms)
    with pytest.raises(TellError, match="no answer to an unlabelled prompt can be trained on"):
        tell.tune(alone)


def test_prompts_that_the_model_writes_are_weighed_by_tokens_where_no_readout_tells(tiny_model, tmp_path):
    """Labels are decided, but the random model's states tell nothing of them, so the readout is not asked."""
    config = configured(tiny_model("llama"), tmp_path / "run", eval={"arms": ["tell", "tell-pseudo"]})
    folder = tell.tune(config)
    metrics = read(folder.metrics)
    facts = metrics["pseudo"]["tell-pseudo"]
    assert facts["kept"] and facts["weighed_by"] == {"tokens": facts["kept"]} and not metrics["readout"][0]["used"]
    rows = read_jsonl(folder.pseudo_labels("tell"))
    asked = [row["prompt"][-1]["content"] for row in rows]
    assert len({text.casefold() for text in asked}) == len(asked) <= 48
    assert not {*asked} & {row["text"] for part in ("train", "test") for row in rows_of("reviews", part)}
    assert {row["why"] for row in rows} == {None}
    notices = " ".join(read(folder.findings)["notices"])
    assert f"the model wrote {len(rows)} prompts in the style of the task's" in notices
    assert read(folder.written) == {"prompts": "own"}
    other = tell.tune(config.model_copy(update={"out": str(tmp_path / "other")}))  # from the cache
    assert other.pseudo_labels("tell").read_bytes() == folder.pseudo_labels("tell").read_bytes()


def test_all_teachers_ask_prompts_of_one_engine(tmp_path, monkeypatch):
    """Also where another one decodes by the time of the second, as after a resumption or where vLLM gives up."""
    asked = []

    def write(session, task, wanted, engine):
        asked.append((session.engine.name, wanted, engine))
        return list(range(wanted)), {"asked": 128, "thrown": {}, "engine": engine or session.engine.name}

    monkeypatch.setattr(teaching, "write_prompts", write)
    pseudo = {"tell": SimpleNamespace(wanted=5, prompts=None), "sft-matched": SimpleNamespace(wanted=9, prompts=None)}
    prepared = SimpleNamespace(pseudo=pseudo, task=SimpleNamespace(notices={1}))
    for (teacher, planned), name in zip(pseudo.items(), ("vllm", "own"), strict=True):
        session = SimpleNamespace(engine=SimpleNamespace(name=name))
        found = teaching._prompts(prepared, planned, session, RunFolder(tmp_path))
        assert found == list(range(pseudo[teacher].wanted))
    assert asked == [("vllm", 9, None), ("own", 9, "vllm")]


def test_a_cell_of_a_study_trains_the_teacher(made, tmp_path):
    folder, config = made
    cell = make_cell(config, "tell-pseudo", ["tell-pseudo-free"])
    assert cell.config.mix.pseudo == 4 and cell.config.task.unlabelled == config.task.unlabelled
    assert make_cell(config, "tell").config.task.unlabelled is None
    found = read(tell.tune(cell.config.model_copy(update={"out": str(tmp_path / "cell")})).metrics)
    whole = read(folder.metrics)
    assert list(found["arms"]) == ["tell-pseudo", "tell-pseudo-free"]
    assert found["arms"] == {arm: whole["arms"][arm] for arm in found["arms"]}
    assert found["pseudo"]["tell-pseudo"] == whole["pseudo"]["tell-pseudo"]


def test_the_model_goes_on_with_a_list_of_training_prompts(tiny_model):
    session = open_session(tiny_model("llama"))
    texts = ["Where is my parcel?", "The lamp is broken.", "Cancel my order."]
    ids, shown = _request(session, texts, room=400)
    asked = session.chat.decode(ids)
    assert shown == 3 and REQUEST in asked and "{" not in REQUEST
    assert asked.endswith("1. Where is my parcel?\n\n2. The lamp is broken.\n\n3. Cancel my order.\n\n4.")
    fewer, shown = _request(session, texts, room=len(ids))
    assert shown == 2 and len(fewer) < len(ids) and session.chat.decode(fewer).endswith("broken.\n\n3.")
    assert _request(session, texts, room=3) == ([], 0)
