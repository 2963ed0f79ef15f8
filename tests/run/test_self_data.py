"""General data written by the model itself: what is kept, what is thrown away, what lies in the cache."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

import tell
from homes import home_with_kernels
from run.runs import Killer, config_of, open_session, read, steady_pace
from tell.config import load_config
from tell.errors import Interrupted
from tell.files import read_jsonl
from tell.mix.manifest import read_manifest
from tell.models.machine import Place
from tell.progress import Silent
from tell.rows.template import ChatTokenizer
from tell.run import session as sessions
from tell.run import written_blocks
from tell.run.plan import likely_engine
from tell.run.self_written import MARK, enough_of, is_good, self_file, user_header, write_self_data
from tell.run.task import load_task

SHORT = {"prompts": "invented", "max_prompt_tokens": 24, "max_answer_tokens": 32}


@pytest.fixture(scope="module")
def talker(tiny_model, tmp_path_factory) -> Path:
    """A tiny phi3 whose turns end often enough for some of its babble to be whole rows."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(tiny_model("phi3"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][ChatTokenizer(folder).encode("<|end|>")[0]] *= 4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def own_home(tmp_path, monkeypatch) -> Path:
    home = home_with_kernels(tmp_path / "home")
    monkeypatch.setenv("TELL_HOME", str(home))
    return home


def files(home: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (home / "self").glob("*")}


def test_two_runs_at_once_write_once(talker, own_home, monkeypatch):
    """The one that comes second waits, says so, and takes what the first wrote; it may be stopped meanwhile."""
    locked: list[bool] = []

    def part(path, *rest, real=written_blocks._part):
        try:
            FileLock(path.parent / f".{path.stem}.lock").acquire(timeout=0).lock.release()
            locked.append(False)
        except Timeout:
            locked.append(True)
        return real(path, *rest)

    config = config_of(talker, general={"source": "self", "rows": 2, "self": SHORT})
    task = load_task(config)

    def write(display, engine=None):
        session = open_session(talker, config, display=display, engine=engine)
        return write_self_data(session, enough_of(config, task.unit, 100))

    path, facts = write(Silent())
    mute = SimpleNamespace(name="own")  # it cannot write
    away = own_home / "away"
    (own_home / "self").rename(away)
    waiting = threading.Event()

    class Waits(Silent):
        def note(self, text: str) -> None:
            if "another run" in text:
                waiting.set()

    class Stops(Waits):
        @contextmanager
        def bar(self, title, total, unit="rows"):
            def advance(amount=1, info="", left=None):
                raise Interrupted("stopped")

            yield advance

    place = self_file(config, task.files.fingerprint, task.chat.fingerprint, "own")
    place.parent.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(place.parent / f".{place.stem}.lock"):
            with pytest.raises(Interrupted):
                write(Stops(), mute)
            assert waiting.is_set()
            waiting.clear()
            second = pool.submit(write, Waits(), mute)
            assert waiting.wait(30) and not second.done()
            for file in away.glob("*.json*"):
                shutil.copy(file, place.parent)
        assert second.result(30) == (path, facts)
    monkeypatch.setattr(written_blocks, "_part", part)
    assert write(Silent(), mute) == (path, facts)
    assert locked == [True]  # nobody else writes the file of the run's own rows meanwhile


def test_is_good():
    answer = "Ice floats because it is less dense than the water around it."
    assert is_good("Why does ice float?", answer) is None
    assert is_good("Name two colours, please.", "Red, blue.") is None
    assert is_good("Why ice?", answer) == "instruction too short"
    assert is_good("Why does ice float?", "Density.") == "answer too short"
    assert is_good("Say after me: hello.", " Say after me: hello. ") == "answer repeats the instruction"
    assert is_good("Say it a lot, please.", "very " * 20) == "repetitive"
    assert is_good("Say it a lot, please.", "it is so " * 8) == "repetitive"
    lines = "\n".join(["- This line is said again.", "- Another line is here."] * 4)
    assert is_good("List some things, please.", lines + "\nand so on and on") in ("repeated lines", "repetitive")
    listed = "\n".join(f"{i}. The item of number {i} is {word}." for i, word in enumerate("abcdefgh"))
    assert is_good("List eight items, please.", listed) is None


