"""Exemplars: other task rows in the prompts of every second repetition (``mix.exemplars``)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tell
from run.runs import Killer, comparable, config_of, read
from tell.anchor.anchor import Anchor
from tell.arm import TASK_SOURCES
from tell.data.example import Example, Message
from tell.errors import Interrupted
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.mix.manifest import read_manifest
from tell.names import ARMS
from tell.nested import merge
from tell.rows.template import ChatTokenizer
from tell.rows.tokenize import tokenize
from tell.run.answers import Prompting
from tell.run.exemplars import EXEMPLARS, Exemplars, _Shown
from tell.run.general_rows import read_general
from tell.run.prepare import Prepared, prepare
from tell.run.task import load_task, placed_anchor
from tell.run.time_budget import Extent
from tell.train.training_job import step_rows

ANCHOR = Anchor("Sort this mail.")
ARM = {"eval": {"arms": ["tell", "tell-exemplars", "sft-matched", "sft-exemplars"]}}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(n: int) -> list[dict]:
    return [{"prompt": f"Which colour has box {i}?", "completion": ["red", "green"][i % 2]} for i in range(n)]


def prepared_of(model: Path, tmp_path: Path, rows: list[dict], **sections) -> Prepared:
    """A run on rows of one's own, not trained."""
    data = write(tmp_path / "rows.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [{"prompt": "Which colour has a car?", "completion": "red"}] * 2)
    task = {"data": data, "test": test, "schema": None, "rows": None, "test_rows": None, "validation_fraction": 0}
    given = merge({"task": task, "mix": {"repeat": 4}, "general": {"rows": 8}, **ARM}, sections)
    loaded = load_task(config_of(model, **given))
    return prepare(loaded, placed_anchor(loaded), read_general(loaded))


def texts(prepared: Prepared, arm: str) -> list[tuple[str, str, str]]:
    """(source, whole text, trained text) of each row of an arm, in order."""
    tables, mixture = prepared.mixtures[arm]
    decode = prepared.task.chat.backend.decode
    out = []
    for source, row in zip(mixture.source, mixture.row, strict=True):
        ids, mask = tables[mixture.sources[source]].row(int(row))
        whole, trained = (decode(part.tolist(), skip_special_tokens=False) for part in (ids, ids[mask]))
        out.append((mixture.sources[source], whole, trained))
    return out


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "mistral"])
@pytest.mark.parametrize("place", ["user", "system"])
def test_a_row_begins_as_the_test_prompt_with_the_same_examples(family, place, tiny_model, tmp_path):
    """To the token, whatever the template does; then come the answer and its end, which alone are trained."""
    anchor = {"text": ANCHOR.text, "place": place}
    prepared = prepared_of(tiny_model(family), tmp_path, pairs(5), anchor=anchor)
    task, chat = prepared.task, prepared.task.chat
    shown = Exemplars(prepared.task_of("tell-exemplars"), prepared.anchor, prepared.table)
    drawn = shown._draw(1)
    epoch = shown._epoch(1)
    assert [len(entry.exemplars) for entry in drawn] == [3] * 5 and epoch.at.tolist() == [0, 1, 2, 3, 4]
    for i, entry in enumerate(drawn):
        prompting = Prompting(chat, prepared.anchor, (), 3, 10_000, task.config.seed, np.array([[2, 1, 0]]))
        prompts, used = prompting.prompts("icl", [entry.row], entry.exemplars)
        ids, mask = epoch.table.row(i)
        assert used == 3 and ids[: len(prompts[0])].tolist() == prompts[0]
        places, trained = np.flatnonzero(mask), ids[mask].tolist()
        assert places.tolist() == list(range(len(prompts[0]), int(places[-1]) + 1))
        assert trained[-1] in chat.stop_ids and epoch.table.trained[i] == len(trained)
        assert chat.answer(trained[:-1]).strip() == entry.row.answer
        assert not chat.decode(ids[int(places[-1]) + 1 :].tolist()).strip()  # white space, or the end of the text


