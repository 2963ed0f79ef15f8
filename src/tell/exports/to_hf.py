"""``--to hf``: adapter and base merged into one model folder, as transformers, vLLM and converters load it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from shlex import quote

from tell.exports.card import model_card
from tell.exports.merge import write_merged
from tell.exports.serving_files import write_config, write_decoding, write_licence, write_tokenizer
from tell.exports.target import ExportOptions, Reader, Source, Target, export_target
from tell.files import write_text


@export_target("hf")
class Merged(Target):
    """Merged weights in the base model's number format."""

    about = "merged model folder for transformers and other servers"

    def size(self, source: Source, options: ExportOptions) -> int:
        return source.weights_size() + _SMALL

    def write(self, source: Source, options: ExportOptions, folder: Path) -> dict:
        return write_model(source, folder)

    def reopen(self, source: Source, folder: Path) -> AbstractContextManager[Reader] | str:
        from tell.exports.transformers_reader import open_with_transformers

        return open_with_transformers(source, folder)

    def finish(self, source: Source, options: ExportOptions, folder: Path) -> list[str]:
        place = quote(str(folder))
        return [f"vllm serve {place}", f"transformers serve {place}"]


_SMALL = 128 << 20  # bytes of tokenizer, configuration and card at most


def write_model(source: Source, folder: Path) -> dict:
    """The merged model with all that a server or a converter needs."""
    with source.notices.display.bar("merge the adapter", source.weights_size(), "bytes") as advance:
        layers = write_merged(source.base, source.adapter, folder, advance=advance)
    write_config(source, folder)
    write_tokenizer(source, folder)
    write_decoding(source, folder)
    write_licence(source, folder)
    write_text(folder / "README.md", model_card(source, merged=True, name=source.name))
    return {"merged_layers": layers}