HEADERS = {
    "llama": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "qwen3": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "gemma2": ("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "gemma3": ("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "phi3": ("<|user|>\n", "<|end|>\n<|assistant|>\n"),
    "mistral": ("<s>[INST] ", " [/INST]"),
}


@pytest.mark.parametrize("family", HEADERS)
def test_user_header(tiny_model, family):
    head, tail = user_header(ChatTokenizer(tiny_model(family)))
    assert head.endswith(HEADERS[family][0]) and tail == HEADERS[family][1] and MARK not in head


def test_user_header_of_the_plain_default(tiny_model):
    head, tail = user_header(ChatTokenizer(tiny_model("llama", template=False)))
    assert head == "### Instruction:\n" and tail == "\n\n### Response:\n"


def test_written_once_and_extended(talker, own_home):
    """A second run writes nothing; more rows begin with the fewer; fewer rows are the same whatever lies there."""

    def written(rows: int) -> tuple[list[dict], dict]:
        config = config_of(talker, general={"source": "self", "rows": rows, "self": SHORT}, eval={"forgetting_rows": 0})
        task = load_task(config)
        path, facts = write_self_data(open_session(talker, config), enough_of(config, task.unit, 0))
        assert path.parent == own_home / "self"
        return read_jsonl(path), facts

    few, facts = written(4)
    assert 4 <= len(few) == facts["kept"] and facts["asked"] == 128
    assert facts["asked"] == facts["kept"] + sum(facts["thrown"].values())
    for row in few:
        assert set(row) == {"instruction", "output"} and is_good(row["instruction"], row["output"]) is None
    before = files(own_home)
    assert written(4) == (few, facts) and files(own_home) == before
    many, more = written(2 * len(few) + 1)
    assert len(many) > 2 * len(few) and many[: len(few)] == few and more["asked"] > facts["asked"]
    assert len({row["instruction"].strip().lower() for row in many}) == len(many)
    before = files(own_home)
    assert written(4) == (few, facts) and files(own_home) == before


def test_runs_with_self_written_data(talker, own_home, tmp_path):
    """The mixture depends on the amount asked for, not on what other runs have left in the cache."""

    def config(out: str | None, rows: int = 5, **more):
        sections = {"general": {"source": "self", "rows": rows, "self": SHORT}, "eval": {"arms": ["tell"]}}
        return config_of(talker, out and tmp_path / out, **sections, **more)

    estimate = tell.plan(config(None))
    assert any("estimated" in text for text in estimate["notices"]) and estimate["mixture"]["rows"]["general"] == 5
    first = tell.tune(config("first"))
    manifest = first.manifest.read_bytes()
    sources = read_manifest(first.manifest)["source"].to_pylist()
    assert sources.count("general") == 5 and sources.count("task") == 12
    found = read(first.findings)
    assert found["general"]["path"].startswith("self: written by")
    assert any("the model answered 128 prompts" in text for text in found["notices"])
    plan = tell.plan(config(None))
    assert plan["mixture"] == read(first.metrics)["mixture"]
    assert not any("estimated" in text for text in plan["notices"])

    before = files(own_home)
    assert tell.tune(config("second")).manifest.read_bytes() == manifest and files(own_home) == before
    larger = tell.tune(config("larger", 25))
    assert read(larger.metrics)["mixture"]["unique_rows"]["general"] == 25 and files(own_home) != before
    assert tell.tune(config("again")).manifest.read_bytes() == manifest
    assert any("estimated" in text for text in tell.plan(config(None, 500))["notices"])


def test_the_prompts_on_board_are_answered_first(talker, own_home, monkeypatch):
    """Their answers are the model's own; once they are used up, it invents further prompts."""
    given = [f"{word} is a word, isn't it? Say so." for word in ("One", "Two", "Three", "Four") * 50]
    given = [f"{i}. {text}" for i, text in enumerate(given)]
    monkeypatch.setattr("tell.run.self_written.load_prompts", lambda: given)
    rules = {**SHORT, "prompts": "builtin"}
    config = config_of(talker, general={"source": "self", "rows": 9, "self": rules}, eval={"forgetting_rows": 0})
    session = open_session(talker, config)

    def written(rows: int) -> list[dict]:
        enough = lambda have: len(have) / rows  # noqa: E731
        return read_jsonl(write_self_data(session, enough)[0])

    few = written(9)
    places = [given.index(row["instruction"]) for row in few]
    assert places == sorted(places) and max(places) < 128 and all(row["output"] for row in few)
    answers = {row["instruction"]: row["output"] for row in few}
    assert len(set(answers.values())) > len(answers) / 2
    most = written(len(few) + len(given))
    assert most[: len(few)] == few
    invented = [row for row in most if row["instruction"] not in given]
    last = max(i for i, row in enumerate(most) if row["instruction"] in given)
    assert invented and all(row not in invented for row in most[: last + 1])


def test_a_run_in_time_goes_on_with_the_rows_it_wrote(talker, own_home, tmp_path, monkeypatch):
    """--max-minutes decides once how many rows are written; resumed, the run neither writes more nor is refused."""
    steady_pace(monkeypatch, train=3000, decode=60)
    config = config_of(
        talker,
        tmp_path / "run",
        general={"source": "self", "ratio": 1000.0, "rows": None, "self": SHORT},
        eval={"arms": ["tell"], "forgetting_rows": 0},
        max_minutes=1.5,
    )
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer("train tell", 2))
    manifest, plan = (tmp_path / "run/manifest.parquet").read_bytes(), read(tmp_path / "run/plan.json")
    before = files(own_home)
    assert any("general rows are mixed in" in text for text in plan["notices"])
    steady_pace(monkeypatch, train=30_000, decode=1200)
    folder = tell.tune(config, resume=True)
    assert folder.manifest.read_bytes() == manifest and files(own_home) == before
    assert any("general rows are mixed in" in text for text in read(folder.findings)["notices"])


