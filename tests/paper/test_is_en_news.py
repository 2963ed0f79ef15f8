import json
import os
from pathlib import Path

import pytest

import tell
from news import ENGLISH, ICELANDIC, write_wmt
from tell.anchor.anchor import Anchor
from tell.cli.main import run
from tell.data.formats import read_records
from tell.data.sources import load
from tell.errors import TellError
from tell.files import read_jsonl
from tell.paper.destination import Replace
from tell.paper.is_en_news import DIRECTIONS, anchor_text

DATA = Path(os.environ.get("TELL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (DATA / "wmt21_news").is_dir(), reason=f"no {DATA}/wmt21_news: set TELL_DATA to the folder that holds it"
)
DEV_EN = {"a": ["Harbour opens", "The harbour opens again after a long winter of repairs."]}
DEV_IS = {"a": ["Höfnin opnar", "Höfnin opnar aftur eftir langan vetur viðgerða."]}
LONG_EN, LONG_IS = "word " * 51, "orð " * 51


@pytest.fixture
def wmt(tmp_path):
    """A folder with test and training documents of both directions."""
    folder = tmp_path / "wmt"
    for direction in DIRECTIONS:
        write_wmt(folder / f"newstest2021.{direction}.all.xml.gz", direction)
        write_wmt(folder / f"newsdev2021.{direction}.xml", direction, **{"en": DEV_EN, "is": DEV_IS})
    return folder


def published(out, direction, name):
    """Rows with the anchor put on as a run puts it on."""
    anchor = Anchor((out / direction / "anchor.txt").read_text())
    examples = load(str(out / direction / f"{name}.jsonl"), name="task").examples
    return [{"query": anchor.apply(e.prompt)[0].content, "response": e.answer} for e in examples]


def test_rows_are_documents_in_the_published_form(wmt, tmp_path):
    out = tmp_path / "news"
    built = tell.build_is_en_news(wmt, out)
    assert built.lines() == [f"1 training and 2 test documents in {out / d}" for d in DIRECTIONS]
    assert sorted(p.name for p in (out / "en-is").iterdir()) == ["anchor.txt", "test.jsonl", "train.jsonl"]
    assert published(out, "en-is", "test")[1] == {
        "query": "This text is in English and needs to be translated into Icelandic. Please translate only the text, "
        "strictly maintaining the original content order without making any other changes.\n\n "
        + "Ferry leaves early\n"
        "The ferry to the islands left two hours early today.",
        "response": "Sure, here is the Icelandic translation: \n\n Ferjan fór snemma\n"
        "Ferjan til eyjanna fór tveimur tímum fyrr í dag.",
    }
    first = published(out, "is-en", "test")[0]
    assert first["query"] == anchor_text("is-en") + "\n\n " + "\n".join(ICELANDIC["paper.10"])
    assert first["response"] == "Sure, here is the English translation: \n\n " + "\n".join(ENGLISH["paper.10"])
    assert [row["prompt"] for row in read_jsonl(out / "is-en" / "train.jsonl")] == [" " + "\n".join(DEV_IS["a"])]


def test_published_rows_come_back_as_they_were(wmt, tmp_path):
    tell.build_is_en_news(wmt, tmp_path / "one")
    for name in ("train", "test"):
        part = tmp_path / "published" / f"{'dev' if name == 'train' else name}-en-is.jsonl"
        part.parent.mkdir(exist_ok=True)
        rows = published(tmp_path / "one", "en-is", name)
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    tell.build_is_en_news(tmp_path / "published", tmp_path / "two", direction="en-is")
    for name in ("train.jsonl", "test.jsonl", "anchor.txt"):
        assert (tmp_path / "two/en-is" / name).read_bytes() == (tmp_path / "one/en-is" / name).read_bytes()
    assert not (tmp_path / "two/is-en").exists()


def test_extra_rows_hold_the_training_rows_and_long_pairs(wmt, tmp_path):
    pairs = tmp_path / "pairs.json"
    rows = [{"translation": {"en": f"{i} {LONG_EN}", "is": f"{i} {LONG_IS}"}} for i in range(9)]
    rows.append({"translation": {"en": "Too short.", "is": "Of stutt."}})
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = sum(len(line.split()) for line in DEV_EN["a"])
    built = tell.build_is_en_news(wmt, tmp_path / "news", extra=[pairs], times=21)
    for direction in DIRECTIONS:
        extra = read_jsonl(tmp_path / "news" / direction / "extra.jsonl")
        assert extra[0] == read_jsonl(tmp_path / "news" / direction / "train.jsonl")[0]
        assert len(extra) == built.directions[direction].extra == 1 + round(20 * words / 52)
        assert "Too short." not in str(extra) and all(len(row["prompt"].split()) > 50 for row in extra[1:])
    assert built.directions["en-is"].times == pytest.approx(21, abs=52 / words)
    assert not built.notices
    again = tell.build_is_en_news(wmt, tmp_path / "more", extra=[pairs], times=1000)
    assert again.directions["en-is"].extra == 10 and "not 1000" in again.notices[0]
    larger = tell.build_is_en_news(wmt, tmp_path / "large", extra=[pairs], times=30, direction="en-is")
    assert larger.directions["en-is"].extra > built.directions["en-is"].extra
    smaller = {row["prompt"] for row in read_jsonl(tmp_path / "news/en-is/extra.jsonl")}
    assert smaller < {row["prompt"] for row in read_jsonl(tmp_path / "large/en-is/extra.jsonl")}


def test_documents_that_share_lines_with_a_test_document_are_left_out(wmt, tmp_path):
    write_wmt(
        wmt / "newsdev2021.en-is.xml",
        "en-is",
        **{"en": {**DEV_EN, "b": ENGLISH["paper.9"]}, "is": {**DEV_IS, "b": ICELANDIC["paper.9"]}},
    )
    built = tell.build_is_en_news(wmt, tmp_path / "news", direction="en-is")
    assert built.directions["en-is"].train == 1
    assert built.notices == ["en-is: training documents: 1 share lines with a test document and were left out"]
    write_wmt(wmt / "newsdev2021.en-is.xml", "en-is")
    with pytest.raises(TellError, match="every en-is training document is a test document too"):
        tell.build_is_en_news(wmt, tmp_path / "none", direction="en-is")


def test_nothing_is_written_over_or_half_written(wmt, tmp_path):
    out = tmp_path / "news"
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps({"translation": {"en": LONG_EN, "is": LONG_IS}}) + "\n")
    tell.build_is_en_news(wmt, out, extra=[pairs], direction="en-is")
    with pytest.raises(TellError, match="already has a dataset"):
        tell.build_is_en_news(wmt, out)
    assert not (out / "is-en").exists()
    tell.build_is_en_news(wmt, Replace(out))
    assert not (out / "en-is" / "extra.jsonl").exists()  # the earlier build's
    (wmt / "newsdev2021.is-en.xml").unlink()
    with pytest.raises(TellError, match="no file of is-en training documents"):
        tell.build_is_en_news(wmt, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"direction": "en-de"}, ["--direction", "'en-de' is unknown"]),
        ({"times": 1}, ["--times"]),
        ({"train": "newstest2021.is-en.all.xml.gz"}, ["has is-en documents, and en-is is requested"]),
        ({"extra": ["short.json"]}, ["short.json", "no pair of more than 50 English words"]),
        ({"train": "odd.jsonl"}, ["odd.jsonl:1", "is not a row of IS-EN-NEWS"]),
        ({"train": "missing.xml"}, ["missing.xml", "no such file"]),
    ],
)
def test_errors_name_the_file(options, parts, wmt, tmp_path, monkeypatch):
    monkeypatch.chdir(wmt)
    Path("short.json").write_text(json.dumps({"translation": {"en": "Hi", "is": "Hæ"}}) + "\n")
    Path("odd.jsonl").write_text(json.dumps({"query": "Translate: hi", "response": "hæ"}) + "\n")
    with pytest.raises(TellError) as error:
        tell.build_is_en_news(wmt, tmp_path / "news", **options)
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "news").exists()


