"""`tell anchor`: let the model write, score and choose an anchor, without training."""

from __future__ import annotations

from tell.config import Config
from tell.progress import Display, Silent
from tell.study.prepare import load_task, place_anchor


def write_anchor(config: Config, *, display: Display | None = None) -> dict:
    """Candidates for the anchor, scored, the best first.

    Args:
        config: as for `tell.tune`; ``anchor.text`` is ignored.

    Returns:
        The content of ``anchor.json``: text, place, origin, hash, candidates.

    Raises:
        TellError: bad data or model.
    """
    from tell.anchor.write import write_anchor_candidates
    from tell.generate.engine import Engine
    from tell.models.load import load_model

    display = display or Silent()
    task = load_task(config, display)
    settings = config.model
    loaded = load_model(
        task.files, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
    )
    engine = Engine(loaded.model, device=loaded.device, max_positions=task.files.architecture.max_positions)
    anchor, candidates = write_anchor_candidates(
        config, task.chat, loaded.model, engine, task.train, task.validation, task.kind, display
    )
    return {**place_anchor(task, anchor, display).to_dict(), "candidates": candidates}