def test_only_odd_repetitions_show_others_and_all_else_stays(tiny_model, tmp_path):
    prepared = prepared_of(tiny_model("llama"), tmp_path, pairs(6))
    (tables, mixture), (_, plain) = prepared.mixtures["tell-exemplars"], prepared.mixtures["tell"]
    assert mixture.sources == (*plain.sources, EXEMPLARS) and len(mixture) == len(plain)
    assert np.array_equal(mixture.repetition, plain.repetition)
    odd = (plain.source == 0) & (plain.repetition % 2 == 1)
    assert np.array_equal(mixture.source == 2, odd) and odd.sum() == 12
    assert np.array_equal(mixture.row[~odd], plain.row[~odd])
    hashes, origins = mixture.column("hashes"), mixture.column("origins")
    assert np.array_equal(origins, plain.column("origins"))  # in place of the same row
    assert not set(hashes[odd]) & set(plain.column("hashes"))
    assert np.array_equal(mixture.column("trained"), plain.column("trained"))
    found, before = texts(prepared, "tell-exemplars"), texts(prepared, "tell")
    for (source, whole, trained), (_, bare, answer) in zip(found, before, strict=True):
        assert trained == answer
        assert (source == EXEMPLARS) == (whole != bare)
        if source == EXEMPLARS:
            assert whole.count(ANCHOR.text) == 1 and whole.count("Which colour") == 4
            own = bare[bare.index("Which colour") :].split("?")[0]
            assert whole.count(own + "?") == 1 and whole.rindex("Which colour") == whole.index(own + "?")
    counts = mixture.counts()
    assert counts["rows"] == {"task": 12, "general": 8, EXEMPLARS: 12}
    assert counts["unique_rows"][EXEMPLARS] == 12 and counts["repeat"] == 4
    assert counts["ratio"] == plain.counts()["ratio"] > 0  # a repetition with exemplars is no general data
    assert tables.keys() == {"task", "general", EXEMPLARS} and mixture.digest() != plain.digest()
    assert not prepared.same and prepared.mixture_notices == []


def test_the_control_is_matched_in_rows(tiny_model, tmp_path):
    prepared = prepared_of(tiny_model("llama"), tmp_path, pairs(6))
    (_, tell_), (tables, sft), (_, plain) = (prepared.mixtures[a] for a in ("tell", "sft-exemplars", "sft-matched"))
    assert len(sft) == len(tell_) == len(plain) and sft.sources == ("task", EXEMPLARS)
    assert np.array_equal(sft.source == 1, plain.repetition % 2 == 1)
    assert tables["task"] is prepared.table
    of_tell = prepared.mixtures["tell-exemplars"][1]
    shared = set(of_tell.column("hashes")[of_tell.source == 2])
    assert shared <= set(sft.column("hashes")[sft.source == 1])  # the same rows show the same ones in both


@pytest.mark.parametrize("few", [2, 4])
def test_more_repetitions_extend_fewer_and_the_seed_decides(few, tiny_model, tmp_path):
    def rows(repeat: int, **more) -> list[str]:
        config = {"mix": {"repeat": repeat}, "general": {"source": "none"}, **more}
        prepared = prepared_of(tiny_model("llama"), tmp_path, pairs(7), **config)
        mixture = prepared.mixtures["tell-exemplars"][1]
        return list(mixture.column("hashes")[mixture.source == 1])

    less, more = rows(few), rows(8)
    assert more[: len(less)] == less == rows(few) and len(more) == 28
    assert len(set(more)) > 20  # each repetition draws anew
    assert rows(8, seed=8) != more


def test_what_fits_is_shown_and_the_rest_is_said(tiny_model, tmp_path):
    """The longest are left out first; a row with no room for one stays as it is."""
    rows = [*pairs(4), {"prompt": "Long: " + "again and again " * 40, "completion": "green"}]
    free = prepared_of(tiny_model("llama"), tmp_path, rows)
    long = int(free.table.tokens.max())
    limit = long + 3
    tight = prepared_of(tiny_model("llama"), tmp_path, rows, train={"max_length": limit, "too_long": "refuse"})
    tables, mixture = tight.mixtures["tell-exemplars"]
    assert max(table.tokens.max() for table in tables.values()) <= limit
    assert len(mixture) == len(free.mixtures["tell-exemplars"][1])
    odd = (mixture.source == 0) & (mixture.repetition % 2 == 1)
    assert odd.sum() and set(mixture.row[odd]) == {int(np.argmax(tight.table.tokens))}  # the long row, twice
    whole, cut = (Exemplars(p.task_of("tell-exemplars"), p.anchor, p.table)._epoch(1) for p in (free, tight))
    drawn = Exemplars(tight.task_of("tell-exemplars"), tight.anchor, tight.table)._draw(1)
    assert whole.shown.tolist() == [3] * 5 and cut.shown.max() <= 3 and cut.shown[4] == 0
    for i, entry in enumerate(drawn[:4]):
        assert cut.shown[i] == 3 - any(e.question.startswith("Long") for e in entry.exemplars)
    assert (said := [text for text in tight.mixture_notices if text.startswith("tell-exemplars: of 10 rows")])
    assert f"longer than max_length {limit}" in said[0] and "2 none" in said[0] and "rows.jsonl:" in said[0]
    assert (mixture.source == 2).sum() == 8