def test_stopped_while_writing(talker, own_home, tmp_path):
    config = config_of(
        talker,
        tmp_path / "run",
        general={"source": "self", "rows": 25, "self": SHORT},
        eval={"arms": ["tell"], "forgetting_rows": 0},
    )
    with pytest.raises(Interrupted):
        tell.tune(config, display=Killer("general data, written", 3))
    task = load_task(config)
    assert not self_file(
        config, task.files.fingerprint, task.chat.fingerprint, "own"
    ).exists()  # within the first block
    folder = tell.tune(config, resume=True)
    assert read(folder.metrics)["mixture"]["rows"]["general"] == 25


def test_an_amount_of_nothing_writes_nothing(talker, own_home, tmp_path):
    config = config_of(talker, tmp_path / "run", general={"source": "self", "rows": 0}, eval={"arms": ["tell"]})
    folder = tell.tune(config)
    assert read(folder.metrics)["mixture"]["rows"] == {"task": 12} and not (own_home / "self").exists()


def test_a_model_that_writes_nothing_usable(tiny_model, own_home, tmp_path):
    short = {"prompts": "invented", "max_prompt_tokens": 8, "max_answer_tokens": 8}
    config = config_of(tiny_model("llama"), tmp_path / "run", general={"source": "self", "rows": 9, "self": short})
    with pytest.raises(tell.TellError, match="no usable row in 512 tries") as error:
        tell.tune(config)
    assert "--general" in str(error.value)
    assert read(tmp_path / "run/status.json")["state"] == "failed"


def test_rows_of_another_arithmetic_are_others(talker, own_home):
    """Number format, device, engine and batch round otherwise, and a token that tips changes all that follow."""
    config = config_of(talker)
    plain = self_file(config, "model", "t", "own")

    def other(key: str) -> Path:
        return self_file(load_config(flags=config.model_dump(by_alias=True), overrides=[key]), "model", "t", "own")

    assert plain not in (other("model.dtype=bf16"), other("generate.batch_size=3"))
    assert self_file(config, "model", "t", "vllm") != plain == other("generate.engine=own")  # as `auto` came to, here
    assert self_file(config_of(talker, mix={"repeat": 5}), "model", "t", "own") == plain


