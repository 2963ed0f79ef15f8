"""``--to ollama``: a GGUF file with the Modelfile that Ollama makes a model of.

Ollama 0.30 and later start llama-server, which renders the template in the GGUF file: the same engine as that of the
check. There is no TEMPLATE in the Modelfile, since one (in Go's language) would replace it. Earlier versions cannot
read the file's template and would send bare prompts.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from shlex import quote

from tell.exports.target import ExportOptions, Source, export_target
from tell.exports.to_gguf import Gguf, context_of, gguf_name
from tell.files import write_text

NEEDED = (0, 30)
"""The first version of Ollama that renders a GGUF file's own template."""


@export_target("ollama")
class Ollama(Gguf):
    about = "a GGUF file with a Modelfile for Ollama 0.30 or later"

    def ready(self, source: Source, options: ExportOptions) -> None:
        super().ready(source, options)
        found = ollama_version()
        if found and found < NEEDED:
            said, wanted = (".".join(map(str, version)) for version in (found, NEEDED))
            source.notices.add(f"Ollama {said} is installed; only {wanted} and later render the file's own template")

    def write(self, source: Source, options: ExportOptions, folder: Path) -> dict:
        made = super().write(source, options, folder)
        write_text(folder / "Modelfile", modelfile(source, options))
        return made

    def finish(self, source: Source, options: ExportOptions, folder: Path) -> list[str]:
        name = re.sub(r"[^a-z0-9._-]+", "-", source.name.lower()).strip("-._") or "tell"
        return [f"ollama create {name} -f {quote(str(folder / 'Modelfile'))}", f"ollama run {name}"]


def modelfile(source: Source, options: ExportOptions) -> str:
    """The text of the Modelfile: decoding as the run's, no TEMPLATE."""
    rule, context = source.generate, context_of(source.opened)
    parameters: list[tuple[str, object]] = [
        ("temperature", 0 if rule.greedy else rule.temperature),
        ("top_k", rule.top_k),
        ("top_p", rule.top_p),
        ("min_p", 0),
        ("repeat_penalty", rule.repetition_penalty),
        ("repeat_last_n", context),  # prompt and answer, as the run's penalty
        ("num_ctx", context),
        ("num_predict", source.most_tokens),
    ]
    ends = [source.chat.backend.id_to_token(token) for token in source.chat.stop_ids]
    parameters += [("stop", f'"{end}"') for end in ends if end and not re.search(r'["\s]', end)]
    lines = [
        f"# Ollama {'.'.join(map(str, NEEDED))} or later renders the template in the file, which has the anchor.",
        f"FROM ./{gguf_name(source, options)}",
        f"REQUIRES {'.'.join(map(str, NEEDED))}.0",
        *(f"PARAMETER {name} {value}" for name, value in parameters),
    ]
    return "\n".join(lines) + "\n"


def ollama_version() -> tuple[int, ...] | None:
    """Major and minor version of the ``ollama`` on the PATH; None where there is none, or it does not say."""
    program = shutil.which("ollama")
    if program is None:
        return None
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"(\d+)\.(\d+)\.\d+", done.stdout + done.stderr)
    return (int(found[1]), int(found[2])) if found else None
