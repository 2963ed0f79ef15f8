"""The Hugging Face hub with a deadline: cached files first, then one metadata request without retries.

Without a network, ``huggingface_hub`` 2 retries a missing file six times over 23 seconds; the request avoids that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tell.errors import TellError, first_line
from tell.files import write_json
from tell.home import tell_home
from tell.models.architecture import WEIGHTS, weight_files
from tell.patience import within
from tell.shown import without_secrets

PATIENCE = 4.0  # seconds for name lookup, connection and answer together
REMEMBER = 600.0  # seconds without a new request to an unreachable hub, for a model with another source
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
_unreachable: dict[str, str] = {}  # cache: reason by endpoint, for this process


class HubUnreachable(Exception):
    """The hub did not answer, or HF_HUB_OFFLINE is set; the message says which."""


def cached_snapshot(
    repo: str,
    revision: str | None = None,
    *,
    need_weights: bool = True,
    needed: tuple[str, ...] = ("config.json", "tokenizer.json"),
) -> Path | None:
    """Folder of ``repo`` in the Hugging Face cache, or None where a needed file is missing. Uses no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[needed[0]]))
    except HFValidationError as error:
        raise TellError(
            f"{repo!r} is neither a folder nor a hub name",
            where="--model",
            remedy="Use a folder with config.json, a name like HuggingFaceTB/SmolLM2-135M-Instruct, or smollm2-135m.",
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
        code: also fetch ``*.py``, for models that come with code.
        patient: False trusts a recorded failure of the last ten minutes without another request.

    Returns:
        the snapshot folder, and the weights' sizes in bytes by file name as the hub states them.

    Raises:
        HubUnreachable: no answer within `PATIENCE` seconds, or offline mode.
        TellError: the hub answered, but has no such model, or only pickled weights.
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
    suffixes = (".json", ".jinja", *((".py",) if code else ()), "tokenizer.model")  # the last for `--to gguf`
    names = [name for name in sizes if name.endswith(suffixes)]
    if need_weights:
        names += weights
        if notify:
            notify(f"Fetching {repo} from the Hugging Face hub ({sum(sizes[n] for n in weights) / 1e6:,.0f} MB)")
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=names)
    except Exception as error:  # also httpx's errors, whose module differs between versions
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise TellError(
                f"cannot be written ({getattr(error, 'strerror', error)})",
                where=constants.HF_HUB_CACHE,
                remedy="Free disk space, or set HF_HOME to another disk.",
            ) from error
        raise HubUnreachable(f"the download of {repo} broke off: {without_secrets(first_line(error))}") from error
    return Path(folder), {name: sizes[name] for name in weights}


def _ask(repo: str, revision: str | None, endpoint: str) -> dict[str, int]:
    """Sizes in bytes of the repository's top-level files. Errors as `download`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        ask = partial(HfApi().model_info, repo, revision=revision, files_metadata=True, timeout=PATIENCE - 1)
        info = within(PATIENCE, ask)
        if info is not None:
            return {s.rfilename: s.size or 0 for s in info.siblings or [] if "/" not in s.rfilename}
        error, reason = None, f"no answer from {endpoint} within {PATIENCE:.0f} s"
    except GatedRepoError as gated:
        raise TellError(
            f"{repo} is gated on the Hugging Face hub",
            where="--model",
            remedy=f"Accept its terms at {endpoint}/{repo}, then run hf auth login.",
        ) from gated
    except RevisionNotFoundError as missing:
        raise TellError(
            f"{repo} has no revision {revision!r}", where="--model", remedy="Name a branch, tag or commit of it."
        ) from missing
    except RepositoryNotFoundError as missing:
        raise TellError(
            f"{repo!r} is neither a folder here nor a model on the Hugging Face hub",
            where="--model",
            remedy="Check the spelling, or run hf auth login if the model is private.",
        ) from missing
    except Exception as failed:  # httpx's errors, whose module differs between versions
        error, reason = failed, without_secrets(first_line(failed))
    _unreachable[endpoint] = reason
    with contextlib.suppress(TellError):  # with an unwritable home the next call waits four seconds again
        write_json(_memory(), {"time": time.time(), "endpoint": endpoint, "reason": reason})
    raise HubUnreachable(reason) from error


def _without_safetensors(repo: str, names: list[str]) -> TellError:
    if any(name.endswith(_PICKLES) for name in names):
        return pickles_only(repo, [name for name in names if name.endswith(_PICKLES)])
    if "adapter_config.json" in names:
        return TellError(
            f"{repo} is an adapter, not a base model", where="--model", remedy="Use the model it was trained on."
        )
    return TellError(
        f"{repo} has no model.safetensors",
        where="--model",
        remedy="Choose a repository of transformers weights (a GGUF or MLX repository is none).",
    )


def pickles_only(where: str, names: list[str]) -> TellError:
    """The error for a checkpoint that can only be opened by running code in it."""
    return TellError(
        f"has only pickled weights ({', '.join(sorted(names)[:2])}{', ...' if len(names) > 2 else ''}), "
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
