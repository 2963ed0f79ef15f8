"""``tell serve``: an OpenAI-compatible server of tuned models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tell.cli.common import argument, option, port_number, takes_options, trust_switch
from tell.errors import TellError, require_package


@dataclass(frozen=True)
class ServeOptions:
    runs: tuple[Path, ...] = argument("RUN", "run folders over one base model", ())
    gguf: Path | None = option("--gguf", "serve this GGUF file through llama.cpp, decoded as RUN says", "FILE")
    host: str = option(
        "--host", "address to listen at; beyond this machine a token is needed", "ADDRESS", default="127.0.0.1"
    )
    port: int = option("--port", "port; 0: any free one", "N", port_number, default=8000)
    token: str | None = option(
        "--token", "API key that requests must carry; beyond this machine a new one is made and printed", "TEXT"
    )
    trust_remote_code: bool = trust_switch()


@takes_options
def serve(options: ServeOptions) -> None:
    """Serve tuned models over an OpenAI-compatible API.

    Models are RUN, RUN/ARM and base; anchor, adapter and decoding are the run's. With --gguf the file is the model.

    Example: tell serve runs/tickets
    """
    for package in ("starlette", "uvicorn"):
        require_package(package, "serve", where="tell serve")
    if not options.runs and options.gguf is None:
        raise TellError("no run is given", where="RUN", remedy="Name the folder of a finished run, or --gguf FILE.")
    if options.gguf is not None and len(options.runs) > 1:
        what = f"{len(options.runs)} runs are given with a GGUF file"
        raise TellError(what, where="RUN", remedy="Name the one that it was exported from, or none.")
    from tell.cli.display import make_display
    from tell.serve.run_server import serve as run

    run(
        options.runs,
        make_display(),
        host=options.host,
        port=options.port,
        token=options.token,
        gguf=options.gguf,
        trust_remote_code=options.trust_remote_code,
    )