class Falling:
    """An engine of another name and with other draws, which gives up after so many calls and then answers as ours."""

    def __init__(self, own, calls: int) -> None:
        self.name, self.own, self.calls = "vllm", own, calls

    def __getattr__(self, name):
        return getattr(self.own, name)

    def generate(self, prompts, decoding, **more):
        self.calls -= 1
        if self.calls < 0:
            self.name = "own"
        seed = decoding.seed if self.name == "own" else decoding.seed + 5
        return self.own.generate(prompts, replace(decoding, seed=seed), **more)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_engines_do_not_mix_in_one_file(talker, own_home, calls):
    """Where one takes over from another, the other's blocks stay in its file and ours begin in our own."""
    config = config_of(talker, general={"source": "self", "rows": 9, "self": SHORT}, eval={"forgetting_rows": 0})
    own = open_session(talker, config)
    rows = len(read_jsonl(write_self_data(own, lambda have: len(have) / 9)[0])) + 1  # two blocks
    enough = lambda have: len(have) / rows  # noqa: E731
    ours, facts = write_self_data(own, enough)
    expected = ours.read_bytes()
    shutil.rmtree(own_home / "self")
    fell = open_session(talker, config, engine=Falling(own.engine, calls))
    path, found = write_self_data(fell, enough)
    assert (path, found, path.read_bytes()) == (ours, facts, expected) and facts["engine"] == "own"
    theirs = self_file(config, fell.files.fingerprint, fell.chat.fingerprint, "vllm")
    assert theirs.exists() == (calls == 3)
    if calls == 3:  # two of a block that is whole, one of the next
        assert not {row["output"] for row in read_jsonl(theirs)} & {row["output"] for row in read_jsonl(path)}


def test_a_resumed_run_goes_on_with_rows_of_the_engine_that_wrote_them(talker, own_home, tmp_path, monkeypatch):
    """Whichever decodes now; without them, another engine's are not taken for them."""
    config = config_of(
        talker,
        tmp_path / "run",
        general={"source": "self", "rows": 5, "self": SHORT},
        eval={"arms": ["tell"], "forgetting_rows": 0},
    )
    load = sessions._load

    def falls(session):
        loaded, engine = load(session)
        return loaded, Falling(engine, 100)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(sessions, "_load", falls)
        tell.tune(config, display=Killer("train tell", 2))
    manifest = (tmp_path / "run/manifest.parquet").read_bytes()
    assert read(tmp_path / "run/written.json") == {"general": "vllm"}
    now = load_config(flags=config.model_dump(by_alias=True), overrides=["generate.engine=own"])
    (own_home / "self").rename(own_home / "away")
    with pytest.raises(tell.TellError, match=r"the engine vllm wrote are left.*generate\.engine=vllm.*--overwrite"):
        tell.tune(now, resume=True)
    shutil.rmtree(own_home / "self")
    (own_home / "away").rename(own_home / "self")
    before = files(own_home)
    folder = tell.tune(now, resume=True)
    assert folder.manifest.read_bytes() == manifest and files(own_home) == before
    assert read(folder.metrics)["mixture"]["rows"]["general"] == 5


def test_a_plan_reads_rows_of_the_engine_that_would_decode(talker, monkeypatch):
    task, decided = (load_task(config_of(talker, example=name)) for name in ("titles", "support"))
    assert likely_engine(task) == "own"
    monkeypatch.setattr("tell.run.plan.likely_place", lambda config: Place("cuda", "bf16"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "vllm" or None)
    assert likely_engine(task) == "vllm"
    for key in ("model.base=nf4", "generate.engine=own"):
        config = load_config(flags=task.config.model_dump(by_alias=True), overrides=[key])
        assert likely_engine(replace(task, config=config)) == "own"
    assert decided.decides and likely_engine(decided) == "own"
