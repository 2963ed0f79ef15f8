"""One module an engine, run by `bench.worker` in a process (and for most peers an environment) of its own.

Those of peers import nothing of ``tell``: it is not installed beside them.
"""
