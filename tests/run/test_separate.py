"""`tell.separate` on a tiny model: groups, controls, runs, files."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

import tell
from run.runs import EXAMPLES, PROBE, config_of, read
from tell.anchor.separation import CONTRASTS
from tell.errors import TellError
from tell.folder import RunFolder
from tell.models.find import find_model
from tell.run.anchor_candidates import anchor_losses
from tell.verbs.separate import Comparison, _notices


def quick(model, **sections):
    return config_of(model, general={"source": str(PROBE), "rows": None}, **sections)


def test_numbers_and_picture(tiny_model, tmp_path):
    out = tmp_path / "separation"
    result = tell.separate(quick(tiny_model("llama")), compare=Comparison("all", 12), out=out)
    assert result == read(out / "separation.json")
    assert result["queries"] == 12 and list(result["layers"]) == ["0", "1", "2"]
    for number, contrasts in result["layers"].items():
        assert list(contrasts) == [*CONTRASTS, "with - without"]
        for name in CONTRASTS:
            assert contrasts[name]["probe"]["n"] == contrasts[name]["silhouette"]["n"] == 24
            assert 0 < contrasts[name]["mmd2"]["p"] <= 1
            if number == "0":  # the last token is the template's, and its embedding the same in every row
                assert contrasts[name]["probe"]["value"] == 0.5 and contrasts[name]["mmd2"]["value"] == 0
    assert result["length"]["with anchor"]["value"] > 0.5
    assert any("length alone" in text for text in result["notices"])
    assert result["picture"]["layer"] == 1
    assert {name: np.shape(xy) for name, xy in result["picture"]["places"].items()} == dict.fromkeys(CONTRASTS, (24, 2))
    words = "".join(ElementTree.parse(out / "separation.svg").getroot().itertext())
    assert all(part in words for part in ("without anchor", "with anchor", "control", "length alone", "layer 1"))
    assert (out / "separation.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in out.iterdir()) == [f"separation.{x}" for x in ("json", "png", "svg")]
    with pytest.raises(TellError, match="already has results"):
        tell.separate(quick(tiny_model("llama")), compare=Comparison(queries=12), out=out)
    again = tell.separate(quick(tiny_model("llama")), compare=Comparison("1", 12), out=out, overwrite=True)
    assert again["layers"] == {"1": result["layers"]["1"]}


def test_data_published_with_its_anchor(tiny_model, tmp_path):
    """The instruction at the head of each query is taken off for the picture without it, and not doubled with it."""
    text = "Sort this mail."
    rows = [json.loads(line) for line in (EXAMPLES / "support/train.jsonl").read_text().splitlines()]
    prompt = next(key for key in ("prompt", "input", "text", "query", "instruction") if key in rows[0])
    for row in rows:
        row[prompt] = f"{text}\n\n{row[prompt]}"
    path = tmp_path / "published.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_model("llama")
    plain, published = (
        tell.separate(
            quick(model, task={"data": data, "test": None, "rows": None, "test_fraction": 0.5}, seed=3),
            compare=Comparison(queries=40),
        )
        for data in (str(EXAMPLES / "support/train.jsonl"), str(path))
    )
    for key in ("task", "task + anchor"):  # the split goes by content, so other rows may be drawn: not many tokens off
        assert published["tokens"][key] == pytest.approx(plain["tokens"][key], rel=0.2)
    both = published["tokens"]
    assert both["task + anchor"] - both["task"] == plain["tokens"]["task + anchor"] - plain["tokens"]["task"] > 0


def test_general_queries_of_equal_length(tiny_model):
    config = quick(tiny_model("llama"))
    wild, matched = (tell.separate(config, compare=Comparison(queries=12, match_length=flag)) for flag in (False, True))
    gaps = [abs(r["tokens"]["task"] - r["tokens"]["general"]) for r in (wild, matched)]
    assert gaps[1] < gaps[0]
    assert matched["length"]["without anchor"]["value"] <= wild["length"]["without anchor"]["value"]


def test_without_any_anchor_or_source(tiny_model):
    """Our own probe stands for general queries; it is what `quick` gives by its path."""
    config = quick(tiny_model("llama"), anchor={"text": "none"})
    result = tell.separate(config, compare=Comparison(queries=6))
    bare = config.model_copy(update={"general": config.general.model_copy(update={"source": "self"})})
    unnamed = tell.separate(bare, compare=Comparison(queries=6))
    assert unnamed.pop("general") == "written for TELL" and result.pop("general") == str(PROBE)
    assert unnamed == result
    assert list(result["layers"]["1"]) == list(result["length"]) == ["without anchor"]


def test_an_anchor_is_written_within_the_positions(tiny_model, monkeypatch):
    """However long rows may be by the configuration, none beyond what the model takes scores a candidate."""
    lengths = []

    def losses(session, *rest):
        lengths.append(session.config.train.max_length)
        return anchor_losses(session, *rest)

    monkeypatch.setattr("tell.run.anchor_candidates.anchor_losses", losses)
    model = tiny_model("llama")
    config = quick(model, anchor={"text": "auto", "candidates": 1}, train={"max_length": 1_000_000})
    tell.separate(config, compare=Comparison(queries=5))
    assert set(lengths) == {find_model(str(model)).architecture.max_positions}


def test_a_run_with_its_adapter(finished):
    """The run's anchor and test rows; its adapter moves the states, and the base weights come back."""
    folder, config = finished
    general = config.model_copy(
        update={"general": config.general.model_copy(update={"rows": None}), "anchor": config.anchor}
    )
    base, tuned, again = (
        tell.separate(general, run=folder.root, compare=Comparison(queries=9, adapter=arm))
        for arm in (None, "tell", None)
    )
    assert base["queries"] == 5 == len(read(folder.split)["test"])
    assert base["anchor"]["hash"] == read(folder.anchor)["hash"]
    assert base == again and tuned["adapter"] == "tell" and tuned["layers"] != base["layers"]


@pytest.mark.parametrize(
    ("sections", "options", "match"),
    [
        ({}, {"adapter": "tell"}, r"--adapter.*Pass a run folder"),
        ({}, {"layer": "99"}, r"no layer '99'"),
        ({}, {"queries": 4}, r"4 task and .* general queries"),
    ],
)
def test_refused(tiny_model, sections, options, match):
    config = config_of(tiny_model("llama"), **{"general": {"source": str(PROBE), "rows": None}, **sections})
    with pytest.raises(TellError, match=match):
        tell.separate(config, compare=Comparison(**options))


def test_no_run_there(tiny_model, tmp_path):
    with pytest.raises(TellError, match="no such run folder"):
        tell.separate(quick(tiny_model("llama")), run=RunFolder(tmp_path / "nowhere").root)


@pytest.mark.parametrize(
    ("ci", "says"), [([0.28, 0.72], "separates nothing, probe 50%"), ([0.61, 0.9], "separates too")]
)
def test_the_control_says_what_its_probe_can(ci, says):
    probe = {"value": sum(ci) / 2, "ci": ci}
    (told,) = _notices({"length": {}, "chance": 0.5, "layers": {"3": {"control": {"probe": probe}}}}, "3")
    assert says in told and "layer 3" in told