@pytest.mark.parametrize("rows, said", [(2, "at most 1 exemplars, not 3"), (3, "at most 2 exemplars, not 3")])
def test_more_exemplars_than_rows(rows, said, tiny_model, tmp_path):
    prepared = prepared_of(tiny_model("llama"), tmp_path, pairs(rows))
    found = [whole for source, whole, _ in texts(prepared, "tell-exemplars") if source == EXEMPLARS]
    assert {whole.count("Which colour") for whole in found} == {rows} and len(found) == 2 * rows
    notices = prepared.mixture_notices
    assert len(notices) == 2 and all(said in text for text in notices)  # of both trained arms
    assert {text.split(":")[0] for text in notices} == {"tell-exemplars", "sft-exemplars"}


@pytest.mark.parametrize("rows", [pairs(1), pairs(1) * 2, [*pairs(1), {**pairs(1)[0], "completion": "green"}]])
def test_nothing_to_show_is_the_run_without(rows, tiny_model, tmp_path):
    """One row, the same twice, or the same prompt with another answer: no row shows its own prompt."""
    arms = {"eval": {"arms": ["base", "tell", "tell-exemplars", "tell-exemplars-icl"]}}
    prepared = prepared_of(tiny_model("llama"), tmp_path, rows, **arms)
    assert prepared.mixtures["tell-exemplars"][1].digest() == prepared.mixtures["tell"][1].digest()
    assert prepared.same == {"tell-exemplars": "tell"} and prepared.arms == ["base", "tell"]
    assert any("rows show no exemplars: there is no other task row" in text for text in prepared.mixture_notices)
    prepared.check_arms()
    notices = prepared.task.notices.texts
    assert any(text.startswith("the arms tell and tell-exemplars are one run") for text in notices)
    assert "the arm tell-exemplars-icl is left out: its adapter is that of tell" in notices


def test_rows_that_are_not_repeated_show_nothing(tiny_model, tmp_path):
    prepared = prepared_of(tiny_model("llama"), tmp_path, pairs(4), mix={"repeat": 1})
    assert prepared.same["tell-exemplars"] == "tell"
    assert "tell-exemplars: no row shows exemplars: no task row is repeated" in prepared.mixture_notices


def test_turns_and_instructions(tiny_model, tmp_path):
    """Of a row with several turns its own answers are trained, of those that it shows none; system texts stay apart."""

    def talk(i: int, system: str) -> dict:
        turns = [("system", system), ("user", f"ask {i}"), ("assistant", f"first {i}"), ("user", f"more {i}")]
        return {"messages": [{"role": r, "content": c} for r, c in [*turns, ("assistant", f"last {i}")]]}

    rows = [talk(0, "Be brief."), talk(1, "Be brief."), talk(2, "Be polite.")]
    prepared = prepared_of(tiny_model("llama"), tmp_path, rows, general={"source": "none"})
    found = [row for row in texts(prepared, "tell-exemplars") if row[0] == EXEMPLARS]
    assert len(found) == 6
    for _, whole, trained in found:
        own = trained[len("first ")]
        assert [trained.count(f"first {i}") for i in range(3)] == [int(str(i) == own) for i in range(3)]
        assert [trained.count(f"last {i}") for i in range(3)] == [int(str(i) == own) for i in range(3)]
        assert "ask" not in trained and whole.rindex("ask ") == whole.index(f"ask {own}")
        assert sorted(whole.count(f"ask {i}") for i in range(3)) == [1, 1, 1]
        assert whole.count("Be brief.") == (1 if own != "2" else 2) and whole.count("Be polite.") == 1


