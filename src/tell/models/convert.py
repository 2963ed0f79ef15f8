"""GGUF to a bf16 safetensors folder: ``python -m tell.models.convert FILE.gguf FOLDER [BASE_NAME]``.

Runs in a separate process, so that finding a model imports no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tell.errors import TellError

# Pre-tokenizers by the name in tokenizer.ggml.pre. transformers builds plain byte-level BPE for every GPT-2-like
# vocabulary; SmolLM2 splits digits first (as in llama.cpp's llama-vocab.cpp and in the tokenizer.json on the hub).
_KNOWN_PRE = ("smollm",)


def check_gguf(file: Path) -> None:
    """Refuse what cannot be converted faithfully.

    Raises:
        TellError: not a GGUF, or a tokenizer that a GGUF does not fully describe.
    """
    with file.open("rb") as start:
        if start.read(4) != b"GGUF":
            raise TellError("is not a GGUF file", where=str(file), remedy="Fetch it again, or use a model folder.")
    from gguf import GGUFReader

    try:
        field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    except (ValueError, IndexError, OSError) as error:
        raise TellError(f"is a broken GGUF file ({error})", where=str(file), remedy="Fetch it again.") from error
    pre = field.contents() if field else None
    if pre not in _KNOWN_PRE:
        raise TellError(
            f"has the tokenizer {pre!r}; a GGUF does not have all of it, and only SmolLM2's is known here",
            where=str(file),
            remedy="Use the model's folder or hub name in transformers format instead.",
        )


def convert(file: Path, folder: Path, base: str | None = None) -> None:
    """Write the model in ``file`` as bf16 safetensors, config, tokenizer and chat template into ``folder``.

    Quantised weights are dequantised, then rounded to bf16. ``base`` is the model's name on the hub.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    check_gguf(file)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    config = model.config
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    # a GGUF keeps this as a 32-bit float: 9.999999747378752e-06
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    # we mask padding, so that padding with the end token does not mask trained end tokens
    pad = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    model.generation_config = GenerationConfig(**ends, pad_token_id=pad)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _tidy(folder, base)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600


def _tidy(folder: Path, base: str | None) -> None:
    """Remove what transformers records about this machine, and name the source model."""
    for name, drop in (
        ("config.json", ("_name_or_path", "_model_name_or_path")),
        ("tokenizer_config.json", ("is_local", "local_files_only")),
    ):
        path = folder / name
        data = json.loads(path.read_text(encoding="utf-8"))
        data = {key: value for key, value in data.items() if key not in drop}
        if base and name == "config.json":
            data["_name_or_path"] = base
        path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 with one line on stderr."""
    try:
        convert(Path(arguments[0]), Path(arguments[1]), *arguments[2:3])
    except TellError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:  # the parent shows the line, and removes incomplete output
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
