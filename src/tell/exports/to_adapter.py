"""``--to adapter``: the LoRA adapter with the run's template, for peft and servers of adapters."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from tell.exports.card import model_card, wheel_notice
from tell.exports.serving_files import adapter_config, base_name, write_decoding, write_licence, write_tokenizer
from tell.exports.target import ExportOptions, Reader, Source, Target, export_target
from tell.files import write_json, write_text


@export_target("adapter")
class Adapter(Target):
    """The adapter in peft's format."""

    about = "LoRA adapter for peft, with the chat template"

    def size(self, source: Source, options: ExportOptions) -> int:
        return source.adapter.weights.stat().st_size + (128 << 20)

    def write(self, source: Source, options: ExportOptions, folder: Path) -> dict:
        if said := wheel_notice(source):
            source.notices.add(said)
        config = adapter_config(source, base=base_name(source))
        shutil.copyfile(source.adapter.weights, folder / source.adapter.weights.name)
        write_json(folder / source.adapter.config.name, config)
        write_tokenizer(source, folder)
        write_decoding(source, folder)
        write_licence(source, folder)
        write_text(folder / "README.md", model_card(source, merged=False, name=source.name))
        return {"rank": config["r"]}

    def reopen(self, source: Source, folder: Path) -> AbstractContextManager[Reader] | str:
        from tell.exports.transformers_reader import open_with_transformers

        return open_with_transformers(source, folder, adapter=True)

    def finish(self, source: Source, options: ExportOptions, folder: Path) -> list[str]:
        return [f'PeftModel.from_pretrained(base, "{folder}")']
