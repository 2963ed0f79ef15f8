"""Cache folders of tests: empty but for the C kernels, which take a compiler seconds."""

from __future__ import annotations

from pathlib import Path

from tell.home import tell_home

USUAL = tell_home()  # read while tests are collected, before any test has a home of its own


def home_with_kernels(home: Path) -> Path:
    """Let ``home``, a folder to come, use the kernels of the usual home; they are kept there by what they depend on."""
    (USUAL / "kernels").mkdir(parents=True, exist_ok=True)
    home.mkdir(parents=True, exist_ok=True)
    (home / "kernels").symlink_to(USUAL / "kernels", target_is_directory=True)
    return home
