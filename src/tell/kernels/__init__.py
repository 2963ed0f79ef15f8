"""Compiled kernels for training and decoding on a CPU; see ``library``."""

from tell.kernels.library import keep_memory, library, reason

__all__ = ["keep_memory", "library", "reason"]
