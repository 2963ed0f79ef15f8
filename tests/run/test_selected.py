"""General rows that are selected or recast: which are drawn, what stays, and that a run comes back to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tell
from homes import home_with_kernels
from run.runs import PROBE, Killer, comparable, config_of, read
from tell.config import Config
from tell.data.recast import MARK
from tell.errors import Interrupted, TellError
from tell.files import read_jsonl
from tell.folder import RunFolder
from tell.mix.amount import drawing_order
from tell.mix.manifest import read_manifest
from tell.run.general_rows import General, read_general
from tell.run.prepare import Prepared, prepare
from tell.run.task import anchor_of, load_task

SELECTED = {"general": {"select": "similar"}}


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch) -> Path:
    home = home_with_kernels(tmp_path / "home")
    monkeypatch.setenv("TELL_HOME", str(home))
    return home


@pytest.fixture
def config(tiny_model, tmp_path):
    def make(name: str = "run", **sections) -> Config:
        return config_of(tiny_model("llama"), tmp_path / name, **sections)

    return make


def prepared_of(config: Config) -> Prepared:
    task = load_task(config)
    return prepare(task, anchor_of(config), read_general(task))


def general_origins(folder: RunFolder) -> list[str]:
    rows = read_manifest(folder.manifest).to_pylist()
    return [row["origin"] for row in rows if row["source"] == "general"]


def test_the_nearest_rows_are_drawn(config, tmp_path):
    """Ten general rows are the task's own prompts, the others the probe's: the ten are found."""
    task = read_jsonl(Path(config().task.data))[:40]
    near = [{"instruction": row["prompt"], "output": "Fine."} for row in task[20:30]]
    others = [{key: row[key] for key in ("instruction", "output")} for row in read_jsonl(PROBE)[:50]]
    rows = [*others, *near]
    np.random.default_rng(0).shuffle(rows)
    source = tmp_path / "general.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    general = {"source": str(source), "rows": 8}
    eval_ = {"arms": ["tell", "tell-selected"], "forgetting_rows": 4}
    folder = tell.tune(config(general=general, eval=eval_, task={"rows": 12}))
    made = prepared_of(config(general=general, eval=eval_, task={"rows": 12}))
    drawn = {arm: made.ingredients_of(arm).draw.indices for arm in ("tell", "tell-selected")}
    wanted = {i for i, name in enumerate(made.general.table.hashes) if rows_of(source)[name] in near}
    assert len(set(drawn["tell-selected"]) & wanted) >= 6 > len(set(drawn["tell"]) & wanted)
    assert not set(drawn["tell-selected"]) & set(made.general.held_out)
    assert len(drawn["tell"]) == len(drawn["tell-selected"]) == 8
    losses = {arm: read_jsonl(folder.general_losses(arm)) for arm in ("tell", "tell-selected")}
    assert [row["hash"] for row in losses["tell"]] == [row["hash"] for row in losses["tell-selected"]]
    pairs = read(folder.metrics)["differences"]
    assert "tell-selected - tell" in pairs


def rows_of(source: Path) -> dict[str, dict]:
    from tell.data.sources import load

    loaded = load(str(source), name="general")
    return {e.hash: {"instruction": e.question, "output": e.answer} for e in loaded.examples}


def test_a_run_that_selects_trains_on_what_the_arm_trains_on(config):
    """The key for the whole run, and the arm's setting: the same rows in the same places."""
    of_run = tell.tune(config("a", **SELECTED))
    of_arm = tell.tune(config("b", eval={"arms": ["base", "tell-selected"]}))
    assert general_origins(of_run) == general_origins(of_arm)
    plain = tell.tune(config("c"))
    assert sorted(general_origins(plain)) != sorted(general_origins(of_run))
    held = [[r["hash"] for r in read_jsonl(f.general_losses("base"))] for f in (of_run, of_arm, plain)]
    assert held[0] == held[1] == held[2]


@pytest.mark.parametrize("moment", ["hidden states of the general rows", "train tell", "train tell-selected"])
def test_resumed_equals_uninterrupted(config, own_home, moment):
    sections = {"eval": {"arms": ["base", "tell", "tell-selected", "tell-recast"]}, "train": {"checkpoint_every": 1}}
    whole = tell.tune(config("whole", **sections))
    shutil.rmtree(own_home / "nearest")
    shutil.rmtree(own_home / "states")
    with pytest.raises(Interrupted):
        tell.tune(config("run", **sections), display=Killer(moment, 1))
    folder = RunFolder(config("run").out)
    if moment != "hidden states of the general rows":
        shutil.rmtree(own_home)  # the run goes on elsewhere: its folder has the ranking

        def never(*args):
            raise AssertionError("ranked again")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tell.run.rank_general.rank_general", never)
            tell.tune(config("run", **sections), resume=True)
    else:
        assert not folder.nearest.exists()
        tell.tune(config("run", **sections), resume=True)
    assert comparable(read(whole.metrics)) == comparable(read(folder.metrics))
    assert read(whole.findings)["notices"] == read(folder.findings)["notices"]
    for arm in ("tell-selected", "tell-recast"):
        weights = [f.adapter_of(arm).weights.read_bytes() for f in (whole, folder)]
        assert weights[0] == weights[1]


