"""Cells: equal where nothing differs that counts, different where something does."""

from __future__ import annotations

import shutil
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from run.runs import EXAMPLES, PROBE
from tell.config import load_config
from tell.data.subset import take_rows
from tell.names import ARMS
from tell.run.claim import with_full_paths
from tell.studies import content
from tell.studies.cells import TASK_ALONE, grid_of, make_cell
from tell.studies.content import content_hash
from tell.studies.recipe import make_recipe

SUPPORT = EXAMPLES / "support"
BASE = {
    "task": {"data": str(SUPPORT / "train.jsonl"), "test": str(SUPPORT / "test.jsonl"), "rows": 15},
    "general": {"source": str(PROBE), "tokens": 3e4},
    "anchor": {"text": "Sort this mail."},
    "mix": {"repeat": 4},
    "generate": {"max_new_tokens": 64},
}
# What a change may be, and the arms it has no effect on.
UNTRAINED = {name for name, arm in ARMS.items() if arm.adapter is None}
NO_CONTEXT = {name for name, arm in ARMS.items() if not arm.in_context}
MATCHED = {name for name, arm in ARMS.items() if arm.adapter and ARMS[arm.adapter].mixture == "task-matched"}
TAUGHT = {name for name, arm in ARMS.items() if ARMS[arm.adapter or name].teacher}
ALONE = {n for n, arm in ARMS.items() if arm.adapter and ARMS[arm.adapter].mixture in TASK_ALONE}
SEARCHED = {name for name, arm in ARMS.items() if arm.searched}
UNSEARCHED = {n for n, arm in ARMS.items() if not {arm.adapter, ARMS[arm.adapter or n].teacher} & SEARCHED}


def own(key: str) -> set[str]:
    """Arms that set the key themselves."""
    return {name for name, arm in ARMS.items() if arm.adapter and key in ARMS[arm.adapter].settings}


FREE = {name for name, arm in ARMS.items() if not arm.decides} - TAUGHT  # a teacher's answers are decided
CHANGES: dict[str, tuple[str, set[str]]] = {
    "task rows": ("task.rows=30", {"base", "base+anchor", "general"}),
    "task tokens": ("task.tokens=500", {"base", "base+anchor", "general"}),
    "repetition": ("mix.repeat=8", {*UNTRAINED, "sft", "general"}),
    "order": ("mix.order=shuffle", {*UNTRAINED, "sft", "sft-tuned", *MATCHED}),
    "general amount": ("general.tokens=1e5", {*UNTRAINED, "sft"}),
    "general rows": ("general.rows=40", {*UNTRAINED, "sft"}),
    "general source": (f"general.source={SUPPORT / 'test.jsonl'}", set()),  # rows held out come from there
    "learning rate": ("train.learning_rate=1e-4", UNTRAINED),
    "rank": ("train.lora_r=16", UNTRAINED),
    "general target": ("train.general_target=untuned", {*UNTRAINED, "sft", *ALONE, *own("train.general_target")}),
    "averaged weights": ("train.average=0.5", UNTRAINED | own("train.average")),
    "adapter scale": ("train.adapter_scale=0.5", UNTRAINED),
    "selected": ("general.select=similar", {*UNTRAINED, "sft", *own("general.select")}),
    "recast": ("general.recast=0.25", {*UNTRAINED, "sft", *own("general.recast")}),
    "prompts": ("train.loss_on=all", set()),  # of validation rows, too
    "search": ("search.minutes=5", UNSEARCHED),
    "longest row": ("train.max_length=512", set()),
    "anchor": ("anchor.text=Read this mail.", {"base", "base+schema"}),
    "anchor's place": ("anchor.place=system", {"base", "base+schema"}),
    "candidates of an anchor by hand": ("anchor.candidates=9", set(ARMS)),
    "self-written data that is not asked for": ("general.self.temperature=0.5", set(ARMS)),
    "exemplars": ("mix.exemplars=2", {*UNTRAINED, "sft", "general", *own("mix.exemplars")}),
    "examples in context": ("eval.icl_examples=3", NO_CONTEXT),
    "nearest examples": ("eval.icl_select=nearest", NO_CONTEXT),
    "checkpoints": ("train.checkpoint_every=7", set(ARMS)),
    "folder": ("out=elsewhere", set(ARMS)),
    "time": ("max_minutes=5", {*UNTRAINED, "sft"}),
    "seed": ("seed=43", set()),
    "engine": ("generate.engine=own", set()),
    "temperature": ("generate.temperature=0.9", set()),
    "closed fields": ("generate.closed=likelihood", FREE),
    "readout weight": ("generate.readout_weight=1", FREE),
    "test rows": ("task.test_rows=10", set()),
    "pseudo-labelled rows": ("mix.pseudo=2", set(ARMS) - TAUGHT),
    "what an arm has anyway": ("mix.pseudo=4", set(ARMS)),
    "unlabelled prompts": (f"task.unlabelled={SUPPORT / 'test.jsonl'}", set(ARMS) - TAUGHT),
}


