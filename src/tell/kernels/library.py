"""C kernels for the element-wise work between matrix products, compiled for this CPU at first use.

Matrix products stay with torch. The operations between them (norms, RoPE, causal softmax, gated activations,
cross-entropy, dropout) are memory-bound: torch runs each as several passes with casts, a kernel as one. The sources in
this folder need a C compiler with OpenMP, and share the thread pool of torch's own OpenMP runtime, so that no second
pool competes for the cores. Where something is missing, callers fall back to equivalent torch operations.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from tell.cpu import cpu_level
from tell.errors import TellError
from tell.files import atomic_path, write_text
from tell.home import tell_home

FOLDER = Path(__file__).parent
FLAGS = (
    *("-O3", "-fPIC", "-shared", "-fopenmp", "-std=c11", "-w"),
    # Sums may be reordered; infinities and NaN keep their meaning.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast"),
)
SWITCH = "TELL_KERNELS"  # "off" uses torch operations only


class Unavailable(Exception):
    """Why there are no kernels on this machine, in a few words."""


@functools.cache  # compiled and loaded once per process
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        return None, f"switched off by ${SWITCH}"
    try:
        return _open(_build()), ""
    except Unavailable as error:
        return None, str(error)


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None; ``reason`` says why."""
    return _load()[0]


def reason() -> str:
    """Why ``library`` is None; empty when it is not."""
    return _load()[1]


def _flags() -> tuple[str, ...]:
    """Compiler flags, for this CPU or the level that ``TELL_CPU`` limits it to."""
    level = cpu_level()
    return (f"-march={level.march if level else 'native'}", *FLAGS)


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise Unavailable("no C compiler found (cc, gcc or clang; or set $CC)")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.processor()


def _build() -> Path:
    """Path of the shared object in the cache, compiled if it is not there yet."""
    if platform.system() != "Linux":
        raise Unavailable("kernels are built on Linux only")
    compiler = _compiler()
    sources = sorted(FOLDER.glob("*.c"))
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.[ch]")):
        digest.update(path.read_bytes())
    version = _run([compiler, "--version"]).stdout
    flags = _flags()
    for text in (*flags, compiler, version, _processor(), platform.machine()):
        digest.update(text.encode())
    folder = tell_home() / "kernels"
    target = folder / f"tell-{digest.hexdigest()[:16]}.so"
    if _whole(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if _whole(target):
                return target
            with atomic_path(target) as out:
                done = _run([compiler, *flags, "-o", str(out), *map(str, sources), "-lm"])
                if done.returncode:
                    first = (done.stderr.strip().splitlines() or ["no message"])[0]
                    raise Unavailable(f"{Path(compiler).name} failed: {first}")
            write_text(_seal(target), _sha256(target))
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written: {error.strerror or error}") from None
    except TellError as error:
        raise Unavailable(str(error)) from None
    except NotImplementedError:  # network file systems
        raise Unavailable(f"{folder} cannot be locked") from None
    return target


def _seal(library: Path) -> Path:
    """The file with the library's expected hash: loading a truncated library would kill the process."""
    return library.with_suffix(".sha256")


def _whole(library: Path) -> bool:
    try:
        return _seal(library).read_text(encoding="utf-8") == _sha256(library)
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:  # found, but not executable
        raise Unavailable(f"{command[0]} cannot be run: {error.strerror or error}") from None


def _runtimes() -> set[str]:
    """Files of the OpenMP runtimes in this process; of several, torch's."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise Unavailable(f"/proc/self/maps cannot be read: {error.strerror or error}") from None
    files = {fields[5] for fields in (line.split(maxsplit=5) for line in lines) if len(fields) > 5}  # paths have spaces
    found = {file for file in files if Path(file).name.startswith(("libgomp", "libiomp5", "libomp"))}
    return {file for file in found if "torch" in file} or found if len(found) > 1 else found


def _open(path: Path) -> ctypes.CDLL:
    """Load the kernels against the OpenMP runtime that torch has loaded; it may lack gcc's entry points."""
    import torch  # noqa: F401  (loads its runtime)

    try:
        for file in sorted(_runtimes()):
            ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"cannot be loaded: {error}") from None


def keep_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MB, instead of returning their pages and faulting them in again."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its upper bound
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
