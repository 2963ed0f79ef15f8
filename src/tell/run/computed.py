"""How a run was computed, by name in words: number format, attention, kernels, passes, decoding, and what fell back.

`findings.json` has them under ``computed`` and the page in one line. To add one, declare its name here; training notes
that begin with a declared name (``CUDA graphs: none (...)``) come here by themselves, all others are notices.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING

from tell.files import write_json

if TYPE_CHECKING:
    from tell.decode.protocol import DecodingEngine
    from tell.folder import RunFolder
    from tell.run.session import Session
    from tell.run.task import Notices

NAMES = (
    "device",
    "number format",
    "base weights",
    "attention",
    "kernels",
    "passes",
    "recomputation",
    "gradients",
    "CUDA graphs",
    "decoding",
    "adapter",
)
_NUMBERS = re.compile(r"[\d.,]+")


def named(text: str) -> tuple[str, str] | None:
    """Name and words of a training note; None where it begins with no declared name."""
    for name in NAMES:
        if text.lower().startswith(name.lower()) and not text[len(name) : len(name) + 1].isalnum():
            return name, text[len(name) :].lstrip(": ")
    return None


def put(computed: MutableMapping[str, str], arm: str, text: str) -> bool:
    """Record a training note of an arm; False where it is none of these.

    Of several arms the first has the name alone; a later one is named where its words differ by more than numbers.
    """
    found = named(text)
    if found is None:
        return False
    name, words = found
    if _NUMBERS.sub("", computed.setdefault(name, words)) != _NUMBERS.sub("", words):
        computed[f"{name} ({arm})"] = words
    return True


def describe(session: Session, notices: Notices) -> dict[str, str]:
    """How a finished run was computed, in the order of `NAMES`."""
    from tell.train.fast.fused import fused_counts, path_notes

    loaded, _ = session.load()
    found = {"device": _device(loaded.device.type), "number format": loaded.why}
    found["base weights"] = session.config.model.base.replace("full", "not quantised")
    counts = fused_counts(loaded.model)
    fused = [f"{count} {part}" for part, count in (counts or {}).items() if count]
    found["kernels"] = f"fused: {', '.join(fused)}" if fused else "transformers' own operations"
    for text in path_notes(loaded.model):
        name, words = named(text) or ("kernels", f"{found['kernels']}; {text}")
        found[name] = words
    found |= notices.computed
    order = {name: i for i, name in enumerate(NAMES)}
    return dict(sorted(found.items(), key=lambda item: order[item[0].partition(" (")[0]]))


def answering(session: Session, *, tuned: bool) -> list[str]:
    """Notes on how answers were decoded since the adapter, or none, was applied, which it still is.

    Empty where no answer was.
    """
    from tell.train.unmerged import is_unmerged

    if not session.engine.how:
        return []
    own = session.engine.name == "own"
    notes = [f"decoding: {_decoding(session.engine)}"]
    if tuned and own:
        notes.append(
            f"adapter: {'beside' if is_unmerged(session.model) else 'merged into'} the weights while answering"
        )
    return notes


def keep_answering(folder: RunFolder, arm: str, notes: Sequence[str]) -> None:
    """Keep notes on how an arm's answers to the test rows were decoded, for a run that is resumed."""
    write_json(folder.decoded(arm), {"computed": list(notes)})


def kept_answering(folder: RunFolder, arm: str) -> list[str]:
    """Notes on how an arm's answers to the test rows were decoded, in whichever session of the run."""
    if not (path := folder.decoded(arm)).exists():
        return ["decoding: not known (answers of an earlier version)"]
    notes = folder.read(path).get("computed")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _decoding(engine: DecodingEngine) -> str:
    name = "vLLM" if engine.name == "vllm" else "TELL's own engine"
    return ", ".join(filter(None, (name, engine.how, engine.fallback)))


def _device(kind: str) -> str:
    from tell.models.machine import cpu_name, gpu

    return {"cuda": lambda: gpu()[0], "cpu": cpu_name}.get(kind, lambda: kind)()
