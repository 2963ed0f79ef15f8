"""Exports of a run. Each target is a module ``to_*.py`` of its own, declared by `tell.exports.target.export_target`."""
