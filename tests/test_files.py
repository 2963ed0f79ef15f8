"""Small files with limits: no pipe is waited for, no alias grows, no value ends in another exception than ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tell
from tell.errors import TellError
from tell.files import expanded, parse_yaml, read_bytes, read_json, read_text

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALIASES, "more than 200,000 values"),
        ("&a [*a]", "within what it stands for"),
        ("x: &a {b: *a}", "within what it stands for"),
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
