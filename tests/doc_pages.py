"""Fenced blocks of the documentation, and a runner for those that are marked.

A block that follows ``<!-- run -->`` is run; one that follows ``<!-- file NAME -->`` is written to that file. Blocks of
one page share a folder. Models named in a block are replaced by a tiny one, and runs are made small, so a test shows
that commands work and fit together, not what they score.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = ("docs/reference/config.md", "docs/reference/recipe.md", "docs/reference/cli.md")
FENCE = re.compile(r"(?:^[ ]*<!-- (run|file) ?(\S*) -->\n)?^([ ]*)```(\w*)[^\n]*\n(.*?)^\3```", re.M | re.S)
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "smollm2-135m")
SMALL = {  # flags that make a run small, by verb; put ahead of the block's own `--set`
    "tune": (
        *("task.rows=6", "task.test_rows=4", "general.tokens=200", "mix.repeat=2", "train.checkpoint_every=0"),
        *("eval.arms=[base,sft-matched,tell]", "eval.forgetting_rows=2", "eval.forgetting_answers=1"),
        *("anchor.candidates=1", "generate.max_new_tokens=4", "eval.bootstrap=100"),
    ),
    "plan": (),
    "look": (),
    "anchor": ("anchor.candidates=1", "generate.max_new_tokens=4"),
    "separate": (),
}


@dataclass(frozen=True)
class Block:
    """A fenced block: the page it is on, its line, its language, its text, and its mark."""

    page: str
    line: int
    language: str
    text: str
    mark: str
    name: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command; lines that end in a backslash are joined, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        parts = (part for line in lines for part in re.split(r"\s&&\s", line))
        return [words for part in parts if (words := shlex.split(part, comments=True))]


def pages() -> list[Path]:
    """Every page that people write by hand."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found += [*sorted((ROOT / "examples").glob("*/README.md")), ROOT / "recipes/README.md"]
    return [page for page in found if "results" not in page.parts]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent = len(match[3])
        body = "".join(line[indent:] for line in match[5].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page.relative_to(ROOT).as_posix(), line, match[4], body, match[1] or "", match[2] or "")


def tell_commands() -> Iterator[tuple[Block, list[str]]]:
    """Every ``tell VERB ...`` of every page, without what is in front of ``tell``."""
    for page in pages():
        for block in blocks(page):
            if block.language == "bash":
                for words in block.commands:
                    if "tell" in words[:-1]:
                        yield block, words[words.index("tell") + 1 :]


def run_block(block: Block, folder: Path, tiny: Path) -> None:
    """Run a marked block in ``folder`` (the current one) with a tiny model."""
    text = block.text
    for name in MODELS:
        text = text.replace(name, str(tiny))
    if block.mark == "file":
        (folder / block.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.name).write_text(text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(text, str(block), "exec"), {"__name__": "__main__"})
    else:
        for words in Block(block.page, block.line, "bash", text, "", "").commands:
            _run(block, words, tiny)


def _run(block: Block, words: list[str], tiny: Path) -> None:
    from tell.cli.main import run

    if words[0] != "tell":
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return
    verb, *rest = words[1:]
    extra: list[str] = []
    if verb in SMALL and "--resume" not in rest:
        extra = [part for setting in SMALL[verb] for part in ("--set", setting)]
        if "-c" not in rest:
            extra += [] if "--model" in rest else ["--model", str(tiny)]
            extra += (
                [] if "--general" in rest else ["--set", "general.source=builtin"]
            )  # a tiny model would write nothing usable
    arguments = [verb, *extra, *rest]
    assert run(arguments) == 0, f"{block}: tell {shlex.join(arguments)}"
