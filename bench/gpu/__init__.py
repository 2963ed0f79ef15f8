"""A prepared run on one GPU: ``python -m bench.gpu``."""

import time

BEGIN = time.monotonic()  # of the process: importing torch takes seconds, which count
