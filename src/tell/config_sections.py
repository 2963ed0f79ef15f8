"""The sections of a run's configuration: every key, with its default and meaning. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field, model_validator

from tell.arm import Closed, Constrain, KindName
from tell.config_values import LARGEST, Conflict, Names, OrAuto, Section, SpelledOff
from tell.names import ARMS
from tell.overrides import GENERAL_AMOUNTS
from tell.pass_memory import MICRO_TOKENS
from tell.presets import PRESETS, general_tokens_for

if TYPE_CHECKING:
    ArmName = str
    PresetName = str
else:
    ArmName = Literal[tuple(ARMS)]
    PresetName = Literal[tuple(sorted(PRESETS))]
Device = Literal["auto", "cuda", "xpu", "mps", "cpu"]
BaseFormat = Literal["full", "nf4", "int8"]
DEVICES: tuple[str, ...] = get_args(Device)[1:]  # in the order that auto tries them
DEFAULT_ARMS: tuple[ArmName, ...] = tuple(name for name, arm in ARMS.items() if arm.standard)

TAUGHT_ARMS: tuple[ArmName, ...] = tuple(
    name for name, arm in ARMS.items() if ARMS[arm.adapter or name].teacher == "tell"
)

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TaskConfig(Section):
    """The task's own data."""

    data: str | None = Field(
        None, description="file (json, jsonl[.gz|.zst], csv, tsv, parquet, xlsx[#sheet], xls, ods) or hub name"
    )
    test: str | None = Field(None, description="test file; without it a test part is split off `data`")
    validation: str | None = Field(None, description="validation file; without it a validation part is split off")
    columns: str | None = Field(None, description="names of prompt and answer columns, e.g. prompt=q,answer=a")
    prompt: str | None = Field(
        None, description="template of the prompt, e.g. 'Subject: {Subject}\\n\\n{Body}'; instead of columns"
    )
    answer: Annotated[tuple[str, ...], Names] = Field(
        (), description="answer columns; several make one JSON object in this order; instead of columns"
    )
    unlabelled: str | None = Field(
        None, description="file of prompts without answers for mix.pseudo; without it the model writes such prompts"
    )
    kind: Literal["auto", KindName] = Field("auto", description="auto detects it from the answers")
    json_schema: str | None = Field(None, alias="schema", description="JSON Schema file for kind json")
    scorer: str | None = Field(None, description="package.module:function(answers, references) -> list[float]")
    rows: int | None = Field(None, ge=1, le=LARGEST, description="train on this many task rows, drawn by seed")
    tokens: float | None = Field(None, gt=0, description="train on about this many task tokens (unit: tokens.unit)")
    test_fraction: float = Field(0.3, gt=0, lt=1, description="share split off for testing when no `test` is given")
    validation_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of the rest kept for validation; not below 30 rows"
    )
    test_rows: int | None = Field(
        None, ge=1, le=LARGEST, description="score at most this many test rows, drawn by seed"
    )
    drop_overlap: bool = Field(False, description="remove task and general rows that are near-duplicates of a test row")
    shots: int = Field(
        0,
        ge=0,
        le=LARGEST,
        description="fixed training examples in every test prompt of all arms but icl; eval and chat show them",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> TaskConfig:
        if self.rows is not None and self.tokens is not None:
            raise Conflict("rows and tokens are both set; set one of them", ("rows", "tokens"))
        for name in ("prompt", "answer"):
            if self.columns is not None and getattr(self, name):
                raise Conflict(f"columns and {name} are both set; set one of them", ("columns", name))
        return self


class ModelConfig(Section):
    name: str = Field("smollm2-135m", description="folder, hub name, or smollm2-135m")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="auto: bf16 where the hardware supports it, else fp32; fp16, on NVIDIA GPUs only, where these "
        "have tensor cores but no bf16 (V100, T4)",
    )
    device: Device = Field(
        "auto", description="auto: the first that torch sees of cuda, xpu (Intel), mps (Apple silicon) and cpu"
    )
    base: BaseFormat = Field(
        "full",
        description="format of the frozen base weights: full: not quantised, in dtype (bf16 means full in bf16); nf4 "
        "(QLoRA), int8: quantised by bitsandbytes, on CUDA only (docs/howto/gpu.md)",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @model_validator(mode="before")
    @classmethod
    def _bf16_base(cls, data: object) -> object:
        """``base: bf16`` is ``base: full`` with ``dtype: bf16``."""
        if not isinstance(data, Mapping) or data.get("base") != "bf16":
            return data
        if data.get("dtype", "auto") not in ("auto", "bf16"):
            raise Conflict(f"base is bf16 and dtype {data['dtype']}; set one of them", ("base", "dtype"))
        return {**data, "base": "full", "dtype": "bf16"}

    @property
    def arithmetic(self) -> list[str]:
        """What a model's numbers depend on besides its weights; part of the keys of caches."""
        return [self.dtype, self.device, *([] if self.base == "full" else [self.base])]


class SelfConfig(Section):
    """How the model writes general data: it answers built-in prompts, or invents them (Magpie, arXiv 2406.08464)."""

    prompts: Literal["builtin", "invented"] = Field(
        "builtin", description="prompts to answer: the built-in ones, then invented ones; or invented ones alone"
    )
    max_prompt_tokens: int = Field(
        64, ge=8, le=LARGEST, description="longest instruction, in tokens; longer ones are left out"
    )
    max_answer_tokens: int = Field(
        192, ge=8, le=LARGEST, description="longest answer, in tokens; longer ones are left out"
    )
    temperature: float = Field(1.0, gt=0, description="sampling temperature of the instructions")
    top_p: float = Field(0.95, gt=0, le=1, description="top-p of instructions and answers")
    answer_temperature: float = Field(0.6, gt=0, description="sampling temperature of the answers")
    answer_wish: str = Field(
        "Answer briefly, in one to three sentences.",
        description="added to the prompt when the model answers, not kept in the row; empty for nothing",
    )


class GeneralConfig(Section):
    """Set at most one of `ratio`, `tokens`, `rows`; the default follows the size of the task."""

    source: str = Field(
        "auto",
        description="file, hub name, a set by name (`tell general`), `builtin` (rows answered by SmolLM2-135M), "
        "`self` (the model answers their prompts itself), `none`, or `auto`: builtin",
    )
    columns: str | None = Field(None, description="names of the source's columns, as in task.columns")
    ratio: float | None = Field(None, ge=0, description="general tokens per task token (task rows counted once)")
    tokens: float | None = Field(None, ge=0, description="general tokens (unit: tokens.unit)")
    rows: int | None = Field(None, ge=0, le=LARGEST, description="general rows")
    select: Literal["random", "similar"] = Field(
        "random", description="rows to mix in: drawn by seed, or nearest to the task rows by the model's hidden states"
    )
    recast: float = Field(
        0.0, ge=0, le=1, description="share of the general rows turned by rule into the task's form (kinds json, label)"
    )
    self_: SelfConfig = Field(default_factory=SelfConfig, alias="self")

    def amount(self, task_tokens: int) -> dict[str, float]:
        """The one of ratio, tokens and rows that is set; else tokens that follow the task's, each row counted once."""
        return self._given() or {"tokens": general_tokens_for(task_tokens)}

    @property
    def by_task(self) -> bool:
        """Whether the amount depends on the task's tokens."""
        return self.tokens is None and self.rows is None and self.ratio != 0

    @property
    def is_zero(self) -> bool:
        """Whether the amount is zero."""
        return 0 in self._given().values()

    def _given(self) -> dict[str, float]:
        return {way: value for way in GENERAL_AMOUNTS if (value := getattr(self, way)) is not None}

    @model_validator(mode="after")
    def _one_amount(self) -> GeneralConfig:
        given = list(self._given())
        if len(given) > 1:
            raise Conflict(f"{' and '.join(given)} are set together; set one of ratio, tokens, rows", given)
        return self


class AnchorConfig(Section):
    text: str = Field("auto", description="auto, none, the text itself, or @FILE")
    place: Literal["system", "user"] = Field("user", description="system message, or head of the first user turn")
    candidates: int = Field(4, ge=1, le=64, description="instructions the model writes for `auto`")
    examples: int = Field(4, ge=1, le=LARGEST, description="task examples shown to the model for each candidate")


class MixConfig(Section):
    order: str = Field("shuffle", description="shuffle (the paper) or spread (task rows at near-equal gaps)")
    repeat: int | None = Field(
        None,
        ge=1,
        le=LARGEST,
        description="times each task row occurs in the mix; none: by row count (docs/explanation/method.md)",
    )
    exemplars: int = Field(
        0,
        ge=0,
        le=8,
        description="other task rows in the prompt of a task row at every second repetition, as many as fit; its own "
        "answer alone is trained (arXiv 2110.15943)",
    )
    pseudo: float = Field(
        0.0,
        ge=0,
        le=100,
        description="pseudo-labelled rows per task row, in the arms that have any; 0: as the arm says, 4",
    )


class TrainConfig(Section):
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate; none: by model size, twice as high among general rows "
        "(docs/explanation/method.md)",
    )
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay after the warm-up")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps used for warm-up")
    max_grad_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 turns clipping off")
    batch_size: int = Field(16, ge=1, le=LARGEST, description="examples per optimiser step")
    micro_tokens: Annotated[int | None, OrAuto] = Field(
        None,
        ge=1,
        le=LARGEST,
        description="tokens of a pass; smaller needs less memory; auto (none): by free memory on CUDA, else 3072",
    )
    recompute: Annotated[int | None, OrAuto] = Field(
        None,
        ge=0,
        le=LARGEST,
        description="decoder layers whose forward pass is repeated in the backward pass instead of kept: less memory, "
        "a third more work in those layers, same results; off: 0; auto (none): as few as fit into free memory",
    )
    max_length: int = Field(
        2048, ge=8, le=LARGEST, description="longest row in tokens; longer rows are never cut, see too_long"
    )
    too_long: Literal["drop", "refuse"] = Field("drop", description="drop or refuse a row longer than max_length")
    nothing_to_train: Literal["drop", "refuse"] = Field(
        "refuse", description="drop or refuse a row with an empty answer"
    )
    loss_normalization: Literal["example", "token"] = Field(
        "example", description="example: mean over the rows of each row's mean; token: mean over all trained tokens"
    )
    loss_on: Literal["answer", "all"] = Field("answer", description="all: prompts are trained too (arXiv 2405.14394)")
    task_weight: float = Field(1.0, gt=0, description="weight of a task row's loss relative to a general row's")
    general_target: Literal["auto", "text", "untuned"] = Field(
        "auto",
        description="what general rows are trained on: their tokens (text), or the untuned model's next-token "
        "distributions over them (untuned: self-distillation); auto: untuned over built-in rows of another model",
    )
    average: float = Field(
        0.0,
        ge=0,
        le=1,
        description="save the mean of the weights after each step of this last share of the steps (arXiv 2209.14981); "
        "0: the last ones",
    )
    adapter_scale: float = Field(
        1.0, gt=0, le=100, description="factor of the adapter's update after training (WiSE-FT, arXiv 2109.01903)"
    )
    lora_r: int = Field(8, ge=1, le=8192, description="rank of the adapter")
    lora_alpha: float = Field(32.0, gt=0, description="the adapter is scaled by lora_alpha / lora_r")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the adapter's input")
    lora_targets: str = Field("all-linear", description="all-linear, qkv, or comma-separated module names")
    neftune_alpha: float = Field(0.0, ge=0, description="NEFTune noise on embeddings (arXiv 2310.05914); 0 is off")
    fast: Annotated[Literal["auto", "off"], SpelledOff] = Field(
        "auto", description="auto: packed rows, fused operations and kernels; off: transformers and peft as they are"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="under torchrun: ddp (auto) copies the model to each process, fsdp shards its weights"
    )
    report_to: tuple[TrackerName, ...] = Field(
        ("tensorboard",),
        description="trackers that steps are reported to, of tensorboard, wandb, mlflow, trackio; [] for none",
    )
    checkpoint_every: int = Field(
        50, ge=0, le=LARGEST, description="optimiser steps between checkpoints; 0: only on a signal"
    )

    @property
    def forward_tokens(self) -> int:
        """Tokens of a pass without training, which keeps little."""
        return self.micro_tokens or MICRO_TOKENS