def config(*overrides: str, **sections):
    return load_config(flags={**BASE, **sections}, overrides=overrides)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("arm", ARMS)
def test_only_what_has_an_effect_counts(arm, change):
    override, without = CHANGES[change]
    same = make_cell(config(), arm).name == make_cell(config(override), arm).name
    assert same == (arm in without)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.sampled_from(list(ARMS)), st.sets(st.sampled_from(sorted(CHANGES)), max_size=5), st.randoms())
def test_several_changes_count_as_each_alone(arm, changes, random):
    """In whatever order they come; only another amount of the same thing may undo an amount."""
    texts = [CHANGES[name][0] for name in changes]
    if any(sum(t.startswith(section) for t in texts) > 1 for section in ("general.", "task.", "mix.pseudo")):
        return
    counts = any(arm not in CHANGES[name][1] for name in changes)
    cell = make_cell(config(*texts), arm)
    assert (cell.name != make_cell(config(), arm).name) == counts
    random.shuffle(texts)
    assert make_cell(config(*texts), arm).name == cell.name
    assert make_cell(cell.config, arm).name == cell.name  # its own configuration leads back to it


def test_without_a_limit_answers_depend_on_the_rows():
    open_end = {"generate": {"max_new_tokens": None}}
    for arm in ARMS:
        names = {make_cell(config(f"task.rows={n}", **open_end), arm).name for n in (15, 30)}
        assert len(names) == 2, arm


def test_an_amount_relative_to_the_task_depends_on_it():
    ratio = [config("general.ratio=20", f"task.rows={n}", f"anchor.text={t}") for n in (15, 30) for t in ("a", "b")]
    assert len({make_cell(c, "general").name for c in ratio}) == 4


def test_an_anchor_that_the_model_writes_depends_on_the_rows_it_sees():
    written = [config(f"task.rows={n}", "anchor.text=auto") for n in (15, 30)]
    assert len({make_cell(c, "base+anchor").name for c in written}) == 2
    assert len({make_cell(c, "base").name for c in written}) == 1
    assert make_cell(written[0], "base").config.anchor.text == "none"  # it is never asked for


def test_no_general_data_is_the_same_however_it_is_said():
    nothing = [config(text) for text in ("general.tokens=0", "general.rows=0", "general.ratio=0")]
    assert len({make_cell(c, "tell").name for c in nothing}) == 1


@pytest.mark.parametrize("arm", ["base", "base+anchor", "general"])
def test_an_arm_without_task_rows_does_not_refuse_those_beyond_the_budget(arm):
    """Without the budget all rows are looked at, the long ones that it left out too."""
    refuse = "train.too_long=refuse"
    cell = make_cell(config(refuse), arm)
    assert cell.config.task.rows is None and cell.config.train.too_long == "drop"
    assert cell.name == make_cell(config(), arm).name
    assert make_cell(config(refuse), "tell").config.train.too_long == "refuse"
    whole = config(refuse).model_copy(deep=True)
    whole.task.rows = None
    assert make_cell(whole, arm).config.train.too_long == "refuse"


def test_benchmarks_count_by_their_own_files(tmp_path):
    """Another one beside them changes nothing; nor does their folder where none is asked for."""
    folder = tmp_path / "benchmarks"
    (folder / "agieval").mkdir(parents=True)
    (folder / "openbookqa_test.jsonl").write_text("{}\n")

    def name(benchmarks="[openbookqa]") -> str:
        place = f"eval.benchmark_data={folder}"
        return make_cell(config(f"eval.benchmarks={benchmarks}", place), "tell").name

    before, without = name(), name("[]")
    assert without == make_cell(config(), "tell").name
    (folder / "gsm8k_test.jsonl").write_text("{}\n")
    assert name() == before and name("[]") == without
    (folder / "openbookqa_train.jsonl").write_text("{}\n")
    assert name() != before
    (folder / "openbookqa_train.jsonl").unlink()
    (folder / "openbookqa_test.jsonl").write_text("{} \n")
    assert name() != before


