"""Workers that fail say why."""

from __future__ import annotations

import pytest
from bench.drive import Worker

from tell.errors import TellError


def test_an_engine_that_raises_is_reported_with_its_log(tmp_path):
    spec = {"model": str(tmp_path / "nothing"), "dtype": "float32", "device": "cpu", "ceiling_seconds": 0.1}
    worker = Worker("ceiling", "ceiling", spec, tmp_path)
    with pytest.raises(TellError, match="ceiling") as caught:
        worker.ask(do="turn")
    worker.close()
    assert str(worker.log) in str(caught.value) and "Traceback" in worker.log.read_text()


def test_an_engine_that_is_killed_is_reported(tmp_path):
    worker = Worker("ceiling", "ceiling", {"model": "x", "dtype": "float32", "device": "cpu"}, tmp_path)
    worker.process.kill()
    with pytest.raises(TellError, match="killed"):
        worker.ask(do="turn")
    worker.close()