def test_a_greeting_is_not_trained_behind_exemplars_either(tiny_model):
    chat = ChatTokenizer(tiny_model("llama"))
    turns = [Message("assistant", "hello"), Message("user", "ask"), Message("assistant", "answer")]
    own = Example.of(turns, source="task", origin="here")
    row = _Shown(own, [Example.pair("another", "thing")]).conversation()
    table = tokenize([row], chat, source=EXEMPLARS)
    ids, mask = table.row(0)
    assert chat.backend.decode(ids[mask].tolist(), skip_special_tokens=False) == "answer<|im_end|>"
    assert row.origin == "here" and row.answer == "answer"


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_exemplars_are_never_trained(loss_on, tiny_model, tmp_path):
    prepared = prepared_of(tiny_model("llama"), tmp_path, pairs(4), train={"loss_on": loss_on})
    for source, whole, trained in texts(prepared, "tell-exemplars"):
        assert ("Which colour" in trained) == (loss_on == "all" and source == "task")
        assert source not in TASK_SOURCES or "colour" in whole
    assert any("answer alone" in text for text in prepared.mixture_notices) == (loss_on == "all")


def test_the_run_can_have_them_too(tiny_model, tmp_path):
    """``mix.exemplars`` of the run counts for every arm that sets none itself; one epoch of SFT has none."""
    arms = {"eval": {"arms": ["sft", "sft-matched", "general", "tell", "tell-exemplars"]}, "mix": {"exemplars": 1}}
    prepared = prepared_of(tiny_model("llama"), tmp_path, pairs(4), **arms)
    sources = {arm: mixture.sources for arm, (_, mixture) in prepared.mixtures.items()}
    assert sources["sft"] == ("task",) and sources["general"] == ("general",)
    assert sources["sft-matched"] == ("task", EXEMPLARS) and sources["tell"] == ("task", "general", EXEMPLARS)
    for arm, count in (("tell", 2), ("tell-exemplars", 4)):
        found = [whole for source, whole, _ in texts(prepared, arm) if source == EXEMPLARS]
        assert {whole.count("Which colour") for whole in found} == {count}


