"""Rooms import what the architecture page says, those that plan or draw load no torch, and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tell

PACKAGE = Path(tell.__file__).parent
GROUND = {
    "child_process",
    "nested",
    "overrides",
    "registry",
    "__init__",
    "errors",
    "shown",
    "files",
    "home",
    "cpu",
    "progress",
    "folder",
    "arm",
    "config",
    "config_sections",
    "config_values",
    "presets",
    "metric_names",
    "names",
    "number_text",
    "parts",
    "pass_memory",
    "seeds",
    "patience",
    "chat_client",
}
ROOMS = {
    "data": set(),
    "anchor": {"data"},
    "rows": {"data", "anchor"},
    "models": {"kernels"},
    "mix": {"rows"},
    "kernels": set(),
    "train": {"rows", "mix", "kernels"},
    "readout": {"data"},
    "decode": {"data", "rows", "train", "kernels"},
    "score": {"data"},
    "report": {"score"},
    "run": {"data", "anchor", "rows", "models", "mix", "train", "readout", "decode", "score", "report"},
    "verbs": {"data", "anchor", "rows", "models", "mix", "train", "readout", "decode", "score", "report", "run"},
    "exports": {
        "data",
        "anchor",
        "rows",
        "models",
        "train",
        "decode",
        "score",
        "run",
        "verbs",
    },
    "paper": {"data"},
    "serve": {"data", "anchor", "rows", "decode", "run", "verbs", "exports"},
    "ui": {"data", "report", "run", "exports", "serve", "studies"},
    "studies": {
        "rows",
        "models",
        "mix",
        "data",
        "anchor",
        "train",
        "decode",
        "score",
        "report",
        "run",
        "verbs",
        "paper",
    },
}
EXCEPTIONS = {
    "score/bleurt.py": {"models"},
    "run/benchmarks/run_benchmarks.py": {"verbs"},
    "run/choose_anchor.py": {"verbs"},
    "run/tune.py": {"verbs"},
}
NO_TORCH = (
    "arm",
    "config",
    "config_sections",
    "config_values",
    "metric_names",
    "names",
    "number_text",
    "parts",
    "pass_memory",
    "data",
    "anchor",
    "rows",
    "mix",
    "models",
    "readout",
    "score",
    "report",
    "paper",
    "studies",
    "ui",
)
MOST_PARAMETERS, MOST_LINES = 7, 80  # of a function; kernels/ follows C
WITH_TORCH = ("models.convert", "models.load", "models.spread")


def imported(path: Path) -> Iterator[str]:
    """Rooms and modules of ours that a file imports, at its head or late; what only type checkers read left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    skipped = {id(inner) for block in typing for inner in ast.walk(block)}
    for node in ast.walk(tree):
        names: list[str] = []
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            module = node.module or ""
            names = [f"tell.{alias.name}" for alias in node.names] if module == "tell" else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("tell.") and not name.startswith("tell.__"):
                yield name.split(".")[1]


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        name = path.relative_to(PACKAGE).as_posix()
        allowed = GROUND | {room} | ROOMS[room] | EXCEPTIONS.get(name, set())
        assert set(imported(path)) <= allowed, name


def test_every_room_has_a_rule():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == {*ROOMS, "cli"}


def test_planning_and_drawing_load_no_torch():
    modules = ["tell.verbs.plan_run", "tell.verbs.look", "tell.verbs.gate"]
    for room in NO_TORCH:
        place = PACKAGE / room
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for path in files]
        modules += [f"tell.{name}" for name in names if name not in WITH_TORCH]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_file_name_stands_twice():
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    assert sorted(names) == sorted(set(names))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function outside kernels/, named ``room/file.py:function``."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("kernels/"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{name}:{node.name}", node


def test_functions_take_few_parameters():
    def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        named = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        return sum(parameter.arg not in ("self", "cls") for parameter in named)

    assert not [name for name, node in functions() if parameters(node) > MOST_PARAMETERS]


def test_functions_are_short():
    found = {name for name, node in functions() if (node.end_lineno or 0) - node.lineno + 1 > MOST_LINES}
    assert not found
