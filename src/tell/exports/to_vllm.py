"""``--to vllm``: the adapter with a script that serves it by vLLM over the base model, which others may use too."""

from __future__ import annotations

import shlex
from pathlib import Path

from tell.errors import TellError
from tell.exports.serving_files import base_name, write_decoding
from tell.exports.target import ExportOptions, Source, export_target
from tell.exports.to_adapter import Adapter
from tell.files import write_text

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for


@export_target("vllm")
class Vllm(Adapter):
    """An adapter folder with ``serve.sh``."""

    about = "LoRA adapter with serve.sh for vLLM"

    def write(self, source: Source, options: ExportOptions, folder: Path) -> dict:
        facts = super().write(source, options, folder)
        write_decoding(source, folder, limit=False)  # a limit would hold for the base model's other users too
        script = folder / "serve.sh"
        write_text(script, serve_script(source, facts["rank"]))
        script.chmod(0o755)
        return facts

    def finish(self, source: Source, options: ExportOptions, folder: Path) -> list[str]:
        return [shlex.quote(str(folder / "serve.sh"))]


def serve_script(source: Source, rank: int) -> str:
    """A script that works from wherever the folder is moved to; its arguments go to vLLM.

    Raises:
        TellError: the adapter's rank is beyond what vLLM serves.
    """
    room = next((known for known in RANKS if known >= rank), None)
    if room is None:
        what = f"its rank is {rank}, and vLLM serves at most {RANKS[-1]}"
        raise TellError(what, where=str(source.adapter.config), remedy="Use --to hf.")
    name = shlex.quote(source.name)
    words = [f"exec vllm serve {shlex.quote(base_name(source))}"]
    if source.opened.files.revision:
        words.append(f"--revision {shlex.quote(source.opened.files.revision)}")
    if source.opened.config.model.trust_remote_code:
        words.append("--trust-remote-code")
    words += [
        f"--enable-lora --max-lora-rank {room}",
        f'--lora-modules {name}="$here"',
        '--chat-template "$here/chat_template.jinja"',
        '--generation-config "$here"',
        '"$@"',
    ]
    return (
        "#!/bin/sh\n"
        f"# Serves the model {source.name} with vLLM's OpenAI-compatible API; further arguments go to vLLM.\n"
        'here=$(cd "$(dirname "$0")" && pwd)\n' + " \\\n  ".join(words) + "\n"
    )