def test_fixed_examples_of_test_prompts_change_nothing(tiny_model, tmp_path):
    """``task.shots`` are not in training rows, nor in the prompts of arms with examples in context."""
    digests = [
        prepared_of(tiny_model("llama"), tmp_path, pairs(5), task={"shots": n}).mixtures["tell-exemplars"][1].digest()
        for n in (0, 2)
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("example", ["support", "reviews", "titles"])
def test_any_kind_of_answer(example, tiny_model):
    plan = tell.plan(config_of(tiny_model("qwen3"), example=example, train={"max_length": 900}, **ARM))
    assert {arm: cost["rows"] for arm, cost in plan["arms"].items()} == dict.fromkeys(ARM["eval"]["arms"], 22)
    same = [("tell", "tell-exemplars"), ("sft-matched", "sft-exemplars")]
    for plain, shown in same:
        costs = [plan["arms"][arm] for arm in (plain, shown)]
        assert costs[0]["trained_tokens"] == costs[1]["trained_tokens"] and costs[0]["tokens"] < costs[1]["tokens"]
        assert costs[1]["tokens"] >= costs[1]["computed_tokens"] > costs[0]["computed_tokens"]


def test_rows_with_exemplars_weigh_as_task_rows(tiny_model, tmp_path):
    tables, mixture = prepared_of(tiny_model("llama"), tmp_path, pairs(4)).mixtures["tell-exemplars"]
    rows = step_rows(mixture, tables, 0, len(mixture))
    names = [mixture.sources[row.source] for row in rows]
    assert {name: {row.task for row, of in zip(rows, names, strict=True) if of == name} for name in names} == {
        "task": {True},
        EXEMPLARS: {True},
        "general": {False},
    }


def test_another_extent_makes_no_row_twice(tiny_model, tmp_path):
    """A time limit tries many; the largest comes first."""
    prepared = prepared_of(tiny_model("llama"), tmp_path, pairs(4), mix={"repeat": 6})
    assert prepared.mixtures and len(prepared.made) >= 3
    before = dict(prepared.made)
    shorter = replace(Extent.of(prepared), repeat=3).apply(prepared)
    mixture, whole = (p.mixtures["tell-exemplars"][1] for p in (shorter, prepared))
    assert shorter.made is prepared.made and prepared.made == before
    assert {*mixture.column("hashes")} < {*whole.column("hashes")}


RUN = {
    "eval": {
        "arms": ["icl", "tell", "tell-exemplars", "tell-exemplars-icl", "sft-exemplars", "sft-exemplars-icl"],
        "forgetting_rows": 0,
        "icl_select": "nearest",
    },
    "train": {"checkpoint_every": 2},
    "mix": {"repeat": 4},
    "general": {"rows": 6},
}


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """A label task, closed fields decided."""
    root = tmp_path_factory.mktemp("exemplars")

    def config(out: Path):
        return config_of(tiny_model("llama"), out, example="reviews", **RUN)

    return tell.tune(config(root / "run")), config


def test_a_run_is_as_planned(whole):
    folder, config = whole
    planned, done, metrics = tell.plan(config(None)), read(folder.plan), read(folder.metrics)
    assert planned["arms"].keys() == {"tell", "tell-exemplars", "sft-exemplars"}
    assert planned["mixture"] == done["mixture"] == metrics["mixture"]
    for arm, cost in planned["arms"].items():
        trained = metrics["train"]["arms"][arm]
        assert all(cost[key] == trained[key] for key in ("steps", "tokens", "trained_tokens", "flops")), arm
    assert set(metrics["arms"]) == set(RUN["eval"]["arms"])
    sources = [{*row["by_source"]} for row in read_jsonl(folder.losses("tell-exemplars"))]
    assert set().union(*sources) == {"task", "general", EXEMPLARS}
    answers = {arm: [row["answer"] for row in read_jsonl(folder.prediction(arm))] for arm in RUN["eval"]["arms"]}
    for arm in ("tell-exemplars", "tell-exemplars-icl", "sft-exemplars", "sft-exemplars-icl"):
        assert ARMS[arm].decides and {*answers[arm]} <= {"positive", "negative", "mixed"}, arm  # guided
    costs = metrics["eval"]["arms"]
    assert costs["tell-exemplars-icl"]["prompt_tokens"] == costs["icl"]["prompt_tokens"]
    assert costs["icl"]["prompt_tokens"] > costs["tell-exemplars"]["prompt_tokens"] == costs["tell"]["prompt_tokens"]
    html = folder.report.read_text(encoding="utf-8")
    assert "Exemplars in training" in html and "Exemplars at test time" in html
    again = tell.evaluate(folder.root)
    assert again["arms"] == metrics["arms"] and again["eval"] == metrics["eval"]
    other = tell.evaluate(folder.root, arms=["icl"], overrides=["eval.icl_select=random"])
    assert other["eval"]["arms"]["icl"] != metrics["eval"]["arms"]["icl"]


@pytest.mark.parametrize("moment", [("train tell-exemplars", 3), ("answer sft-exemplars-icl", 1)])
def test_resumed_equals_uninterrupted(whole, tmp_path, moment):
    folder, config = whole
    with pytest.raises(Interrupted):
        tell.tune(config(tmp_path / "run"), display=Killer(*moment))
    other = RunFolder(tmp_path / "run")
    tell.tune(config(other.root), resume=True)
    assert comparable(read(folder.metrics)) == comparable(read(other.metrics))
    assert read(folder.findings)["notices"] == read(other.findings)["notices"]
    for arm in ("tell-exemplars", "sft-exemplars"):
        a, b = (f.adapter_of(arm).weights.read_bytes() for f in (folder, other))
        assert a == b


def test_the_manifest_of_a_run_that_leads_with_exemplars(tiny_model, tmp_path):
    arms = {"eval": {"arms": ["tell-exemplars"], "forgetting_rows": 0}, "general": {"rows": 6}}
    folder = tell.tune(config_of(tiny_model("llama"), tmp_path / "run", example="reviews", **arms))
    manifest = read_manifest(folder.manifest).to_pydict()
    counts = read(folder.metrics)["mixture"]
    assert {s: manifest["source"].count(s) for s in set(manifest["source"])} == counts["rows"]
    assert counts["rows"] == {"task": 6, "general": 6, EXEMPLARS: 6}
    by_repetition = {r: s for s, r in zip(manifest["source"], manifest["repetition"], strict=True) if s != "general"}
    assert by_repetition == {0: "task", 1: EXEMPLARS}
    log = read_jsonl(folder.losses("tell-exemplars"))
    assert log[-1]["tokens"] == sum(manifest["tokens"]) == read(folder.plan)["train"]["tokens"]
