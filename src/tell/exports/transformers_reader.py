"""An exported folder opened again by plain transformers (and peft), as a stranger would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tell.data.example import Message, tools_of
from tell.errors import TellError, first_line
from tell.exports.target import Source

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel


class TransformersReader:
    """A `tell.exports.target.Reader`; see `open_with_transformers`."""

    def __init__(self, tokenizer: Any, model: PreTrainedModel, config: GenerationConfig, runtime: str) -> None:
        self.tokenizer, self.model, self.config, self.runtime = tokenizer, model, config, runtime

    def prompt_ids(self, turns: Sequence[Message]) -> list[int]:
        found = self.tokenizer.apply_chat_template(
            [turn.to_dict() for turn in turns],
            tools=tools_of(turns),
            add_generation_prompt=True,
            return_dict=True,
        )
        return list(found["input_ids"])

    def answer(self, ids: Sequence[int], source: Source) -> str:
        import torch

        given = torch.tensor([list(ids)], device=self.model.device)
        ends = self.config.eos_token_id
        stops = set(ends) if isinstance(ends, list) else {ends}
        model: Any = self.model
        written = model.generate(input_ids=given, attention_mask=torch.ones_like(given), generation_config=self.config)[
            0, given.shape[1] :
        ].tolist()
        end = next((i for i, token in enumerate(written) if token in stops), len(written))
        return source.chat.answer(written[:end])


@contextmanager
def open_with_transformers(source: Source, folder: Path, *, adapter: bool = False) -> Iterator[TransformersReader]:
    """The folder loaded by Auto classes on the run's device and in its number format, decoding greedily.

    Args:
        adapter: the folder holds an adapter; the base model is loaded from its own place.

    Raises:
        TellError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from tell.models.load import choose_device, choose_dtype, quiet

    chosen = source.opened.config.model
    device = choose_device(chosen.device)
    dtype, _ = choose_dtype(chosen.dtype, device)
    more = {"trust_remote_code": True} if chosen.trust_remote_code else {}  # confirmed when the run was opened
    runtime = f"transformers {version('transformers')}"
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **more)
            place = source.base if adapter else folder
            base = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, local_files_only=True, **more)
            model: torch.nn.Module = base
            if adapter:
                from peft import PeftModel

                model, runtime = PeftModel.from_pretrained(base, str(folder)), f"{runtime}, peft {version('peft')}"
            model = cast("PreTrainedModel", model.to(device).eval())
            config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TellError(
            f"what was exported cannot be loaded by {runtime} ({first_line(error)})",
            where=source.name,
            remedy="Report it to the authors of TELL; --no-check exports without this check.",
        ) from error
    config.max_new_tokens = source.most_tokens  # an adapter for vLLM has none
    config.do_sample, config.temperature, config.top_k, config.top_p = False, None, None, None
    config.pad_token_id = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    with quiet():
        yield TransformersReader(tokenizer, model, config, runtime)
