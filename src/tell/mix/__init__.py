"""Counts, orders, mixture and manifest: what training will see, decided before a model is loaded."""

from tell.mix.amount import Draw, general_rows
from tell.mix.manifest import read_manifest, write_manifest
from tell.mix.mixture import Mixture, build, build_repeated
from tell.mix.orderings import ORDERS, get_order, register

__all__ = [
    "ORDERS",
    "Draw",
    "Mixture",
    "build",
    "build_repeated",
    "general_rows",
    "get_order",
    "read_manifest",
    "register",
    "write_manifest",
]
