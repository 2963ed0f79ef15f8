"""A prepared run on one GPU: ``python -m bench.gpu``."""
