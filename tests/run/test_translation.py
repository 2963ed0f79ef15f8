"""A run scored by BLEURT, on a tiny checkpoint; and documents built from WMT's files."""

from __future__ import annotations

import os

import pytest

import tell
from bleurts import save_port
from news import ENGLISH, ICELANDIC, write_wmt
from run.runs import config_of, read
from tell.errors import TellError
from tell.files import read_jsonl
from tell.models import hub
from tell.score.bleurt import Bleurt


def test_documents_are_scored_by_bleurt(tiny_model, tmp_path, monkeypatch):
    save_port(tmp_path / "bleurt")
    for name, texts in (("test", {}), ("dev", {"en": {}, "is": {}})):
        for i in range(12 if name == "dev" else 0):
            texts["en"][f"{i}"] = [f"{i} ships left the old harbour in the rain"]
            texts["is"][f"{i}"] = [f"{i} skip fóru úr gömlu höfninni í rigningu"]
        write_wmt(tmp_path / f"news{name}2021.is-en.xml", "is-en", **texts)
    tell.build_is_en_news(tmp_path, tmp_path / "news", direction="is-en")
    news = tmp_path / "news" / "is-en"
    monkeypatch.chdir(tmp_path)
    config = config_of(
        tiny_model("llama"),
        tmp_path / "run",
        task={"data": str(news / "train.jsonl"), "test": str(news / "test.jsonl"), "schema": None, "shots": 2},
        anchor={"text": f"@{news / 'anchor.txt'}"},
        general={"source": "none"},
        eval={"arms": ["base+anchor"], "forgetting_rows": 0, "bleurt": "bleurt"},
    )
    folder = tell.tune(config)
    metrics, rows = read(folder.metrics), read_jsonl(folder.prediction("base+anchor"))
    assert metrics["task"] == {"kind": "text", "primary": "bleurt"}
    assert [row["reference"].splitlines()[-1] for row in rows] == [ENGLISH["paper.10"][-1], ENGLISH["paper.9"][-1]]
    assert rows[0]["prompt"].strip() == "\n".join(ICELANDIC["paper.10"])
    scores = Bleurt(str(tmp_path / "bleurt")).score([r["answer"] for r in rows], [r["reference"] for r in rows])
    assert [row["scores"]["bleurt"] for row in rows] == pytest.approx(scores, abs=1e-5)
    assert metrics["arms"]["base+anchor"]["bleurt"]["value"] == pytest.approx(scores.mean(), abs=1e-5)
    assert f"bleurt: {tmp_path / 'bleurt'}" in folder.config.read_text()  # found again from any folder


def test_a_checkpoint_that_cannot_be_had_is_said_before_anything_is_written(tiny_model, tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        raise hub.HubUnreachable("no network")

    monkeypatch.setattr(hub, "download", gone)
    config = config_of(tiny_model("llama"), tmp_path / "run", example="titles", eval={"bleurt": "nobody/BLEURT-none"})
    with pytest.raises(TellError, match=r"eval\.bleurt: nobody/BLEURT-none is not a folder"):
        tell.tune(config)
    config = config_of(tiny_model("llama"), tmp_path / "run", eval={"bleurt": os.fspath(tmp_path)})
    with pytest.raises(TellError, match=r"eval\.bleurt: kind json is not scored by BLEURT"):
        tell.tune(config)
    assert not (tmp_path / "run").exists()
