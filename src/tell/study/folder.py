"""Claiming a run folder: a fresh one, an interrupted one to resume, or one to overwrite."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from tell.config import Config, make_config
from tell.errors import TellError
from tell.run import RunFolder, write_text

# Keys that may differ between a run and its resumption: they change numbers by rounding, and dropout's draws, at most.
FREE = ("out", "train.parallel")
PATHS = (
    ("task", "data"),
    ("task", "test"),
    ("task", "json_schema"),
    ("general", "source"),
    ("anchor", "text"),
    ("model", "name"),
    ("tokens", "unit"),
    ("eval", "benchmark_data"),
    ("eval", "bleurt"),
)


KEYWORDS = frozenset({"model", "self", "none", "auto"})  # values that mean something else than a path


def with_full_paths(config: Config) -> Config:
    """The configuration with its files' paths made absolute, so that a run can be used from any folder."""
    out = config.model_copy(deep=True)
    for section, key in PATHS:
        value = getattr(getattr(out, section), key)
        if not isinstance(value, str) or value in KEYWORDS:
            continue
        mark = "@" if key == "text" else ""
        path = Path(value.removeprefix(mark)).expanduser()
        if value.startswith(mark) and path.exists():
            setattr(getattr(out, section), key, f"{mark}{path.resolve()}")
    return out


def default_out(config: Config) -> Path:
    """``runs/<data>-<n>``, the first n that is free."""
    stem = Path(str(config.task.data)).name.split(".")[0] or "run"
    n = 1
    while (Path("runs") / f"{stem}-{n}").exists():
        n += 1
    return Path("runs") / f"{stem}-{n}"


def claim(config: Config, *, resume: bool, overwrite: bool) -> tuple[RunFolder, bool]:
    """Check the output folder without writing anything; and whether there is a run to resume in it.

    Raises:
        TellError: the folder exists and neither resume nor overwrite was said; it holds something else; or
            the run in it was made with other settings.
    """
    root = Path(config.out) if config.out else default_out(config)
    folder = RunFolder(root)
    if resume and overwrite:
        raise TellError("--resume and --overwrite are both given", remedy="Give one of them.")
    if root.is_file():
        raise TellError("is a file", where=f"--out {root}", remedy="Name a folder.")
    filled = root.is_dir() and any(root.iterdir())
    if not filled:
        if resume:
            raise TellError("holds no run to resume", where=f"--out {root}", remedy="Leave --resume out.")
        return folder, False
    if not _is_run(folder):
        raise TellError(
            f"holds other files and no run{' to resume' if resume else ''}, so it is left as it is",
            where=f"--out {root}",
            remedy="Choose another --out.",
        )
    if overwrite:
        return folder, False
    if not resume:
        state = folder.read_status().get("state", "unknown")
        raise TellError(
            f"exists already (state: {state})",
            where=f"--out {root}",
            remedy="Add --resume to go on with it, --overwrite to start anew, or choose another --out.",
        )
    old = read_run_config(folder)
    if (changed := _changed(old, config)) is not None:
        raise TellError(
            f"the run was made with {changed}",
            where=f"--out {root}",
            remedy="Resume with the settings in run.yaml (`tell tune -c run.yaml --resume`), or use --overwrite.",
        )
    return folder, True


def _is_run(folder: RunFolder) -> bool:
    """run.yaml alone may be somebody's own configuration, lying among their files."""
    return folder.config.exists() and folder.status.exists()


def open_folder(folder: RunFolder, *, fresh: bool, config: Config, seconds: float = 0.0) -> None:
    """Create the folder with its resolved configuration; the files of an old run in it are removed first.

    Args:
        seconds: what earlier sessions of this run took.
    """
    if fresh and folder.root.exists():
        try:
            for path in folder.files():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise TellError(
                f"the old run cannot be removed ({error.strerror or error})",
                where=f"--out {folder.root}",
                remedy="Choose another --out.",
            ) from error
    write_text(folder.config, config.to_yaml())
    folder.set_status("running", stage="start", seconds=round(seconds, 1))


def read_run_config(folder: RunFolder) -> Config:
    """The resolved configuration of a run."""
    if not folder.root.is_dir():
        raise TellError("no such run folder", where=str(folder.root), remedy="Give the folder `tell tune` wrote.")
    path = folder.require(folder.config, "`tell tune`")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise TellError(f"is not valid YAML ({error})", where=str(path), remedy="Make the run again.") from error
    return make_config(data, where=str(path))


def _changed(old: Config, new: Config) -> str | None:
    """The first key that differs, with both values; None where nothing does."""
    a, b = _flat(old), _flat(new)
    for key in a:
        if key not in FREE and a[key] != b.get(key):
            return f"{key} = {a[key]!r}, not {b.get(key)!r}"
    return None


def _flat(config: Config) -> dict:
    out: dict = {}

    def walk(value: object, prefix: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{prefix}.{key}" if prefix else key)
        else:
            out[prefix] = value

    walk(config.model_dump(by_alias=True, mode="json"), "")
    return out
