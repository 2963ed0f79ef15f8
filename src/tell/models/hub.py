"""The Hugging Face hub with bounded patience: cached files first, then one short question, and no retries.

``huggingface_hub`` 2 asks for a missing file six times and waits 23 seconds in between where there is no network, so
reachability is settled by one metadata request before it is let loose.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tell.errors import TellError, first_line
from tell.files import write_json
from tell.home import tell_home
from tell.models.architecture import WEIGHTS, weight_files
from tell.shown import without_secrets

PATIENCE = 4.0  # seconds for name lookup, connection and answer together
REMEMBER = 600.0  # seconds for which an unreachable hub is not asked again for a model with another source
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
_unreachable: dict[str, str] = {}  # endpoint -> reason, for this process


class HubUnreachable(Exception):
    """The hub did not answer, or HF_HUB_OFFLINE is set; the message says which."""


def cached_snapshot(
    repo: str,
    revision: str | None = None,
    *,
    need_weights: bool = True,
    needed: tuple[str, ...] = ("config.json", "tokenizer.json"),
) -> Path | None:
    """Folder of ``repo`` in the Hugging Face cache, or None where a needed file is missing. Asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[needed[0]]))
    except HFValidationError as error:
        raise TellError(
            f"{repo!r} is neither a folder nor a hub name",
            where="--model",
            remedy="Give a folder with config.json, a name like HuggingFaceTB/SmolLM2-135M-Instruct, or smollm2-135m.",
        ) from error
    except OSError:
        return None
    if not all((folder / name).exists() for name in needed):
        return None
    if need_weights and not weight_files(folder):
        return None
    return folder


def download(
    repo: str,
    revision: str | None = None,
    *,
    need_weights: bool = True,
    code: bool = False,
    patient: bool = True,
    notify: Callable[[str], None] | None = None,
) -> tuple[Path, dict[str, int]]:
    """Fetch configuration, tokenizer and safetensors of ``repo`` into the Hugging Face cache.

    Args:
        need_weights: False fetches the small files only.
        code: also fetch ``*.py``, for models whose code lies with them.
        patient: False believes a failure of the last ten minutes, on disk, without asking again.

    Returns:
        the snapshot folder, and the weights' sizes in bytes by file name as the hub states them.

    Raises:
        HubUnreachable: no answer within `PATIENCE` seconds, or offline mode.
        TellError: the hub answered, but holds no such model, or only pickled weights.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    endpoint = constants.ENDPOINT
    if reason := _unreachable.get(endpoint) or (None if patient else _recent_failure(endpoint)):
        raise HubUnreachable(reason)
    sizes = _ask(repo, revision, endpoint)
    weights = [name for name in sizes if WEIGHTS.fullmatch(name)]
    if not weights and need_weights:
        raise _without_safetensors(repo, list(sizes))
    suffixes = (".json", ".jinja", ".py") if code else (".json", ".jinja")
    names = [name for name in sizes if name.endswith(suffixes)]
    if need_weights:
        names += weights
        if notify:
            notify(f"Fetching {repo} from the Hugging Face hub ({sum(sizes[n] for n in weights) / 1e6:,.0f} MB)")
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=names)
    except OSError as error:
        full = getattr(error, "errno", None) == 28
        reason = error.strerror if full else without_secrets(first_line(error))
        if full:
            raise TellError(
                f"cannot be written ({reason})",
                where=constants.HF_HUB_CACHE,
                remedy="Free disk space, or set HF_HOME to another disk.",
            ) from error
        raise HubUnreachable(f"the download of {repo} broke off: {reason}") from error
    except Exception as error:  # httpx's errors, whose module differs between versions
        raise HubUnreachable(f"the download of {repo} broke off: {without_secrets(first_line(error))}") from error
    return Path(folder), {name: sizes[name] for name in weights}


def _ask(repo: str, revision: str | None, endpoint: str) -> dict[str, int]:
    """Sizes in bytes of the repository's top-level files. Errors as `download`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    answer: dict[str, Any] = {}

    def ask() -> None:
        try:
            answer["info"] = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=PATIENCE - 1)
        except Exception as error:  # handed to the caller's thread
            answer["error"] = error

    # a thread, because a resolver that gets no answer heeds no timeout of the HTTP client
    worker = threading.Thread(target=ask, daemon=True)
    worker.start()
    worker.join(PATIENCE)
    error = answer.get("error")
    if "info" in answer:
        siblings = answer["info"].siblings or []
        return {s.rfilename: s.size or 0 for s in siblings if "/" not in s.rfilename}
    if isinstance(error, GatedRepoError):
        raise TellError(
            f"{repo} is gated on the Hugging Face hub",
            where="--model",
            remedy=f"Accept its terms at {endpoint}/{repo}, then run hf auth login.",
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise TellError(
            f"{repo} has no revision {revision!r}", where="--model", remedy="Name a branch, tag or commit of it."
        ) from error
    if isinstance(error, RepositoryNotFoundError):
        raise TellError(
            f"{repo!r} is neither a folder here nor a model on the Hugging Face hub",
            where="--model",
            remedy="Check the spelling, or run hf auth login if the model is private.",
        ) from error
    reason = without_secrets(first_line(error)) if error else f"no answer from {endpoint} within {PATIENCE:.0f} s"
    _unreachable[endpoint] = reason
    _remember(endpoint, reason)
    raise HubUnreachable(reason) from error


def _without_safetensors(repo: str, names: list[str]) -> TellError:
    if any(name.endswith(_PICKLES) for name in names):
        return pickles_only(repo, [name for name in names if name.endswith(_PICKLES)])
    if "adapter_config.json" in names:
        return TellError(
            f"{repo} is an adapter, not a base model", where="--model", remedy="Give the model it was trained on."
        )
    return TellError(
        f"{repo} holds no model.safetensors",
        where="--model",
        remedy="Choose a repository of transformers weights (a GGUF or MLX repository is none).",
    )


def pickles_only(where: str, names: list[str]) -> TellError:
    """The refusal of a checkpoint that can only be opened by running code in it."""
    return TellError(
        f"holds only pickled weights ({', '.join(sorted(names)[:2])}{', ...' if len(names) > 2 else ''}), "
        "which can run code when opened",
        where=where,
        remedy="Convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) "
        "writes safetensors.",
    )


def _memory() -> Path:
    return tell_home() / "hub-unreachable.json"


def _recent_failure(endpoint: str) -> str | None:
    try:
        record = json.loads(_memory().read_text(encoding="utf-8"))
        age = time.time() - record["time"]
        if record["endpoint"] == endpoint and 0 <= age < REMEMBER:
            return f"{record['reason']}, {age / 60:.0f} min ago"
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no failure on record
    return None


def _remember(endpoint: str, reason: str) -> None:
    # a home that cannot be written costs four seconds next time, no more
    with contextlib.suppress(TellError):
        write_json(_memory(), {"time": time.time(), "endpoint": endpoint, "reason": reason})
