"""Exports: a trained run as files for other servers."""
