"""From flags, YAML and ``--set`` to a configuration; docs/reference/config.md."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from tell.cli.common import FLAGS, Given, count, number
from tell.cli.main import run
from tell.config import Config, load_config, make_config
from tell.config_docs import config_docs
from tell.config_sections import DEFAULT_ARMS, MixConfig
from tell.errors import TellError
from tell.presets import learning_rate_for

ROOT = Path(__file__).parents[2]


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        path, kind = f"{prefix}{info.alias or name}", info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{path}.")
        else:
            assert info.description or path == "mix.order", f"{path} has no description"
            yield path


def test_unlabelled_prompts_bring_the_arms_that_are_trained_on_them():
    given = {"task": {"data": "a.jsonl", "unlabelled": "more.txt"}}
    arms = load_config(flags=given).eval.arms
    assert arms == (*DEFAULT_ARMS, "tell-pseudo", "tell-pseudo-free")
    assert load_config(flags={**given, "eval": {"arms": ["tell"]}}).eval.arms == ("tell",)
    assert load_config(flags={"task": {"data": "a.jsonl"}}).eval.arms == DEFAULT_ARMS


def test_every_flag_sets_a_key():
    assert {flag.key for flag in FLAGS} <= set(keys())
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)


def test_docs_name_every_key_and_are_current():
    text = config_docs()
    for key in keys():
        assert text.count(f"| `{key}` |") == 1
    assert (ROOT / "docs/reference/config.md").read_text(encoding="utf-8") == text, (
        "run python -m tell.config_docs > docs/reference/config.md"
    )


def test_docs_show_both_presets():
    line = next(line for line in config_docs().splitlines() if "`train.lora_targets`" in line)
    assert "`all-linear`; paper: `qkv`" in line


def test_keys_are_listed_by_the_command(capsys):
    assert run(["tune", "--keys"]) == 0
    assert capsys.readouterr().out == config_docs()


@pytest.mark.parametrize(("text", "value"), [("15", 15), ("1e4", 10_000), ("2e5", 200_000), ("10_000", 10_000)])
def test_counts(text, value):
    assert count(text) == value and isinstance(count(text), int)


@pytest.mark.parametrize("text", ["1.5", "many", "", "inf", "nan", "1e-3"])
def test_what_is_no_count(text):
    with pytest.raises(ValueError):
        count(text)


def test_numbers():
    assert number("2e5") == 200_000.0 and number("0.5") == 0.5
    for text in ("inf", "nan", "x"):
        with pytest.raises(ValueError):
            number(text)


def test_yaml_then_flags_then_set(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "task: {data: a.jsonl, rows: 9}\ngeneral: {tokens: 500}\ntrain: {learning_rate: 0.5, batch_size: 2}\nseed: 1\n"
    )
    only_file = Given(file=file).load("tune")
    assert (only_file.general.tokens, only_file.general.ratio) == (500, None)  # the preset's ratio gives way
    flags = {"--general-ratio": 3.0, "--lr": 0.25, "--task-tokens": 1e4}
    flagged = Given(data="b.jsonl", file=file, flags=flags).load("tune")
    assert (flagged.task.data, flagged.task.rows, flagged.task.tokens) == ("b.jsonl", None, 1e4)
    assert (flagged.general.tokens, flagged.general.ratio) == (None, 3.0)
    assert (flagged.train.learning_rate, flagged.train.batch_size, flagged.seed) == (0.25, 2, 1)
    last = Given(data="b.jsonl", file=file, flags=flags, sets=("train.learning_rate=1e-2", "general.rows=7")).load(
        "tune"
    )
    assert (last.train.learning_rate, last.general.rows, last.general.ratio) == (0.01, 7, None)


def test_a_preset_lies_below_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: paper\ntask: {data: a.jsonl}\nmix: {repeat: 2}\n")
    config = Given(file=file).load("tune")
    assert (config.mix.repeat, config.mix.order, config.train.lora_targets) == (2, "shuffle", "qkv")


def test_a_resolved_configuration_reads_back_the_same(tmp_path):
    config = Given(data="a.jsonl", flags={"--general-rows": 7, "--arms": ("base", "tell")}).load("tune")
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    assert repr(Given(file=file).load("tune")) == repr(config)  # 32 and 32.0 would give checkpoints two digests


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("task: {dta: x}", ["run.yaml", "unknown key task.dta", "did you mean task.data?"]),
        ("task: x", ["run.yaml", "task is 'x', not a section"]),
        ("seed: [1", ["run.yaml:", "is not valid YAML"]),
        ("- 1", ["run.yaml", "not a mapping"]),
        ("seed: -4", ["run.yaml", "seed", "-4"]),
        ("preset: best\ntask: {data: x}", ["preset 'best' is unknown"]),
        ("seed: 4", ["no task data given"]),
    ],
)
def test_yaml_mistakes(text, parts, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert run(["plan", "-c", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_resume_needs_the_folder_alone(tmp_path, capsys):
    """The data's name comes from run.yaml: the error is about that file, not about a missing DATA."""
    (tmp_path / "run.yaml").write_text(Given(data=str(tmp_path / "gone.jsonl")).load("tune").to_yaml())
    (tmp_path / "status.json").write_text('{"state": "interrupted"}')
    assert run(["tune", "--resume", "--out", str(tmp_path)]) == 2
    assert "gone.jsonl: no such file" in capsys.readouterr().err


