"""Uploads: names that two may want, clients that go, file names that are too long."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys

import pytest
from starlette.requests import ClientDisconnect

from tell.errors import TellError
from tell.files import claim_path
from tell.ui import ui_root
from tell.ui.ui_root import UiRoot, clean_name
from ui.asking import ORIGIN


def test_uploads_stay_under_the_root(client, root):
    for name in ("../../a.csv", "/etc/a.csv", "C:\\x\\a.csv", "a.csv"):
        answer = client.put(f"/upload/{name.replace('/', '%2F')}", content=b"q,a\n1,2\n", headers=ORIGIN)
        assert answer.status_code == 201
        assert (root.path / answer.json()["path"]).read_bytes() == b"q,a\n1,2\n"
    assert sorted(p.name for p in root.uploads.iterdir()) == ["1-a.csv", "2-a.csv", "3-a.csv", "a.csv"]
    assert [p for p in root.path.parent.rglob("a.csv") if root.uploads not in p.parents] == []
    assert clean_name("Köln; rm -rf $(x).CSV.gz") == "Köln-rm--rf-x.csv.gz"
    for name in ("a.exe", ".bashrc", "csv", ".csv.sh"):
        assert client.put(f"/upload/{name}", content=b"x", headers=ORIGIN).status_code == 400


def test_an_upload_over_the_limit_leaves_nothing(client, root, monkeypatch):
    monkeypatch.setattr(ui_root, "MOST_UPLOAD", 1 << 20)
    answer = client.put("/upload/a.csv", content=bytes(2 << 20), headers=ORIGIN)
    assert answer.status_code == 400 and "larger than 1 MB" in answer.json()["error"]
    assert list(root.uploads.iterdir()) == []


def test_a_full_disk_leaves_nothing(client, root):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        answer = client.put("/upload/a.csv", content=bytes(1 << 20), headers=ORIGIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answer.status_code == 400 and "a.csv" in (said := answer.json()["error"]) and "tell ui ROOT" in said, said
    assert list(root.uploads.iterdir()) == []


def test_two_uploads_of_one_name_are_both_kept(tmp_path):
    root = UiRoot(tmp_path)

    async def main() -> list[str]:
        begun = [asyncio.Event(), asyncio.Event()]

        async def parts(own: int):
            yield b"%d," % own
            begun[own].set()
            await begun[1 - own].wait()  # both have their name now
            yield b"end"

        return await asyncio.gather(*(root.receive("a.csv", parts(own)) for own in (0, 1)))

    names = asyncio.run(main())
    assert sorted(names) == ["uploads/1-a.csv", "uploads/a.csv"]
    assert [(tmp_path / name).read_bytes() for name in names] == [b"0,end", b"1,end"]


def test_a_client_that_goes_leaves_nothing(tmp_path):
    root = UiRoot(tmp_path)
    seen = []

    async def parts():
        yield b"q,a\n"
        seen.append(([path.name for path in root.uploads.glob("[!.]*")], root.uploaded()))
        raise ClientDisconnect

    with pytest.raises(ClientDisconnect):
        asyncio.run(root.receive("a.csv", parts()))
    assert seen == [(["a.csv"], [])]  # claimed, and not shown before it is whole
    assert list(root.uploads.iterdir()) == []


def test_a_client_that_goes_is_no_fault_of_the_page(client, root, monkeypatch):
    async def gone(*_: object) -> str:
        raise ClientDisconnect

    monkeypatch.setattr(UiRoot, "receive", gone)
    assert client.put("/upload/a.csv", content=b"x", headers=ORIGIN).status_code == 400  # raised nothing


def test_a_name_is_cut_to_what_file_systems_take(tmp_path):
    root = UiRoot(tmp_path)

    async def parts():
        yield b"x"

    for name in ("x" * 300, "語" * 300):
        path = tmp_path / asyncio.run(root.receive(f"{name}.csv.gz", parts()))
        assert path.read_bytes() == b"x" and len(path.name.encode()) < 120
        assert len(root.fresh_run(f"{name}.csv").encode()) < 120


def test_a_file_that_goes_while_it_is_listed_is_left_out(tmp_path):
    root = UiRoot(tmp_path)
    root.uploads.mkdir()
    (root.uploads / "a.csv").write_text("x")
    (root.uploads / "b.csv").symlink_to(root.uploads / "gone.csv")  # has a name and no facts
    assert root.uploaded() == ["uploads/a.csv"]


def test_a_folder_that_takes_no_file_is_one_line(tmp_path):
    with pytest.raises(TellError, match="cannot be written"):
        claim_path(tmp_path / "gone" / "a.csv")


def test_reading_a_manifest_loads_no_pandas(tmp_path):
    code = """
import sys, pyarrow, pyarrow.parquet
from pathlib import Path
from tell.report.read_run import read_manifest
path = Path(sys.argv[1])
pyarrow.parquet.write_table(pyarrow.table({"source": ["task"], "step": [1]}), path)
before = set(sys.modules)
assert read_manifest(path).step.tolist() == [1]
assert not {"pandas", "pyarrow.dataset"} & (set(sys.modules) - before)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.parquet")], check=True)
