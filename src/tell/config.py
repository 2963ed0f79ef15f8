"""The configuration of a run, from presets, YAML, flags and overrides. Imports no torch.

Precedence, lowest first: the model's defaults, the preset, the YAML file, flags, ``--set a.b=c``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from tell.config_sections import (
    DEFAULT_ARMS,
    TAUGHT_ARMS,
    AnchorConfig,
    EvalConfig,
    GeneralConfig,
    GenerateConfig,
    MixConfig,
    ModelConfig,
    PresetName,
    SearchConfig,
    TaskConfig,
    TokensConfig,
    TrainConfig,
)
from tell.config_values import LARGEST, Section
from tell.errors import ConfigError, TellError, did_you_mean
from tell.files import parse_yaml, read_text
from tell.overrides import override, parse_overrides
from tell.presets import PRESETS


class Config(Section):
    """Everything one run depends on; saved as ``run.yaml``."""

    preset: PresetName = Field("modern", description="modern: defaults found by measurement; paper: those of the paper")
    task: TaskConfig = Field(default_factory=TaskConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    general: GeneralConfig = Field(default_factory=GeneralConfig)
    anchor: AnchorConfig = Field(default_factory=AnchorConfig)
    mix: MixConfig = Field(default_factory=MixConfig)
    tokens: TokensConfig = Field(default_factory=TokensConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    generate: GenerateConfig = Field(default_factory=GenerateConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    seed: int = Field(42, ge=0, le=10**18, description="seed of every draw: split, subset, order, dropout, decoding")
    out: str | None = Field(None, description="run folder; default runs/<data>-<n>")
    max_minutes: float | None = Field(
        None,
        gt=0,
        le=LARGEST,
        description="shrink the run until it is predicted to fit, in the order of docs/explanation/method.md",
    )

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, data: object) -> object:
        """Keys over the preset they name. The fields' defaults stay, since names of finished cells depend on them."""
        if not isinstance(data, Mapping):
            return data
        preset = data.get("preset", "modern")
        return override(PRESETS[preset], data) if isinstance(preset, str) and preset in PRESETS else data

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(by_alias=True, mode="json"), sort_keys=False, allow_unicode=True)


def load_config(
    path: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
) -> Config:
    """Build a Config from a YAML file, nested flags and ``a.b=c`` overrides.

    Raises:
        TellError: unknown key (with the nearest name), wrong value, unreadable YAML.
    """
    data: dict[str, Any] = {}
    if path is not None:
        data = read_yaml(Path(path))
    data = override(data, flags or {})
    data = override(data, parse_overrides(overrides))
    return make_config(data, where=str(path) if path else "configuration")


def make_config(data: Mapping[str, Any], *, where: str = "configuration") -> Config:
    """Validate nested keys over the preset they name.

    With unlabelled prompts, and no arms named, the arms that are trained on them are among the arms.
    """
    check_keys(data, Config, where)
    if (data.get("task") or {}).get("unlabelled") and "arms" not in (data.get("eval") or {}):
        data = override(data, {"eval": {"arms": [*DEFAULT_ARMS, *TAUGHT_ARMS]}})
    preset = data.get("preset", Config.model_fields["preset"].default)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise TellError(
            f"preset {preset!r} is unknown",
            where=where,
            remedy=f"Use {' or '.join(sorted(PRESETS))}.",
            nearest=did_you_mean(str(preset), PRESETS),
        )
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(first.get("input"), dict) else f" (got {first.get('input')!r})"
        conflict = [f"{key}.{name}" for name in getattr(first.get("ctx", {}).get("error"), "keys", ())]
        raise ConfigError(key, f"{message}{shown}", where=where, conflict=conflict) from error


def read_yaml(path: Path, given_to: str = "-c", *, remedy: str = "Save it as UTF-8 YAML.") -> dict[str, Any]:
    """The keys of a YAML file; ``given_to`` names the flag or verb it was passed to, for errors."""
    try:
        text = read_text(path, remedy=remedy)
    except FileNotFoundError as error:
        raise TellError("no such file", where=str(path), remedy=f"Check the path given to {given_to}.") from error
    data = parse_yaml(text, where=str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise TellError(
            "is not a mapping of keys", where=str(path), remedy="Write keys with their values as KEY: VALUE."
        )
    return data


def check_keys(
    data: Mapping[str, Any],
    model: type[BaseModel],
    where: str,
    prefix: str = "",
    remedy: str = "`tell tune --keys` lists the keys.",
) -> None:
    """Refuse unknown keys and name the nearest known one."""
    names = {field.alias or name: field for name, field in model.model_fields.items()}
    for key, value in data.items():
        if key not in names:
            paths = [f"{prefix}{name}" for name in names]
            raise ConfigError(
                f"{prefix}{key}",
                where=where,
                remedy=remedy,
                nearest=did_you_mean(f"{prefix}{key}", [*paths, *key_paths()]),
            )
        kind = names[key].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if not isinstance(value, Mapping):
                raise TellError(
                    f"{prefix}{key} is {value!r}, not a section",
                    where=where,
                    remedy=f"Write {key}: with keys below it.",
                )
            check_keys(value, kind, where, f"{prefix}{key}.", remedy)


def key_paths(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key: ``general.ratio``."""
    paths: list[str] = []
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            paths += key_paths(kind, f"{path}.")
        else:
            paths.append(path)
    return paths