class TokensConfig(Section):
    unit: str = Field("model", description="tokenizer that budgets are counted in: model, or a name or folder")


class GenerateConfig(Section):
    """Decoding: greedy, or the paper's sampling by `preset: paper` or `greedy: false` and a penalty of 1.05."""

    greedy: bool = Field(
        False, description="always take the likeliest token; temperature, top_k and top_p have no effect"
    )
    temperature: float = Field(0.3, gt=0, description="sampling temperature")
    top_k: int = Field(20, ge=0, le=LARGEST, description="sample among this many likeliest tokens; 0: all")
    top_p: float = Field(0.7, gt=0, le=1, description="sample among the likeliest tokens up to this total probability")
    repetition_penalty: float = Field(1.05, gt=0, description="1 turns the penalty off")
    max_new_tokens: int | None = Field(
        None, ge=1, le=LARGEST, description="most tokens of an answer; none: 1.5 times the longest training answer"
    )
    closed: Annotated[Closed, SpelledOff] = Field(
        "off",
        description="how labels, enumerated values, true or false, null and empty lists are answered by the arms that "
        "decide them: off (as other text), likelihood (the likeliest value), readout, or fused (both multiplied)",
    )
    constrain: Annotated[Constrain, SpelledOff] = Field(
        "off",
        description="tokens that answers to test prompts and in chat may have: off (any), schema (kind json) or labels "
        "(kind label); their repetition penalty is then 1 (docs/howto/constrain.md)",
    )
    readout_weight: float = Field(3.0, ge=0, le=100, description="exponent of the readout in `closed: fused`")
    batch_size: int = Field(128, ge=1, le=LARGEST, description="rows decoded at once, fewer where memory is short")
    engine: Literal["auto", "own", "vllm"] = Field("auto", description="auto: vLLM on a GPU where it is installed")


