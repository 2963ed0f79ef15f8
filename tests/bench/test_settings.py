"""The search for a peer's best settings, and what is kept of it."""

from __future__ import annotations

import pytest
from bench.__main__ import parse
from bench.drive import Worker
from bench.plan import make_instructions
from bench.settings import DECODE_START, find_best, recall, remember, search, train_choices, train_start
from bench.train import flops_per_token

from tell.errors import TellError


def test_search_keeps_the_best_and_survives_what_fails():
    def speed(setting):
        if setting["attention"] == "eager":
            return None
        return 100 / setting["micro"] + 10 * setting["autocast"]

    start = train_start("trl")
    best, tries = search(start, train_choices("trl", 16, bf16=True), speed)
    assert best == {**start, "autocast": True}
    assert tries[0] == {"setting": start, "tokens_per_s": 100.0}
    assert [t["tokens_per_s"] for t in tries if t["setting"]["attention"] == "eager"] == [None]
    assert len({str(t["setting"]) for t in tries}) == len(tries)


@pytest.mark.parametrize(("speeds", "best"), [((100, 95), 16), ((100, 95, 110), 64), ((100, 79, 110), 16)])
def test_search_goes_on_past_what_is_a_little_slower(speeds, best):
    given = iter(map(float, speeds))
    found, tries = search(DECODE_START, [[{"batch": 32}, {"batch": 64}][: len(speeds) - 1]], lambda _: next(given))
    assert found["batch"] == best
    assert len(tries) == (2 if 79 in speeds else len(speeds))


@pytest.mark.parametrize("engine", ["trl", "transformers", "llamafactory", "swift"])
@pytest.mark.parametrize("batch", [1, 4, 6, 16])
def test_every_try_fills_a_step(engine, batch):
    tried = []
    search(train_start(engine), train_choices(engine, batch, bf16=False), lambda s: tried.append(s) or 1.0)
    assert tried and all(batch % setting["micro"] == 0 for setting in tried)
    assert {s["padding_free"] for s in tried} <= ({False, True} if engine in ("trl", "transformers") else {False})


def test_what_was_found_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path))
    assert recall("a") is None
    remember("a", {"setting": {"micro": 2}, "tries": []})
    remember("b", {"setting": {"micro": 4}, "tries": []})
    assert recall("a") == {"setting": {"micro": 2}, "tries": []}


def test_an_engine_that_runs_with_no_setting_is_refused_and_nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    started = []

    def launch():
        started.append(Worker("lost", "no_such_engine", {}, tmp_path))
        return started[-1]

    def measure(worker, setting):
        return worker.ask(do="turn")["seconds"]

    with pytest.raises(TellError, match=r"none of its settings ran .*no_such_engine"):
        find_best("key", "lost", DECODE_START, [[{"batch": 32}]], launch, measure, anew=False)
    assert len(started) == 2 and all(worker.process.poll() is not None for worker in started)
    assert recall("key") is None
    remember("key", {"setting": {"batch": 64}, "tries": []})
    found = find_best("key", "lost", DECODE_START, [], launch, measure, anew=False)
    assert found == ({"batch": 64}, []) and len(started) == 2
    with pytest.raises(TellError, match="none of its settings ran"):
        find_best("key", "lost", DECODE_START, [], launch, measure, anew=True)


def test_flops_count_the_output_layer_where_it_is_trained():
    import numpy as np
    from bench.rows import Rows

    rows = Rows(np.zeros(10, np.int32), np.array([0, 4, 10]), np.array([2, 3]), np.array([False, False]))
    assert flops_per_token(rows, 100, 50) == 400 + 200 * 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--only", "trian"], "trian"), (["--peers", "axolotl"], "axolotl"), (["--turns", "0"], "--turns")],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(TellError, match=named):
        parse(arguments)


def test_parts_and_peers_are_narrowed():
    options, as_json = parse(["--only", "train,plan", "--peers", "none", "--json"])
    assert options.only == ("train", "plan") and options.peers == () and as_json


def test_instructions_are_alpaca_like():
    rows = make_instructions(500, 0)
    assert all(row["instruction"] and row["output"] for row in rows)
    assert 150 < sum(bool(row["input"]) for row in rows) < 250
    assert len({row["instruction"] for row in rows}) > 480
    assert rows == make_instructions(500, 0)