def test_a_ranking_of_other_rows_is_not_used(config):
    folder = tell.tune(config("a", **SELECTED))
    with np.load(folder.nearest) as kept:
        order, key = kept["order"], str(kept["key"])
    from tell.run.known_ranking import read_ranking

    general = read_general(load_task(config()))
    assert read_ranking(folder.nearest, key, general).tolist() == order.tolist()
    assert read_ranking(folder.nearest, "another", general) is None
    np.savez(folder.nearest, order=order[:-1], key=key)
    assert read_ranking(folder.nearest, key, general) is None
    folder.nearest.write_bytes(b"PK nothing")
    assert read_ranking(folder.nearest, key, general) is None


def test_a_plan_counts_a_random_draw_until_the_rows_are_ranked(config):
    asked = config(**SELECTED)
    before = tell.plan(asked)
    assert any("a random draw is counted" in text for text in before["notices"])
    folder = tell.tune(asked)
    after = tell.plan(asked)
    assert not any("a random draw is counted" in text for text in after["notices"])
    assert after["mixture"] == read(folder.plan)["mixture"] != before["mixture"]
    assert before["predicted"]["writing_seconds"] > 0 == after["predicted"]["writing_seconds"]
    other = tell.plan(config(**SELECTED, seed=8))  # another draw of task rows, another ranking
    assert any("a random draw is counted" in text for text in other["notices"])


def test_states_are_shared_by_runs_of_other_seeds(config, own_home):
    for seed in (7, 8):
        tell.tune(config(f"run{seed}", **SELECTED, seed=seed))
    assert len(list((own_home / "states").iterdir())) == 1 and len(list((own_home / "nearest").iterdir())) == 2


@pytest.mark.parametrize("rows", [60, 61, 200])
def test_a_pool_that_is_drawn_whole_is_not_ranked(config, own_home, rows):
    pool = len(read_general(load_task(config())).allowed)
    assert pool == 60
    general = {"rows": rows}
    folder = tell.tune(config(general=general, eval={"arms": ["base", "tell", "tell-selected"]}))
    notices = read(folder.findings)["notices"]
    assert any("general.select: similar changes nothing, since all 60 general rows are drawn" in n for n in notices)
    assert read(folder.metrics)["same"] == {"tell-selected": "tell"}
    assert not (own_home / "nearest").exists() and not folder.nearest.exists()


def test_one_task_row(config):
    folder = tell.tune(config(task={"rows": 1}, **SELECTED))
    assert read(folder.plan)["mixture"]["rows"] == {"task": 2, "general": 10}


@pytest.mark.parametrize("source", ["none", "zero"])
def test_without_general_rows(config, source):
    general = {"source": "none"} if source == "none" else {"rows": 0}
    arms = {"arms": ["base", "tell", "tell-selected", "tell-recast"]}
    folder = tell.tune(config(general=general, eval=arms))
    found = read(folder.findings)["notices"]
    assert any("general.select and general.recast change nothing" in text for text in found)
    assert read(folder.metrics)["same"] == {"tell-selected": "tell", "tell-recast": "tell"}
    assert read(folder.metrics)["mixture"]["rows"] == {"task": 12}


def test_a_source_without_rows_is_refused_as_before(config, tmp_path):
    source = tmp_path / "empty.jsonl"
    source.write_text("", encoding="utf-8")
    with pytest.raises(TellError, match=r"empty\.jsonl"):
        tell.tune(config(general={"source": str(source), "select": "similar"}))


def test_rows_that_the_model_writes(config, monkeypatch):
    """Written rows can be selected and recast too; a plan before that counts an estimate and says so."""
    monkeypatch.setattr("tell.run.self_written.is_good", lambda instruction, answer: None if answer else "empty")
    general = {"source": "self", "rows": 12, "select": "similar", "recast": 0.5}
    general["self"] = {"max_answer_tokens": 8, "max_prompt_tokens": 64}
    asked = config(general=general)
    assert any("not written yet; a random draw" in text for text in tell.plan(asked)["notices"])
    monkeypatch.setattr("tell.run.self_written.answered", short_answers)
    folder = tell.tune(asked)
    origins = general_origins(folder)
    assert len(origins) == 12 and sum(origin.endswith(MARK) for origin in origins) == 6
    assert folder.nearest.exists()
    assert tell.plan(asked)["mixture"] == read(folder.plan)["mixture"]


def short_answers(session, instructions, seed, thrown, moved=lambda part: None):
    """A tiny random model's answers do not end; these do."""
    return [f"Answer to {text[:20]}" for text in instructions]


