"""Executors: where cells run. One module each, declared with `tell.studies.executors.execution.executor`."""
