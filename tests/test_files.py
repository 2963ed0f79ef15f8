"""Small files with limits: no pipe is waited for, no alias grows, no value ends in another exception than ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

import tell
from tell.errors import TellError
from tell.files import (
    atomic_folder,
    claim_path,
    expanded,
    parse_yaml,
    read_bytes,
    read_facts,
    read_json,
    read_text,
    remove_folder,
    restore_folder,
    stamp,
    write_json,
)

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALIASES, "more than 200,000 values"),
        ("&a [*a]", "contains itself"),
        ("x: &a {b: *a}", "contains itself"),
        ("seed: 2001-99-99", "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("seed: !!int x", "not valid YAML"),
        ("seed: !!timestamp x", "not valid YAML"),
        ("seed: !!binary é", "not valid YAML"),
        ("!!python/object/apply:os.system [id]", "not valid YAML"),
        ("{[a]: 1}", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        ("a: [", "not valid YAML"),
    ],
    ids=range(12),
)
def test_yaml_that_cannot_be_a_value(text, said):
    with pytest.raises(TellError, match=said):
        parse_yaml(text, where="run.yaml")


def test_aliases_that_stand_for_little_are_fine():
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]", where="x") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert parse_yaml("", where="x") is None


def test_what_is_no_regular_file_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    before = os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else []
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(TellError, match=r"is a (pipe or device|folder), not a file"):
            read_text(path, remedy="Give a file.")
    (tmp_path / "large").write_bytes(b"x" * 100)
    with pytest.raises(TellError, match="at most"):
        read_bytes(tmp_path / "large", most=50, remedy="Give a smaller one.")
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(TellError, match="cannot be read"):
            read_text(tmp_path / name, remedy="Give a file.")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", remedy="")
    assert not before or len(os.listdir("/proc/self/fd")) == len(before)  # nothing stays open


def test_homes_that_nobody_has():
    assert expanded("~no-such-user/x") == Path("~no-such-user/x") and expanded("~").is_absolute()


def test_yaml_and_homes_are_read_here_alone():
    """Elsewhere a bomb, a pipe or an unknown home would end in another exception, or not at all."""
    package = Path(tell.__file__).parent
    allowed = {"files.py", "studies/executors/ray.py"}  # ray: what tell itself has sent
    for path in package.rglob("*.py"):
        if path.relative_to(package).as_posix() not in allowed:
            text = path.read_text(encoding="utf-8")
            assert "safe_load(" not in text and "yaml.load(" not in text and ".expanduser()" not in text, path


def replace(folder: Path, text: str) -> None:
    with atomic_folder(folder) as temporary:
        (temporary / "text").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("renames", [1, 2])
def test_the_next_writing_of_a_folder_undoes_or_ends_what_a_kill_cut_short(renames, tmp_path, monkeypatch):
    """Killed after the first rename, the old folder is the only copy; after the second it is rubbish."""

    class Kill(BaseException):
        pass

    def kill_after(source, target, rename=os.replace):
        rename(source, target)
        done.append(target)
        if len(done) == renames:
            monkeypatch.undo()
            monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # the dead clean nothing up
            raise Kill

    folder, done = tmp_path / "folder", []
    replace(folder, "old")
    monkeypatch.setattr(os, "replace", kill_after)
    with pytest.raises(Kill):
        replace(folder, "new")
    monkeypatch.undo()
    assert ".folder.old" in names(tmp_path) and folder.exists() is (renames == 2)
    with pytest.raises(RuntimeError, match="full"), atomic_folder(folder):
        raise RuntimeError("full")  # nothing new takes its place
    assert (folder / "text").read_text() == ("old" if renames == 1 else "new")
    assert ".folder.old" not in names(tmp_path)
    replace(folder, "newer")
    assert (folder / "text").read_text() == "newer" and ".folder.old" not in names(tmp_path)


def test_a_removed_folder_does_not_come_back(tmp_path):
    folder = tmp_path / "folder"
    replace(folder, "new")
    shutil.copytree(folder, tmp_path / ".folder.old")
    remove_folder(folder)
    restore_folder(folder)
    assert names(tmp_path) == []
    remove_folder(folder)  # where there is none


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_yaml_is_the_same_in_c_and_in_python(monkeypatch):
    texts = [path.read_text("utf-8") for path in sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))[:20]]
    texts += ["a: 1:30\nb: 0x1F\nc: 010\nd: .inf\ne: yes\nf: 2001-01-01\ng: ~", "{a: 1, a: 2}", "|\n a\n  b\n", ""]
    texts += [
        "a: b: c",
        "a: 1\n\tb: 2",
        "a: &a [*a]",
        "[" * 500,
        "- " * 5000 + "a",
        "\ud800",
        "x: !!python/name:os.x 1",
    ]

    def results() -> list[object]:
        found: list[object] = []
        for text in texts:
            try:
                found.append(parse_yaml(text, where="x"))
            except TellError as error:
                found.append(str(error))
        return found

    quick = results()
    monkeypatch.delattr(yaml, "CSafeLoader")
    assert quick == results()


def test_a_taken_name_is_claimed_with_a_number(tmp_path):
    assert [claim_path(tmp_path / "a.csv").name for _ in range(3)] == ["a.csv", "1-a.csv", "2-a.csv"]


def test_facts_of_a_file_are_those_it_has_now(tmp_path):
    path = tmp_path / "a.json"
    assert read_facts(path) == {} and stamp(path) == (0.0, 0, 0, 0)
    for n in range(3):  # within one tick of the clock and of one size
        write_json(path, {"n": n})
        assert read_facts(path) == {"n": n}
    path.write_text("{")
    assert read_facts(path) == {}
