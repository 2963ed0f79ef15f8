"""Training by ``trl.SFTTrainer``; its ``nll`` loss is computed in chunks, never holding the full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.engines.gate import Gate, arguments, load
from bench.engines.serve import Build, serve_builds, versions
from bench.worker import Channel


def run(channel: Channel, spec: dict[str, Any]) -> None:
    """Serve builds, see `serve_builds`."""

    def make(build: Build) -> Callable[[], Any]:
        config = SFTConfig(
            **arguments(spec, build),
            max_length=None,
            padding_free=build.setting["padding_free"],
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        return SFTTrainer(
            model=load(spec, build.setting),
            args=config,
            train_dataset=Dataset.from_list(build.examples()),
            processing_class=AutoTokenizer.from_pretrained(spec["model"], local_files_only=True),
            callbacks=[Gate(build.meter)],
        ).train

    serve_builds(channel, spec, make, versions("trl"))
