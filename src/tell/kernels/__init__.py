"""Compiled kernels for training and decoding on a processor; see ``library``."""

from tell.kernels.library import library, reason

__all__ = ["library", "reason"]