def test_files_count_by_content(tmp_path):
    """The same rows elsewhere are the same cell, other rows under the same name another; so is an anchor's text."""
    moved = tmp_path / "moved.jsonl"
    shutil.copy(SUPPORT / "train.jsonl", moved)
    before = make_cell(config(), "tell").name
    assert make_cell(config(f"task.data={moved}"), "tell").name == before
    moved.write_text(moved.read_text(encoding="utf-8").replace("invoice", "bill"), encoding="utf-8")
    assert make_cell(config(f"task.data={moved}"), "tell").name != before
    (tmp_path / "anchor.txt").write_text("Sort this mail.\n", encoding="utf-8")
    assert make_cell(config(f"anchor.text=@{tmp_path / 'anchor.txt'}"), "tell").name == before


def test_a_scorer_counts_by_its_code(tmp_path, monkeypatch):
    """And by that of the modules beside it; it is found where the study is started, as by the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # as of an installed `tell`
    names = []
    for code in ("from my_part import f, g", "from my_part import g as f", "from my_part import f, g"):
        for part in ("def f(a, r): return a", "def f(a, r): return r"):
            (tmp_path / "my_scorer.py").write_text(code, encoding="utf-8")
            (tmp_path / "my_part.py").write_text(part, encoding="utf-8")
            names.append(make_cell(config("task.scorer=my_scorer:f"), "tell").name)
    assert len({*names}) == 4 and names[:2] == names[4:]
    assert make_cell(config("task.scorer=nowhere_at_all:f"), "tell").name not in names  # the run says what is wrong


def test_a_word_is_no_path(tmp_path, monkeypatch):
    """Whatever lies in the working directory."""
    before = with_full_paths(config("general.source=self"))
    for name in ("model", "self", "none", "builtin", "auto"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    after = with_full_paths(config("general.source=self"))
    assert (after.tokens.unit, after.general.source) == ("model", "self")
    assert (
        make_cell(after, "tell").name
        == make_cell(before, "tell").name
        == make_cell(config("general.source=self"), "tell").name
    )


def test_a_link_counts_as_what_it_links_to(tmp_path, monkeypatch):
    """As the hub's cache has it: files without endings, and links with."""
    monkeypatch.setattr(content, "WHOLE", 100)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/3fd1").write_bytes(bytes(range(256)) * 512)
    for name in ("linked", "copied"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked/model.safetensors").symlink_to(tmp_path / "blobs/3fd1")
    shutil.copy(tmp_path / "blobs/3fd1", tmp_path / "copied/model.safetensors")
    assert content_hash(tmp_path / "linked") == content_hash(tmp_path / "copied")


def test_folders_count_by_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "b" / ".cache").write_text("hidden", encoding="utf-8")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"Weights")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


def test_names_stay_what_they_are():
    """A change here loses every finished cell of every user; raise CELL_FORMAT where that is meant."""
    # The defaults before `modern` decoded greedily and decided closed fields.
    sampled = {"greedy": False, "repetition_penalty": 1.05, "closed": "off"}
    plain = load_config(flags={"task": {"data": "no-such-file.jsonl"}, "anchor": {"text": "none"}, "generate": sampled})
    names = {
        "base": "base-bee076224683e319",  # another than when the default source was `self`: other rows are held out
        "sft": "sft-9c45bf1dbfdc5e5a",
        "sft-matched": "sft-matched-78e1bd491286a52a",
        "general": "general-d687255d4258d01e",
        "tell": "tell-c388826ccd288a10",
    }
    full = load_config(
        flags={
            "task": {"data": "no-such-file.jsonl", "rows": 15},
            "general": {"source": "nobody/nothing", "tokens": 3e4},
            "anchor": {"text": "Sort this mail."},
            "train": {"learning_rate": 1e-3},
            "mix": {"repeat": 4},
            "generate": sampled,
        }
    )
    found = {arm: make_cell(plain if arm == "base" else full, arm).name for arm in names}
    assert found == names


def recipe(grid, **keys):
    return make_recipe({"config": BASE, "grid": grid, "seeds": [42, 43], **keys})


@given(st.permutations(["task.rows", "general.tokens", "mix.repeat"]), st.permutations([15, 30, 45]))
@settings(max_examples=20)
def test_the_order_of_a_grid_does_not_matter(keys, rows):
    values = {"task.rows": rows, "general.tokens": [0, "3e4"], "mix.repeat": [1, 2]}
    a = grid_of(recipe({key: values[key] for key in keys}), {})
    b = grid_of(recipe({"general.tokens": ["3e4", 0], "mix.repeat": [1, 2], "task.rows": [15, 30, 45]}), {})
    assert {cell.name for cell in a[1]} == {cell.name for cell in b[1]}

    def lines(rows):
        return {(*sorted(row.point.items()), row.arm, row.seed, row.cell) for row in rows}

    assert lines(a[0]) == lines(b[0])


