"""Whether this process is one of several that train one run, as torchrun and accelerate start them. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tell.errors import TellError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """Ranks of this process: ``rank`` among all ``world`` (at least 2), ``local`` on its own machine."""

    rank: int
    world: int
    local: int


def launched() -> Launch | None:
    """This process's ranks; None where it trains alone."""
    if not all(os.environ.get(name) for name in _VARIABLES):
        return None
    rank, world, local = (int(os.environ[name]) for name in _VARIABLES[:3])
    return Launch(rank, world, local) if world > 1 else None


def refuse_several(verb: str) -> None:
    """Raise TellError under a launcher: several processes would repeat the work of one."""
    if launched() is not None:
        raise TellError(
            "runs in one process; only `tell tune` trains in several",
            where=f"tell {verb}",
            remedy=f"Start `tell {verb}` without torchrun.",
        )
