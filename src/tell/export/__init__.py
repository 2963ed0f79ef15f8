"""Exports of a run. Each target is a module ``to_*.py`` of its own, declared by `tell.export.target.export_target`."""