def test_one_amount_written_two_ways_is_one_point():
    """YAML takes 3e4 for a text."""
    made = recipe(
        [{"general.tokens": ["3e4"]}, {"general.tokens": [30000, 1e5], "arms": ["tell"]}], arms=["sft", "tell"]
    )
    rows, _ = grid_of(made, {})
    lines = [(row.point["general.tokens"], row.arm, row.seed) for row in rows]
    assert sorted(lines) == sorted(
        (tokens, arm, seed) for seed in (42, 43) for tokens, arm in ((30000, "sft"), (30000, "tell"), (100000, "tell"))
    )


def test_what_is_shared_is_one_cell():
    rows, cells = grid_of(recipe({"task.rows": [15, 30], "general.tokens": [0, 3e4, 1e5]}), {})
    count = {arm: sum(cell.arm == arm for cell in cells) for arm in ("base", "sft", "sft-matched", "tell")}
    assert count == {"base": 2, "sft": 4, "sft-matched": 12, "tell": 12}  # two seeds
    assert len(rows) == 2 * 6 * 4 and {row.cell for row in rows} == {cell.name for cell in cells}
    assert [cell.config.seed for cell in cells] == sorted(cell.config.seed for cell in cells)  # one whole curve first


def test_general_data_alone_needs_some():
    rows, _ = grid_of(recipe({"general.tokens": [0, 3e4]}, arms=["general", "tell"]), {})
    assert {row.point["general.tokens"] for row in rows if row.arm == "general"} == {30000}


def test_tell_without_its_anchor_is_scored_where_tell_is():
    rows, cells = grid_of(recipe({"general.tokens": [0, 3e4]}, arms=["tell", "tell-anchor"]), {})
    assert all(cell.config.eval.arms == ("tell", "tell-anchor") for cell in cells) and len(cells) == 4
    for tell, without in zip(rows[::2], rows[1::2], strict=True):
        assert (tell.arm, without.arm) == ("tell", "tell-anchor") and tell.cell == without.cell
    alone, cells = grid_of(recipe({}, arms=["tell-anchor"]), {})
    assert alone[0].cell.startswith("tell-anchor-") and cells[0].config.eval.arms == ("tell-anchor",)


def test_all_arms_of_an_adapter_are_one_cell():
    arms = ["tell-free", "sft-readout", "tell-anchor", "tell", "sft-matched"]
    rows, cells = grid_of(recipe({}, arms=arms), {})
    of = {row.arm: row.cell for row in rows if row.seed == 42}
    assert len(set(of.values())) == 2 == len(cells) / 2
    assert of["tell"] == of["tell-free"] == of["tell-anchor"] and of["sft-matched"] == of["sft-readout"]
    scored = {cell.arm: cell.config.eval.arms for cell in cells}
    assert scored == {"tell": ("tell", "tell-free", "tell-anchor"), "sft-matched": ("sft-matched", "sft-readout")}
    assert {cell.config.generate.closed for cell in cells} == {"fused"}  # for an arm that the lead shares its cell with
    alone, cells = grid_of(recipe({}, arms=["sft-matched"]), {})
    assert cells[0].config.generate.closed == "off" and alone[0].cell != of["sft-matched"]


def test_points_hold_numbers_and_names():
    values = {
        "general.tokens": ["3e4", 100000.0],
        "general.source": ["${here}/general.jsonl"],
        "train.task_weight": [0.5],
    }
    made = make_recipe({"config": BASE, "grid": values, "variables": {"here": str(PROBE.parent)}})
    rows, cells = grid_of(made, made.variables)
    assert [row.point["general.tokens"] for row in rows if row.arm == "tell" and row.seed == 42] == [30000, 100000]
    assert rows[0].point["general.source"] == "${here}/general.jsonl" and rows[0].point["train.task_weight"] == 0.5
    assert {cell.config.general.source for cell in cells} == {str(PROBE)}


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 1000))
def test_subsets_are_nested_by_seed(a, b, seed):
    small, large = sorted((a, b))
    assert set(take_rows(60, small, seed)) <= set(take_rows(60, large, seed))


def test_every_cell_has_a_row():
    """Of one point in two products the first one's cell counts, with the arms that ride in it."""
    grid = [{"general.tokens": ["3e4"]}, {"general.tokens": [30000], "arms": ["tell"]}]
    rows, cells = grid_of(recipe(grid, arms=["tell", "tell-anchor"]), {})
    assert {row.cell for row in rows} == {cell.name for cell in cells} and len(cells) == 2
    assert all(cell.config.eval.arms == ("tell", "tell-anchor") for cell in cells)
