"""Amounts, orderings, mixture and manifest: the training rows and their order, fixed before a model is loaded."""

from tell.mix.amount import Draw, general_rows
from tell.mix.manifest import read_manifest, write_manifest
from tell.mix.mixture import Mixture, build, build_repeated
from tell.mix.orderings import ORDERINGS, get_ordering, ordering

__all__ = [
    "ORDERINGS",
    "Draw",
    "Mixture",
    "build",
    "build_repeated",
    "general_rows",
    "get_ordering",
    "ordering",
    "read_manifest",
    "write_manifest",
]
