import gzip
import json

import pytest

from news import ENGLISH, ICELANDIC, write_wmt
from tell.errors import TellError
from tell.paper.parallel_texts import read_pairs, read_wmt

TMX = """<?xml version="1.0" encoding="UTF-8"?>
<tmx version="1.4"><header srclang="en"/><body>
<tu><tuv xml:lang="en-US"><seg>A  <ph>x</ph> boat.</seg></tuv><tuv xml:lang="IS"><seg>Bátur.</seg></tuv></tu>
<tu><tuv xml:lang="en"><seg>No pair.</seg></tuv><tuv xml:lang="de"><seg>Kein Paar.</seg></tuv></tu>
<tu><tuv lang="is"><seg>Hestur.</seg></tuv><tuv lang="en"><seg>A horse.</seg></tuv></tu>
</body></tmx>"""


def pairs(spec):
    return [(doc.id, doc.texts["en"], doc.texts["is"]) for doc in read_pairs(spec, ("en", "is"))]


@pytest.mark.parametrize("name", ["news.xml", "news.xml.gz"])
def test_wmt_documents_stand_by_id_with_their_systems(name, tmp_path):
    shouted = {doc: [line.upper() for line in lines] for doc, lines in ICELANDIC.items()}
    direction, docs = read_wmt(write_wmt(tmp_path / name, "en-is", systems={"Loud": shouted}))
    assert direction == "en-is"
    assert [doc.id for doc in docs] == ["paper.10", "paper.9"]  # as texts, which is how WMT numbers segments
    for doc in docs:
        assert doc.texts == {"en": tuple(ENGLISH[doc.id]), "is": tuple(ICELANDIC[doc.id])}
        assert doc.systems == {"Loud": tuple(shouted[doc.id])}
    assert docs[1].text("en") == "Ferry leaves early\nThe ferry to the islands left two hours early today."
    assert docs[1].words("en") == 13


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        ({"is": {"paper.9": ICELANDIC["paper.9"]}}, ["document paper.10", "has no reference"]),
        ({"is": {**ICELANDIC, "paper.9": ["Ein lína"]}}, ["document paper.9", "1 segments of is for 2"]),
        ({"en": {}}, ["has no document"]),
    ],
)
def test_broken_wmt_files(texts, parts, tmp_path):
    with pytest.raises(TellError) as error:
        read_wmt(write_wmt(tmp_path / "news.xml", "en-is", **texts))
    for part in ["news.xml", *parts]:
        assert part in str(error.value)


def test_what_is_not_xml(tmp_path):
    (tmp_path / "news.xml").write_text("<dataset><doc>")
    with pytest.raises(TellError, match="is not valid XML"):
        read_wmt(tmp_path / "news.xml")


def test_aligned_lines_one_by_one_and_by_document(tmp_path):
    en, is_, ids = tmp_path / "a.en.gz", tmp_path / "a.is", tmp_path / "ids.tsv"
    en.write_bytes(gzip.compress("one\r\ntwo\u2028more\n \nfour\n".encode()))
    is_.write_text("einn\ntveir\nþrír\nfjórir\n")
    ids.write_text("x\ny\ny\nx\n")
    assert pairs(f"{en},{is_}") == [
        ("1", ("one",), ("einn",)),
        ("2", ("two\u2028more",), ("tveir",)),
        ("4", ("four",), ("fjórir",)),
    ]
    assert (
        pairs([en, is_, ids])
        == pairs(f"{en}, {is_}, {ids}")
        == [
            ("x", ("one", "four"), ("einn", "fjórir")),
            ("y", ("two\u2028more",), ("tveir",)),
        ]
    )
    is_.write_text("einn\ntveir\n")
    with pytest.raises(TellError, match=r"do not match line for line \(4, 2 lines\)"):
        pairs(f"{en},{is_}")


def test_json_of_translations(tmp_path):
    file = tmp_path / "flores.json"
    rows = [{"translation": {"is": "Bátur", "en": "Boat", "de": "Boot"}}, {"translation": {"is": " ", "en": "Gone"}}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pairs(file) == [("1", ("Boat",), ("Bátur",))]
    file.write_text(json.dumps({"translation": {"en": "Boat"}}) + "\n" + json.dumps(rows[0]) + "\n")
    with pytest.raises(TellError, match=r"flores.json:1: has no translation with en and is"):
        pairs(file)


@pytest.mark.parametrize("name", ["memory.tmx", "memory.tmx.gz"])
def test_translation_memory(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(gzip.compress(TMX.encode()) if name.endswith("gz") else TMX.encode())
    assert pairs(file) == [("1", ("A x boat.",), ("Bátur.",)), ("3", ("A horse.",), ("Hestur.",))]
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(TellError, match="cannot be read as TMX"):
        pairs(file)


@pytest.mark.parametrize("spec", ["pairs.txt", "a,b,c,d"])
def test_unknown_kinds(spec):
    with pytest.raises(TellError, match="neither JSON, TMX nor"):
        pairs(spec)


def test_missing_files_are_named(tmp_path):
    for spec in (f"{tmp_path}/no.json", f"{tmp_path}/no.tmx", f"{tmp_path}/no.en,{tmp_path}/no.is"):
        with pytest.raises(TellError, match="no such file"):
            pairs(spec)