def test_switches_reach_the_configuration(tmp_path, capsys):
    assert Given(data="x", flags={"--drop-overlap": True}).load("tune").task.drop_overlap
    assert json.loads(Given(data="x").load("tune").model_dump_json())["task"]["drop_overlap"] is False


def test_the_rate_goes_by_the_models_size_unless_given():
    assert make_config({}).train.learning_rate is None
    assert make_config({"preset": "paper"}).train.learning_rate == 1e-4
    assert make_config({"train": {"learning_rate": 2e-3}}).train.learning_rate == 2e-3
    assert [learning_rate_for(n, mixed=False) for n in (10_000, 134_515_008)] == [1e-3, 1e-3]
    assert learning_rate_for(7_000_000_000, mixed=False) == pytest.approx(2e-4, rel=0.1)
    assert learning_rate_for(134_515_008, mixed=True) == 2e-3


def test_a_config_made_by_hand_has_the_defaults_of_the_preset():
    assert Config() == load_config() == make_config({})
    assert Config(preset="paper") == load_config(flags={"preset": "paper"})
    assert Config(train={"lora_r": 4}) == load_config(flags={"train": {"lora_r": 4}})
    assert Config(mix=MixConfig(order="shuffle")).mix.order == "shuffle"


@pytest.mark.parametrize("value", ["inf", ".inf", "nan", "-.inf", "1e999", "9" * 5000, "2001-99-99", "!!int x", "[a]"])
@pytest.mark.parametrize("key", ["train.lora_alpha", "train.weight_decay", "generate.temperature", "seed", "preset"])
def test_values_that_are_no_number_are_refused(key, value, capsys):
    assert run(["plan", "x.jsonl", "--set", f"{key}={value}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and key in line and len(line) < 2100 and line.count("\n") == 1


def test_no_count_is_larger_than_arithmetic_takes(capsys):
    """A number of 4,000 digits is a number of YAML, and more than a float holds."""
    shown = (ROOT / "docs" / "reference" / "config.md").read_text(encoding="utf-8")  # generated from the fields
    counts = re.findall(r"^\| `([\w.]+)` \| .* \| whole number", shown, re.M)
    assert len(counts) > 25
    for key in counts:
        assert run(["plan", "x.jsonl", "--set", f"{key}=1{'0' * 400}"]) == 2
        line = capsys.readouterr().err
        assert f"{key}: Input should be less than or equal to" in line, line


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_texts_that_nothing_can_be_named_are_refused(name):
    with pytest.raises(TellError, match=r"task\.data: contains a character"):
        make_config({"task": {"data": name}})


def test_arguments_that_are_not_utf8_are_refused(capsys):
    assert run(["plan", os.fsdecode(b"r\xff.jsonl")]) == 2
    assert "argument r?.jsonl: is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["generate.closed", "train.fast"])
def test_a_bare_off_is_read_as_it_is_written(key, tmp_path):
    """YAML 1.1 reads it as false."""
    section, name = key.split(".")
    path = tmp_path / "run.yaml"
    path.write_text(f"{section}:\n  {name}: off\n", encoding="utf-8")
    for config in (load_config(path), load_config(overrides=[f"{key}=off"])):
        assert getattr(getattr(config, section), name) == "off"
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(path) == config
    with pytest.raises(TellError, match=key):
        load_config(overrides=[f"{key}=on"])
