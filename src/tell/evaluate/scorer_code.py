"""A user's own scorer as files: studies name cells by them, read them anew when they change, and send them along."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from modulefinder import ModuleFinder
from pathlib import Path

INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib", "platstdlib"))
_imported: dict[str, str] = {}  # scorer's module -> hash of its files when this process imported it
_sent: list[str] = []  # the folder of one that came from another machine


@dataclass(frozen=True)
class ScorerCode:
    """The files that decide a scorer's numbers.

    Attributes:
        module: its dotted name.
        root: the folder it is imported from.
        files: module name -> file; the scorer's, and those that it imports from the same root, however indirectly.
        installed: it belongs to a package of this Python. Only its own file is listed then, and other machines must
            have the package too.
    """

    module: str
    root: Path
    files: dict[str, Path]
    installed: bool

    @property
    def content(self) -> str:
        """SHA-256 (hexadecimal) over names and bytes of its files."""
        digest = hashlib.sha256()
        for name, path in sorted(self.files.items()):
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()


def find_scorer_code(spec: str | None) -> ScorerCode | None:
    """The files of ``package.module:function``; None of TELL's own scorers and of one that cannot be found."""
    module = (spec or "").partition(":")[0]
    if not module or module.partition(".")[0] == "tell":
        return None
    with scorers_first():
        origin = _origin(module)
    if origin is None or not origin.is_file():
        return None
    root = origin.parents[module.count(".") + (origin.name == "__init__.py")]
    if any(origin.is_relative_to(place) for place in INSTALLED):
        return ScorerCode(module, root, {module: origin}, installed=True)
    return ScorerCode(module, root, {module: origin, **_imports(module, root)}, installed=False)


def _origin(module: str) -> Path | None:
    """The file that ``module`` would be imported from now, whatever is imported already; nothing is run."""
    name, found, path = "", None, None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        found = next((spec for finder in sys.meta_path if (spec := finder.find_spec(name, path))), None)
        if found is None:
            return None
        path = found.submodule_search_locations
    return Path(found.origin) if found and found.origin else None


def _imports(module: str, root: Path) -> dict[str, Path]:
    """What a module imports below ``root``, found without running it; nothing where its code cannot be read."""
    finder = ModuleFinder(path=[str(root)])
    try:
        finder.import_hook(module)
    except Exception:  # a syntax error, a package without __init__.py
        return {}
    return {name: Path(known.__file__) for name, known in finder.modules.items() if known.__file__}


def forget_changed(spec: str) -> None:
    """Let the next import read a scorer's files again if they are not those that this process imported."""
    code = find_scorer_code(spec)
    if code is None or code.installed:
        return
    content = code.content
    if _imported.setdefault(code.module, content) != content:
        _imported[code.module] = content
        for name in code.files:
            sys.modules.pop(name, None)


def search_in(folder: str | Path | None) -> None:
    """Search scorers in ``folder`` before anything else, from now on; None: in the current directory, as at first."""
    _sent[:] = [str(folder)] if folder else []


@contextmanager
def scorers_first() -> Iterator[None]:
    """Search modules where scorers lie, in the current directory if nobody said otherwise, before anything else."""
    places = [*_sent, os.getcwd()]
    sys.path[:0] = places
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for place in places:
            if place in sys.path:
                sys.path.remove(place)
