"""Source files of a user's scorer: studies name cells by them, reload them after a change, and send them to workers."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib", "platstdlib"))
_imported: dict[str, str] = {}  # scorer's module -> hash of its files when this process imported it
_sent: list[str] = []  # the folder of a scorer that came from another machine


@dataclass(frozen=True)
class ScorerCode:
    """The files that determine a scorer's numbers.

    Attributes:
        module: its dotted name.
        root: the folder it is imported from.
        files: module name -> file; the scorer's, and those that it imports from the same root, directly or not.
            Excluded: imports by name at run time, and data files.
        installed: it belongs to an installed package. Only modules of that package are listed then, and other machines
            must have it too.
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
    """The files of ``package.module:function``; None for TELL's own scorers, or if it cannot be found."""
    module = (spec or "").partition(":")[0]
    if not module or module.partition(".")[0] == "tell":
        return None
    with scorers_first():
        origin = _origin(module)
    if origin is None or not origin.is_file():
        return None
    root = origin.parents[module.count(".") + (origin.name == "__init__.py")]
    installed = any(origin.is_relative_to(place) for place in INSTALLED)
    return ScorerCode(module, root, _files(module, origin, root, installed=installed), installed)


def _origin(module: str) -> Path | None:
    """The file that importing ``module`` afresh would run; runs nothing."""
    name, found, path = "", None, None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        found = next((spec for finder in sys.meta_path if (spec := finder.find_spec(name, path))), None)
        if found is None:
            return None
        path = found.submodule_search_locations
    return Path(found.origin) if found and found.origin else None


def _files(module: str, origin: Path, root: Path, *, installed: bool) -> dict[str, Path]:
    """The files of a module and of what it imports below ``root``; parsed, not run."""
    found: dict[str, Path] = {}
    new = [(module, origin)]
    while new:
        name, path = new.pop()
        if name in found:
            continue
        found[name] = path
        for other in _imported_names(name, path, path.stat().st_mtime_ns):
            if not installed or other.partition(".")[0] == module.partition(".")[0]:
                place = root.joinpath(*other.split("."))
                new += [(other, file) for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    return found


@lru_cache(maxsize=4096)
def _imported_names(module: str, path: Path, _changed: int) -> frozenset[str]:
    """Every name that a file imports, a module or a part of one, with the packages around it."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):  # the run will report what is wrong with it
        return frozenset()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = {module}
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if package else []
            around = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*around, *filter(None, [node.module])])
            names.add(base)
            names.update(f"{base}.{alias.name}".lstrip(".") for alias in node.names)
    return frozenset(name.rsplit(".", i)[0] for name in names if name for i in range(name.count(".") + 1))


def forget_changed(spec: str) -> None:
    """Let the next import reload a scorer's files if they changed since this process imported them."""
    code = find_scorer_code(spec)
    if code is None or code.installed:
        return
    content = code.content
    if _imported.setdefault(code.module, content) != content:
        _imported[code.module] = content
        for name in code.files:
            sys.modules.pop(name, None)


def search_in(folder: str | Path | None) -> None:
    """From now on, import scorers from ``folder`` first; None: from the current directory, the default."""
    _sent[:] = [str(folder)] if folder else []


@contextmanager
def scorers_first() -> Iterator[None]:
    """Import from the folder of `search_in` and the current directory first."""
    places = [*_sent, os.getcwd()]
    sys.path[:0] = places
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for place in places:
            if place in sys.path:
                sys.path.remove(place)