def test_command(wmt, tmp_path, capsys):
    out = tmp_path / "news"
    argv = ["build", "is-en-news", str(wmt / "newstest2021.is-en.all.xml.gz"), "--train", str(wmt), "-o", str(out)]
    assert run([*argv, "--direction", "is-en"]) == 0
    assert capsys.readouterr().out == f"1 training and 2 test documents in {out / 'is-en'}\n"
    assert run([*argv, "--overwrite"]) == 2
    assert "has is-en documents, and en-is is requested" in capsys.readouterr().err
    assert run([*argv, "--times", "many"]) == 2
    assert "--times" in capsys.readouterr().err


@needs_data
def test_wmt21_gives_the_published_rows(tmp_path):
    """All training rows, and the test rows but for ten documents whose lines were edited or end in a blank."""
    extra = DATA / "is_en_extra"
    names = ("ntrex_newstest2019-src.eng.txt.gz", "ntrex_newstest2019-ref.isl.txt.gz", "ntrex_DOCUMENT_IDS.tsv.gz")
    built = tell.build_is_en_news(
        DATA / "wmt21_news",
        tmp_path / "news",
        train=DATA / "is_en_news",
        extra=[[extra / name for name in names], extra / "flores_train.is-en.json.gz"],
    )
    same = {}
    for direction in DIRECTIONS:
        for ours, theirs in (("train", "dev"), ("test", "test")):
            rows = [row for _, row in read_records(DATA / "is_en_news" / f"{theirs}-{direction}.jsonl.gz")]
            made = published(tmp_path / "news", direction, ours)
            assert len(made) == len(rows)
            same[direction, ours] = (sum(a == b for a, b in zip(made, rows, strict=True)), len(rows))
    assert same == {
        ("en-is", "train"): (71, 71),
        ("en-is", "test"): (56, 65),
        ("is-en", "train"): (56, 56),
        ("is-en", "test"): (46, 47),
    }
    assert {d: n.extra for d, n in built.directions.items()} == {"en-is": 198, "is-en": 183}
