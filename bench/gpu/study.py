"""``python -m bench.gpu --study``: the recipes of ``recipes/gpu`` on one card within a limit, packed small.

Several processes share the card, with CUDA's multi-process service where it is installed. OUT gets ``cells.jsonl.gz``,
written again every half minute: metrics and the scores of every row, without texts; and ``study.json``, a summary.
``--resume`` takes such a file, or its folder, that came back earlier: its cells are not run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tell.models.machine import cores, gpu_memory, likely_device
from tell.progress import Silent
from tell.studies.packed import pack_cells, read_packed
from tell.studies.workers import LAST_STEP

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "recipes" / "gpu"
PACK = "cells.jsonl.gz"
PACK_EVERY = 30.0  # seconds
MOST_WORKERS = 16
QUIT = 10.0  # seconds that the multi-process service has to end
END = LAST_STEP + QUIT + 5.0  # kept for stopping and packing
MPS = Path("/tmp/nvidia-mps/control")  # of a service that runs already
UNKNOWN_GIB = 24.0  # free memory of a card that cannot be read
RETRY = 60.0  # seconds left that are worth a second try of what failed


def add_arguments(p: argparse._ArgumentGroup) -> None:
    """The arguments of ``--study``."""
    p.add_argument("--study", action="store_true", help="run recipes instead of stages")
    p.add_argument("--recipe", type=Path, help="default: recipes/gpu/grid.yaml; with --tiny rehearsal.yaml")
    p.add_argument("--data", type=Path, help="folder of ${data} in the recipe")
    p.add_argument("--model", action="append", help="NAME_OR_FOLDER or NAME_OR_FOLDER=RATE; one after the other")
    p.add_argument("--workers", type=int, help="processes on the card; default: by cores and free memory")
    p.add_argument("--resume", type=Path, help=f"a {PACK} of an earlier run, or its folder")
    p.add_argument("--root", type=Path, default=Path("studies"), help="folder of the cells")


@dataclass
class Pack:
    """The finished cells of some studies as one small file, with those of an earlier one."""

    out: Path
    earlier: Path | None = None
    studies: list[Path] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.monotonic)

    def write(self) -> None:
        """Both files of OUT, each replaced as a whole."""
        self.out.mkdir(parents=True, exist_ok=True)
        cells = dict(read_packed(self.earlier)) if self.earlier else {}
        for study in self.studies:
            if (study / "study.json").exists():
                cells |= {name: without_texts(files) for name, files in read_packed(pack_cells(study))}
        temporary = self.out / f".{PACK}"
        with temporary.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
            for name in sorted(cells):
                file.write(json.dumps({"cell": name, **cells[name]}, separators=(",", ":")).encode() + b"\n")
        temporary.replace(self.out / PACK)
        (self.out / "study.json").write_text(json.dumps(self.facts, indent=1), encoding="utf-8")
        self.at = time.monotonic()


def without_texts(files: dict[str, Any]) -> dict[str, Any]:
    """A packed cell whose rows keep numbers and hashes alone."""
    kept = {}
    for name, content in files.items():
        if name.endswith(".jsonl"):
            content = [{k: v for k, v in row.items() if k == "hash" or _numeric(v)} for row in content]
        kept[name] = content
    return kept


def _numeric(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_numeric, value.values()))
    return value is None or isinstance(value, bool | int | float)


class Progress(Silent):
    """Prints notes, and packs from time to time."""

    def __init__(self, pack: Pack, begin: float) -> None:
        self.pack, self.begin = pack, begin

    def note(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:6.1f}s] {text}", flush=True)
        if time.monotonic() - self.pack.at > PACK_EVERY:
            self.pack.write()


def main(a: argparse.Namespace, begin: float) -> int:
    """Run the studies; 1 where a cell failed or none is done. The deadline counts from ``begin``."""
    import tell

    end = begin + a.deadline - min(END, a.deadline / 4)
    recipe = a.recipe or RECIPES / ("rehearsal.yaml" if a.tiny else "grid.yaml")
    models = [_model(text) for text in a.model or ([str(tiny_model(a.root))] if a.tiny else ["smollm2-135m"])]
    earlier = a.resume / PACK if a.resume and a.resume.is_dir() else a.resume
    pack = Pack(a.out, _copy(earlier, a.root))
    failed = 0
    with multi_process_service(a.device) as shared:
        pack.facts |= {"multi_process_service": shared, "recipe": recipe.stem, "deadline": a.deadline, "models": {}}
        for name, rate, gib in models:
            folder = a.root / f"{recipe.stem}-{Path(name).name}"  # a version has dots, as in Qwen3-0.6B
            pack.studies.append(folder)
            if pack.earlier and not (folder / PACK).exists():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(pack.earlier, folder / PACK)
            workers = a.workers or workers_for(a.device, gib)
            changes = tell.Changes({"model": name, "rate": rate}, _on(a.device))
            for retry in (False, True):
                if retry and (not failed or end - time.monotonic() < RETRY):
                    break
                limits = {"minutes": max(0.0, end - time.monotonic()) / 60, "render": False}
                count = max(1, workers // 2) if retry else workers  # what failed may have lacked memory
                try:
                    done = tell.run_study(
                        recipe, data=a.data, changes=changes, out=folder, root=a.root, display=Progress(pack, begin),
                        execution=tell.Execution(workers=count, retry_failed=retry, **limits),
                    )  # fmt: skip
                finally:  # also where a signal ends it
                    pack.facts["seconds"] = round(time.monotonic() - begin, 1)
                    pack.write()
                failed = len(done.failed())
            pack.facts["models"][name] = {"rate": rate, "workers": workers, **summary(done)}
    pack.write()
    print(json.dumps(pack.facts, indent=1))
    return 0 if all(m["done"] and not m["failed"] for m in pack.facts["models"].values()) else 1


def _on(device: str) -> tuple[str, ...]:
    """Overrides for a device; none where it is chosen anyway, since a key written out makes other cells."""
    return () if likely_device() == device else (f"model.device={device}",)


def summary(folder: Any) -> dict[str, Any]:
    """Cells of a study by state, what was trained in all, and the errors."""
    cells = folder.read()["cells"]
    states = [cell["state"] for cell in cells.values()]
    tokens = 0
    for name, cell in cells.items():
        path = folder.root.parent / "cells" / name / "metrics.json"
        if cell["state"] == "done" and path.exists():
            arms = json.loads(path.read_text(encoding="utf-8"))["train"]["arms"].values()
            tokens += sum(arm.get("tokens", 0) for arm in arms)
    counts = {state: states.count(state) for state in ("done", "failed", "waiting")}
    return {**counts, "tokens_trained": tokens, "errors": sorted(set(folder.failed().values()))[:5]}


def _copy(earlier: Path | None, root: Path) -> Path | None:
    """The earlier pack out of the way of OUT, which may be the same folder."""
    if earlier is None:
        return None
    root.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(earlier, root / f"earlier-{PACK}"))


def _model(text: str) -> tuple[str, str, float]:
    """Name, learning rate and GiB of one process: ``NAME`` or ``NAME=RATE``."""
    from tell.models.find import find_model
    from tell.presets import learning_rate_for

    name, _, rate = text.partition("=")
    parameters = find_model(name).architecture.parameters
    # measured: 3 to 7 GB at 135M; the rest is an estimate of weights, activations and logits
    return name, rate or str(learning_rate_for(parameters, mixed=False)), 4 + 12 * parameters / 1e9


def workers_for(device: str, gib: float) -> int:
    """Processes that fit: by cores, and by the free memory of the card they will see, at so many GiB each."""
    count = min(MOST_WORKERS, cores())
    if device != "cuda":
        return count
    memory = gpu_memory()
    free = UNKNOWN_GIB if memory is None else memory[1] / 2**30
    workers = max(1, min(count, int(free / gib)))
    if memory is None:
        print(f"nvidia-smi does not tell the card's memory: {workers} processes, as with {UNKNOWN_GIB:.0f} GiB free")
    return workers


@contextmanager
def multi_process_service(device: str) -> Iterator[bool]:
    """CUDA's service that lets kernels of several processes run at the same time; whether it runs."""
    control = shutil.which("nvidia-cuda-mps-control")
    if device != "cuda" or control is None:
        yield False
        return
    if MPS.exists():
        yield True
        return
    try:
        started = subprocess.run([control, "-d"], timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"the multi-process service does not start: {error}", file=sys.stderr)
        started = False
    try:
        yield started
    finally:
        if started:
            try:
                subprocess.run([control], input="quit\n", text=True, timeout=QUIT)
            except subprocess.TimeoutExpired:
                print(f"the multi-process service did not end within {QUIT:.0f} s", file=sys.stderr)


def tiny_model(root: Path) -> Path:
    """A random model of two layers with a tokenizer and a chat template, made by the tests' script."""
    folder = root / "tiny-model"
    if not folder.exists():
        script = REPOSITORY / "tests" / "tiny.py"
        subprocess.run([sys.executable, str(script), "llama", str(folder)], check=True, capture_output=True)
    return folder
