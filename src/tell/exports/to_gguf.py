"""``--to gguf``: the merged model as one file for llama.cpp, Ollama and LM Studio, the run's prompt in its template."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from tell.data.example import Message, tools_of
from tell.errors import TellError
from tell.exports.converter import CONVERTER, OUT_TYPES, converter_folder, quantise, quantiser, refuse_code, to_gguf
from tell.exports.llama_cpp import INSTALL, MOST_CONTEXT, LlamaCpp, Wanted, llama_cpp_ready, llama_cpp_version
from tell.exports.serving_files import FETCH
from tell.exports.target import ExportOptions, Source, Target, export_target
from tell.exports.to_hf import Merged, write_model
from tell.files import read_json, write_json
from tell.verbs.open_run import OpenRun

K_QUANTS = ("q4_k_m",)
"""Made from f16 by ``llama-quantize``."""
# Ollama replaces a template that differs from one it knows by fewer than 100 characters; this keeps it from doing so.
_KEPT = (
    "{#- Written by `tell export`: the run's anchor, fixed examples and switches come before the model's own template, "
    "as in training. #}"
)


@export_target("gguf")
class Gguf(Target):
    about = "one GGUF file for llama.cpp, LM Studio and Ollama (--quant q8_0, f16, bf16 or q4_k_m)"

    def ready(self, source: Source, options: ExportOptions) -> None:
        if options.quant not in (*OUT_TYPES, *K_QUANTS):
            remedy = f"Use one of {', '.join((*OUT_TYPES, *K_QUANTS))}."
            raise TellError(f"unknown quantisation {options.quant!r}", where="--quant", remedy=remedy)
        if options.quant in K_QUANTS:
            quantiser(options.quant)
        refuse_code(source.base)
        Merged().ready(source, options)
        converter_folder(options.llama_cpp, source.notices.add)

    def size(self, source: Source, options: ExportOptions) -> int:
        file = source.weights_size()  # at most 16 bits a weight, as most bases have
        return Merged().size(source, options) + file * (1 + (options.quant in K_QUANTS))

    def write(self, source: Source, options: ExportOptions, folder: Path) -> dict:
        started, file = time.monotonic(), folder / gguf_name(source, options)
        first = options.quant if options.quant in OUT_TYPES else "f16"
        with tempfile.TemporaryDirectory(prefix=".merged-", dir=folder) as place:
            merged = Path(place)
            write_model(source, merged)
            _for_the_converter(source, merged)
            whole = file if first == options.quant else merged / "f16.gguf"
            to_gguf(merged, whole, first, converter_folder(options.llama_cpp))
            if whole != file:
                quantise(whole, file, options.quant)
        converter = str(options.llama_cpp) if options.llama_cpp else CONVERTER.requirement
        seconds = round(time.monotonic() - started, 1)
        return {"file": file.name, "quant": options.quant, "converter": converter, "seconds": seconds}

    def reopen(self, source: Source, folder: Path) -> AbstractContextManager[GgufReader] | str:
        if not llama_cpp_ready():
            return f"xllamacpp (llama.cpp) is not installed: {INSTALL[0].lower()}{INSTALL[1:]}"
        return _opened(source, folder)

    def finish(self, source: Source, options: ExportOptions, folder: Path) -> list[str]:
        file = folder / gguf_name(source, options)
        return [f"llama-server -m {quote(str(file))}"]


@dataclass(frozen=True)
class GgufReader:
    """A GGUF file opened by llama.cpp."""

    model: LlamaCpp
    runtime: str

    def prompt_ids(self, turns: Sequence[Message]) -> list[int]:
        return self.model.prompt_ids([turn.to_dict() for turn in turns], tools=tools_of(turns))

    def answer(self, ids: Sequence[int], source: Source) -> str:
        greedy = source.generate.model_copy(update={"greedy": True})
        said = self.model.answer(ids, greedy, Wanted(source.most_tokens))
        return source.chat.answer(source.chat.encode(said.text))


def gguf_name(source: Source, options: ExportOptions) -> str:
    """The file's name, as llama.cpp's users write it: ``support-q8_0.gguf``."""
    return f"{source.name}-{options.quant}.gguf"


def gguf_template(source: Source) -> str:
    """The template in the file: llama.cpp sets the switch for thoughts itself, and no caller's wish is seen."""
    return _KEPT + "\n" + source.template(force_thinking=True)


def _for_the_converter(source: Source, merged: Path) -> None:
    """Put the template and the added tokens where the converter looks for them: first in tokenizer_config.json.

    It learns there which pieces of a SentencePiece model the text is split at; transformers 5 writes them only into
    tokenizer.json.
    """
    path = merged / "tokenizer_config.json"
    config = read_json(path, remedy=FETCH)
    added = read_json(merged / "tokenizer.json", remedy=FETCH).get("added_tokens") or []
    tokens = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
    write_json(path, {"added_tokens_decoder": tokens, **config, "chat_template": gguf_template(source)})


def context_of(run: OpenRun) -> int:
    """Tokens that a prompt and its answer may have: what the run's own prompts may, within the model's positions."""
    wanted = max(MOST_CONTEXT, 2 * run.config.train.max_length)
    return min(run.files.architecture.max_positions or wanted, wanted)


@contextmanager
def _opened(source: Source, folder: Path) -> Iterator[GgufReader]:
    file = next(folder.glob("*.gguf"))
    model = LlamaCpp(file, context=context_of(source.opened))
    try:
        yield GgufReader(model, f"llama.cpp (xllamacpp {llama_cpp_version()})")
    finally:
        model.close()