@pytest.mark.parametrize(("example", "share"), [("support", 0.5), ("support", 1.0), ("reviews", 0.3)])
def test_a_share_is_recast(config, example, share):
    folder = tell.tune(config(example=example, general={"rows": 10, "recast": share}))
    origins = general_origins(folder)
    count = sum(origin.endswith(MARK) for origin in origins)
    assert len(origins) == 10 and count == round(10 * share)
    assert read(folder.findings)["general"]["recast"] == read(folder.plan)["general"]["recast"] == {"tell": count}
    text = f"tell: {count} of 10 general rows are recast into the form of the task"
    assert text in read(folder.findings)["notices"]
    assert (
        tell.plan(config(example=example, general={"rows": 10, "recast": share}))["mixture"]
        == read(folder.plan)["mixture"]
    )


def test_recast_rows_count_within_the_budget_of_tokens(config):
    """A recast row is longer than the row it is of; the tokens are met all the same."""
    general = {"rows": None, "tokens": 900}
    made = prepared_of(config(general=general, eval={"arms": ["tell", "tell-recast", "general"]}))
    tables = {arm: made.ingredients_of(arm) for arm in ("tell", "tell-recast")}
    units = {arm: int(found.general.table.unit[found.draw.indices].sum()) for arm, found in tables.items()}
    assert all(abs(total - 900) < 100 for total in units.values())
    assert len(tables["tell-recast"].draw) < len(tables["tell"].draw)
    assert made.recast.keys() == {"tell-recast"}
    counts = made.mixtures["tell-recast"][1].counts()
    assert abs(2 * made.recast["tell-recast"] - counts["rows"]["general"]) <= 1


def test_held_out_rows_are_never_recast(config):
    made = prepared_of(config(general={"recast": 1.0, "rows": 1000}))
    general: General = made.general
    plain = prepared_of(config(general={"rows": 1000})).general
    assert general.held_out.tolist() == plain.held_out.tolist()
    assert general.allowed.tolist() == plain.allowed.tolist()
    assert (general.recast[general.held_out] == -1).all()
    recast = general.recast[general.allowed]
    assert (recast >= 0).sum() > 50 and general.source_rows == len(plain.table)
    for row in general.allowed[recast >= 0][:20]:
        version = general.recast[row]
        assert general.table.origins[version] == general.table.origins[row] + MARK
        ids, mask = general.table.row(int(version))
        text = made.task.chat.backend.decode(ids[mask].tolist())
        assert json.loads(text)


def test_free_text_is_not_recast(config):
    folder = tell.tune(config(example="titles", general={"recast": 0.5}))
    assert not any(origin.endswith(MARK) for origin in general_origins(folder))
    assert any("a task of free text has no form" in text for text in read(folder.findings)["notices"])


def test_arms_get_as_few_general_rows_as_time_leaves_the_run(config):
    """--max-minutes cuts the run's draw; an arm with a draw of its own is cut to the same share."""
    from tell.run.time_budget import Extent

    made = prepared_of(config(general={"rows": 20}, eval={"arms": ["tell", "tell-recast", "tell-selected"]}))
    whole = Extent.of(made)
    cut = Extent(whole.arms, whole.test_rows, whole.repeat, whole.draw.first(5)).apply(made)
    for arm in ("tell", "tell-recast", "tell-selected"):
        assert cut.mixtures[arm][1].counts()["rows"]["general"] == 5
    assert Extent.of(cut).apply(cut).mixtures["tell-recast"][1].digest() == cut.mixtures["tell-recast"][1].digest()


@pytest.mark.parametrize("value", [-0.1, 1.5, "half"])
def test_a_share_beyond_one_is_refused(config, value):
    with pytest.raises(TellError, match=r"general\.recast"):
        config(general={"recast": value})


def test_more_rows_than_can_be_compared(config, monkeypatch):
    """Some of the general rows and of the task rows are compared, which is said; the other general rows come last."""
    monkeypatch.setattr("tell.run.known_ranking.MOST_BYTES", 4 * 2 * 64 * 20)  # the states of 20 rows: 2 layers of 64
    monkeypatch.setattr("tell.run.known_ranking.MOST_TASK_ROWS", 3)
    folder = tell.tune(config(general={"rows": 30, "select": "similar"}))
    notices = read(folder.findings)["notices"]
    assert any("20 of 60 general rows, drawn by seed, are compared" in text for text in notices)
    assert any("3 of 6 task rows, drawn by seed, are compared" in text for text in notices)
    with np.load(folder.nearest) as kept:
        order = kept["order"]
    drawn = read_general(load_task(config())).allowed[drawing_order(60, 7)]
    assert set(order[:20]) == set(drawn[:20]) and order[20:].tolist() == drawn[20:].tolist()
    assert len(general_origins(folder)) == 30
