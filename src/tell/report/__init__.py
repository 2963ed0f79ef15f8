"""The page of a run and its drawings, from a run folder alone. Imports no torch."""

from tell.report.compare import compare
from tell.report.page import render, write_page

__all__ = ["compare", "render", "write_page"]
