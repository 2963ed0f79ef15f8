import gzip

import pytest

from tell.data.file_read import FileRead
from tell.data.formats import read_records, read_text
from tell.errors import TellError

GERMAN = "text,label\nIch möchte kündigen – bitte prüfen Sie die „Größe“,ende\nEr zahlt 5 € über das Konto,geld\n"
FRENCH = "texte,label\nJ'ai été débité deux fois à Noël,facture\nça ne marche pas,bug\n"
RUSSIAN = "text,label\nНе могу войти в систему,доступ\nВерните деньги пожалуйста,оплата\n"
JAPANESE = "text,label\nログインできません。助けてください,アクセス\n請求書が間違っています,請求\n"
CHINESE = "text,label\n无法登录系统请帮忙,访问\n发票金额不对,账单\n"
CASES = [
    (GERMAN, "cp1252", "cp1252"),
    (FRENCH, "cp1252", "cp1252"),
    (FRENCH, "latin-1", "cp1252"),
    (RUSSIAN, "cp1251", "cp1251"),
    (RUSSIAN, "koi8-r", "koi8-r"),
    (JAPANESE, "cp932", "cp932"),
    (CHINESE, "gb18030", "gb18030"),
    (GERMAN, "utf-16", "utf-16"),
    (GERMAN, "utf-16-le", "utf-16-le"),
    (GERMAN, "utf-16-be", "utf-16-be"),
    (GERMAN, "utf-32", "utf-32"),
]


@pytest.mark.parametrize(
    ("text", "encoding", "named"), CASES, ids=[f"{named}-{text[-9:-4]}" for text, _, named in CASES]
)
def test_encodings_are_recognised_said_and_read(tmp_path, text, encoding, named):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode(encoding))
    found = FileRead()
    assert read_text(path, found=found) == text
    assert found.encoding == named
    assert found.notices[0].startswith(f"a.csv: not UTF-8; read as {named}")
    assert encoding in ("utf-16", "utf-32") or "if that is wrong" in found.notices[0]  # a mark at the head is certain


def test_utf8_is_not_guessed_at(tmp_path):
    path = tmp_path / "a.csv"
    for data in (GERMAN.encode(), b"\xef\xbb\xbf" + GERMAN.encode()):
        path.write_bytes(data)
        found = FileRead()
        assert read_text(path, found=found) == GERMAN
        assert (found.encoding, found.notices) == ("utf-8", [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.tsv", "a.csv.gz"])
def test_every_text_format_is_read(tmp_path, name):
    line = (
        "text\tlabel\nIch möchte kündigen\tende\n"
        if "tsv" in name
        else '{"text": "Ich möchte kündigen", "label": "ende"}\n'
    )
    line = GERMAN if "csv" in name else line
    data = line.encode("utf-16")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = FileRead()
    assert next(read_records(tmp_path / name, found))[1]["text"].startswith("Ich möchte kündigen")
    assert found.encoding == "utf-16"


def test_other_files_than_data_must_be_utf8(tmp_path):
    path = tmp_path / "schema.json"
    for encoding, what in (("utf-16", "is UTF-16"), ("cp1252", "is not UTF-8")):
        path.write_bytes('{"title": "Größe"}'.encode(encoding))
        with pytest.raises(TellError, match=what):
            read_text(path)
    (tmp_path / "a.csv").write_bytes("a,b\nGröße,1\n".encode("cp1252"))
    with pytest.raises(TellError, match="is not UTF-8"):
        list(read_records(tmp_path / "a.csv"))  # by a caller that says nothing of guesses


def test_a_damaged_utf8_file_is_not_taken_for_another_encoding(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(GERMAN.encode() + b"caf\xe9,x\n")
    with pytest.raises(TellError, match=r"a.csv:4: is not UTF-8 \(byte 0xe9"):
        read_text(path, found=FileRead())


BROKEN = {
    "mark": ("a,b\n1,2\n".encode("utf-16")[:-1], "begins as UTF-16 and is not"),
    "picture": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xfe\x00\x01", "not UTF-8 (byte 0x89"),
    "noise": (bytes(range(1, 255)) * 4, "not UTF-8"),
    "both": (b'{"a": "\xc3\xa9"}\n{"a": "caf\xe9"}\n', "not UTF-8 (byte 0xe9 at offset 22)"),
}


@pytest.mark.parametrize(("data", "what"), BROKEN.values(), ids=BROKEN)
def test_what_is_in_no_encoding_is_refused(tmp_path, data, what):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(TellError) as caught:
        read_text(path, found=FileRead())
    assert what in caught.value.what and caught.value.remedy