class SearchConfig(Section):
    """Search of learning rate, repetitions, general rows and the decoding of closed fields (`tell.run.search`)."""

    minutes: float | None = Field(
        None,
        gt=0,
        le=LARGEST,
        description="search for at most so many minutes for each arm that is searched; none: no search",
    )
    folds: int = Field(3, ge=2, le=20, description="parts of the task rows, each held out once")


class EvalConfig(Section):
    arms: tuple[ArmName, ...] = Field(
        DEFAULT_ARMS, description="arms to train and score; with task.unlabelled the default has tell-pseudo too"
    )
    icl_examples: int = Field(
        8, ge=1, le=LARGEST, description="training examples in the prompts of icl; as many as fit"
    )
    icl_select: Literal["random", "nearest"] = Field(
        "random",
        description="random: the same ones for every test row; nearest: those whose prompts' hidden states are most "
        "similar to the test row's, by the untuned model",
    )
    bootstrap: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples for 95 % intervals")
    forgetting_rows: int = Field(
        64, ge=0, le=LARGEST, description="general rows on which loss is measured before and after; 0 turns it off"
    )
    forgetting_answers: int = Field(24, ge=0, le=LARGEST, description="general prompts answered before and after")
    bleurt: str | None = Field(
        None, description="also score text by BLEURT-20: its folder, or lucadiliello/BLEURT-20 (extra: bleurt)"
    )
    answer_loss: bool = Field(False, description="also measure the loss of the reference answers under each arm")
    benchmarks: tuple[str, ...] = Field(
        (), description="benchmarks of general ability, before and after: gsm8k, openbookqa, agieval (extra: harness)"
    )
    benchmark_data: str | None = Field(None, description="folder with the benchmarks' files; none: download them")
    benchmark_limit: int | None = Field(
        None, ge=1, le=LARGEST, description="score at most the first N questions of each task"
    )
    benchmark_shots: int | None = Field(
        None, ge=0, le=LARGEST, description="examples before each question; none: the task's own"
    )
    benchmark_chat: bool = Field(False, description="use the model's chat template")
    benchmark_anchor: bool = Field(False, description="put the anchor on the questions, as on task rows")
