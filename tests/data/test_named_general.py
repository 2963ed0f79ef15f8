"""General data by name, against data sets in local folders, with and without a hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tell
from run.runs import config_of, read
from tell.cli.main import run as tell_command
from tell.config import make_config
from tell.data import named_general
from tell.data.general import SOURCES, GeneralSource, general_target, refuse_absent, resolve_source
from tell.data.named_general import READERS, GeneralSet, best_replies, general_sets, keep_set, streamed_tokens
from tell.data.sources import load
from tell.errors import TellError
from tell.run.claim import with_full_paths

ROWS = 6000


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GeneralSet:
    """A data set of the hub in a folder, sorted as real ones are; the hub answers."""
    folder = tmp_path / "hub"
    folder.mkdir()
    rows = [{"q": f"question {i}", "a": f"answer {i} " + "word " * 20, "part": i // 1000, "c": ""} for i in range(ROWS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("TELL_HOME", str(tmp_path / "home"))
    answers(monkeypatch, True)
    return GeneralSet(
        name="fake",
        hub=str(folder),
        revision="0123456789abcdef",
        columns="prompt=q,input=c,answer=a",
        rows=ROWS,
        languages="English",
        licence="CC0",
        about="made up",
    )


def answers(monkeypatch: pytest.MonkeyPatch, reachable: bool) -> None:
    monkeypatch.setattr(named_general, "hub_reachable", lambda: (reachable, "" if reachable else "no route"))


@pytest.fixture
def named(fake: GeneralSet, monkeypatch: pytest.MonkeyPatch) -> GeneralSet:
    monkeypatch.setitem(SOURCES, "fake", GeneralSource("fake", named=fake))
    return fake


def test_only_what_the_budget_needs_is_read_from_a_mixed_order(fake):
    kept = keep_set(fake, 1000)
    rows = [json.loads(line) for line in kept.path.read_text().splitlines()]
    assert kept.notice is None and kept.path.name == f"fake-01234567-{2**15}.jsonl"
    assert 2**15 * 4 <= sum(len(json.dumps(row)) for row in rows) <= 2**15 * 4 + 200
    assert set(rows[0]) == {"q", "a", "c"} and len(rows) < ROWS / 4
    parts = {int(row["q"].split()[1]) // 1000 for row in rows}
    assert parts == set(range(ROWS // 1000))
    examples = load(str(kept.path), name="general", columns=fake.columns).examples
    assert len(examples) == len(rows) and examples[0].answer == rows[0]["a"]


def test_a_kept_part_needs_no_hub_and_is_the_same_again(fake, monkeypatch):
    first = keep_set(fake, 1000).path.read_bytes()
    (Path(fake.hub) / "train.jsonl").unlink()
    answers(monkeypatch, False)
    assert keep_set(fake, 1000).path.read_bytes() == first


def test_a_larger_budget_is_streamed_and_offline_the_largest_part_will_do(fake, monkeypatch):
    small = keep_set(fake, 1000).path
    large = keep_set(fake, 50_000).path
    assert large != small and large.stat().st_size > 2 * small.stat().st_size
    answers(monkeypatch, False)
    kept = keep_set(fake, 1e6)
    assert kept.path == large and "no route" in kept.notice and "of an earlier run" in kept.notice


def test_a_set_that_ends_is_kept_whole(fake):
    assert len(keep_set(fake, 1e6).path.read_text().splitlines()) == ROWS


def test_a_connection_that_breaks_leaves_nothing_half_written(fake, monkeypatch):
    def broken(known):
        yield {"q": "1", "a": "2", "c": ""}
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(named_general, "_rows", broken)
    kept = keep_set(fake, 1000)
    assert kept.path is None and "reset by peer" in kept.notice
    assert not list((Path(fake.hub).parent / "home").rglob("*.jsonl"))


def test_offline_without_a_part_the_default_is_used_and_said(named, monkeypatch):
    answers(monkeypatch, False)
    config = make_config({"general": {"source": "fake"}})
    source = resolve_source(config, tokens=100)
    assert source.name == "builtin" and source.read is SOURCES["builtin"].read
    (notice,) = source.notices
    assert "no route" in notice and "the default, builtin, is used" in notice


def test_columns_of_another_shape_are_refused(named, monkeypatch):
    config = make_config({"general": {"source": "fake", "columns": "prompt=q"}})
    with pytest.raises(TellError, match=r"no effect on fake"):
        resolve_source(config)
    other = named.model_copy(update={"columns": "prompt=inputs,answer=a"})
    with pytest.raises(TellError, match=r"has no column 'inputs', but q, a, part, c"):
        keep_set(other, 10)


def test_a_run_records_name_revision_and_licence(named, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_KERNELS", "off")  # none are compiled in this home
    config = config_of(tiny_model("llama"), tmp_path / "run", general={"source": "fake", "rows": 10})
    run = tell.tune(config)
    found = read(run.findings)
    assert {k: found["general"][k] for k in ("name", "revision", "licence")} == {
        "name": "fake",
        "revision": "0123456789abcdef",
        "licence": "CC0",
    }
    assert any("licence: CC0" in notice for notice in found["notices"])
    assert read(run.metrics)["mixture"]["rows"]["general"] == 10
    assert any("licence: CC0" in notice for notice in tell.plan(config)["notices"])


def test_arms_without_general_rows_are_measured_on_the_same_set(named):
    config = make_config({"general": {"source": "fake", "tokens": 0}, "eval": {"arms": ["base", "sft"]}})
    source = resolve_source(config)
    assert source.named == named and len(source.read().examples) > 0


def test_where_the_set_cannot_be_had_another_model_keeps_its_own_distributions(named, monkeypatch):
    config = make_config({"general": {"source": "fake"}})
    assert (
        general_target(config, wrote_builtin=False) == "untuned"
    )  # nothing is kept: `resolve_source` takes the default
    assert general_target(config, wrote_builtin=True) == "text"
    resolve_source(config)
    assert general_target(config, wrote_builtin=False) == "text"


def test_a_study_refuses_the_default_in_a_sets_place(named, monkeypatch):
    answers(monkeypatch, False)
    with pytest.raises(TellError, match=r"general.source: fake cannot be had"):
        refuse_absent(make_config({"general": {"source": "fake"}}).general)


def test_a_folder_may_have_a_sets_name(named, tmp_path, monkeypatch):
    (tmp_path / "fake").mkdir()
    monkeypatch.chdir(tmp_path)
    config = with_full_paths(make_config({"general": {"source": "fake"}, "model": {"name": "fake"}}))
    assert config.general.source == "fake" and config.model.name == str(tmp_path / "fake")


def test_reply_trees_give_first_prompts_with_their_best_reply():
    def message(key, parent, role, text, rank=None):
        return {"message_id": key, "parent_id": parent, "role": role, "text": text, "rank": rank}

    tree = [
        message("1", None, "prompter", "Why?"),
        message("2", "1", "assistant", "Worse.", 1.0),
        message("3", "1", "assistant", "Best.", 0.0),
        message("4", "3", "prompter", "And then?"),
        message("5", "4", "assistant", "Later.", 0.0),
        message("6", None, "prompter", "Unanswered?"),
        message("7", None, "prompter", "Unranked?"),
        message("8", "7", "assistant", "So.", None),
    ]
    assert list(best_replies(tree)) == [{"prompt": "Why?", "completion": "Best."}]


def test_every_set_is_whole():
    sets = general_sets()
    assert list(sets) == [
        *("smol", "smoltalk", "tulu3", "dolci", "dolly", "oasst2", "aya", "ultrachat", "alpaca", "norobots"),
    ]
    for known in sets.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", known.hub) and re.fullmatch(r"[0-9a-f]{40}|main", known.revision)
        assert known.rows > 1000 and known.licence and known.languages
        assert known.reader is None or known.reader in READERS
        parts = dict(part.split("=") for part in known.columns.split(","))
        assert {"messages"} == set(parts) or {"prompt", "answer"} <= set(parts) <= {"prompt", "input", "answer"}
        assert SOURCES[known.name].named == known


def test_budgets_are_rounded_up_to_powers_of_two():
    values = [streamed_tokens(t) for t in (0, 1, 30_000, 43_690, 43_691, 1e6)]
    assert values == [2**15, 2**15, 2**16, 2**16, 2**17, 2**21]


def test_the_command_lists_them(capsys):
    assert tell_command(["general", "--json"]) == 0
    sets = json.loads(capsys.readouterr().out)["sets"]
    assert [known["name"] for known in sets] == list(general_sets())
    assert tell_command(["general"]) == 0
    printed = capsys.readouterr().out
    assert "norobots" in printed and "CC-BY-NC-4.0" in printed
