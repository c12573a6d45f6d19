"""Every setting of a training run: nested tables, read from TOML and `--set a.b=v`. The defaults are the paper's.

Numbers that the paper gives (section 4.1(c)) are the defaults here; docs/method.md lists those it does not give.
"""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrecal.errors import UsageError
from genrecal.objectives import OBJECTIVES, objective_named
from genrecal.objectives.base import Tier
from genrecal.objectives.settings import LossConfig, RecalibratorConfig

# What number formats are called: in --dtype and in precision, by any of these names.
NUMBER_FORMATS = {
    "auto": "auto", "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
}  # fmt: skip
# What other trainers call our settings.
OTHER_NAMES = {
    "learning_rate": "stage1.lr", "num_train_epochs": "stage1.epochs", "per_device_train_batch_size": "stage1.batch_size",
    "gradient_accumulation_steps": "stage1.accumulation", "save_steps": "stage1.checkpoint_every",
    "save_total_limit": "keep_checkpoints", "logging_steps": "log_every", "eval_steps": "evaluate.every",
    "dtype": "precision", "torch_dtype": "precision", "bf16": "precision", "mixed_precision": "precision",
    "attn_implementation": "attention", "dataloader_num_workers": "data.workers", "num_workers": "data.workers",
    "max_length": "max_tokens", "max_seq_length": "max_tokens", "lora_r": "lora.rank", "report_to": "wandb",
    "deepspeed": "engine",
}  # fmt: skip
RECIPES = Path(__file__).parents[1] / "recipes"
ENGINES = ("auto", "none", "ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage.

    Args:
        epochs: passes over the cache; may be a fraction.
        max_steps: optimizer steps at most; 0 for no limit.
        lr, lr_end: learning rate, falling linearly from the first step to the last.
        batch_size: samples a device takes in a micro-step.
        accumulation: micro-steps of one optimizer step.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        checkpoint_every: optimizer steps between checkpoints; 0 for none but the stage's result.
        include_categories: the stage sees samples of these categories alone; empty for all.
        exclude_categories: samples of these categories are left out of the stage.
        drop_unlikely: share of each cache's samples that is left out, those whose answers its teacher finds least likely.
    """

    epochs: float = 1.0
    max_steps: int = 0
    lr: float = 1e-4
    lr_end: float = 1e-5
    batch_size: int = 4
    accumulation: int = 16
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpoint_every: int = 500
    include_categories: tuple[str, ...] = ()
    exclude_categories: tuple[str, ...] = ()
    drop_unlikely: float = 0.0

    def __post_init__(self) -> None:
        if not self.drop_unlikely < 1:
            raise UsageError(f"drop_unlikely {self.drop_unlikely}: expected a share from 0 up to below 1")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA on the student's language model in stage 2; `rank` 0 trains the decoder layers and final norm themselves."""

    rank: int = 64
    alpha: float = 64.0
    dropout: float = 0.05


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How the student's conversations are rendered beside what its own files say.

    Args:
        template_args: variables of its chat template, such as `enable_thinking`. Those of the cache are taken too, where the
            student's template has them and this setting does not set them.
        allowed_tokens: added tokens of its tokenizer that texts may hold, besides those that the cache allows.
    """

    template_args: dict[str, Any] = field(default_factory=dict, hash=False)
    allowed_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How samples are read.

    Args:
        workers: processes that read and render; 0 does it in the training process.
        window: shards among which samples are shuffled.
        on_damage: "fail" stops at a sample whose bytes in the cache are damaged, and names it; "skip" leaves it out,
            names it in the metrics and counts it.
        weights: with several caches, how often an epoch takes each one's samples, in the order of `--cache`: 0.5 takes half
            of them, and the next epoch the other half; 2 takes each twice. Empty for once each.
        max_skip: share of a stage's samples that may be left out before the stage stops: those that the student cannot
            take (too long, or with a text that holds one of its special tokens), and damaged ones.
    """

    workers: int = 2
    window: int = 16
    on_damage: str = "fail"
    weights: tuple[float, ...] = ()
    max_skip: float = 0.01

    def __post_init__(self) -> None:
        if self.on_damage not in ("fail", "skip"):
            raise UsageError(f"data.on_damage {self.on_damage!r}: expected fail or skip")
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise UsageError(f"data.weights {list(self.weights)}: expected numbers above 0")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation of the student while it is trained.

    Args:
        data: data files, as for `genrecal evaluate`; none for no evaluation. image_root: where relative image paths start.
        fields, roles: other names of their fields and roles, as `--field` and `--role` take them.
        every: share of a stage between evaluations (paper, Figure 10: 20 %).
        limit: records that are asked, the first ones; 0 for all.
        metric: auto, exact, number, relaxed, anls, prose, vqa or choice.
        batch_size: prompts at a time; each turn of a conversation is one.
        max_new_tokens: longest answer; 0 for the student's generation config's.
        shown: answers that TensorBoard and Weights & Biases show; all are in the run's folder.
    """

    data: tuple[str, ...] = ()
    image_root: str = ""
    fields: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    every: float = 0.2
    limit: int = 0
    metric: str = "auto"
    batch_size: int = 8
    max_new_tokens: int = 0
    shown: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.every <= 1:
            raise UsageError(f"evaluate.every {self.every}: expected a share of a stage, over 0 and up to 1")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured for the run's report at the start and the end of stage 1 and the end of stage 2, in place.

    Args:
        samples: of the cache, on which the student's and the teacher's own cross-entropies are measured; ten samples
            with question states are compared besides. 0 measures nothing.
    """

    samples: int = 64


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run.

    Args:
        seed: of the order, the Recalibrator's first weights and dropout.
        objective: one of `genrecal.objectives.OBJECTIVES`, or `module:Class` for one of your own.
        precision: "bfloat16" (or bf16) computes in bfloat16 with float32 trained weights; "float32" (or fp32); "auto" is
            bfloat16 on CUDA, else float32.
        device: "auto", "cpu", "cuda"; under a launcher, each process takes the CUDA device of its local rank.
        engine: "none", one process; "ddp", torch's DistributedDataParallel; "zero1", "zero2", "zero3", DeepSpeed's; "auto"
            is ddp where a launcher started several processes, and none otherwise.
        offload: ZeRO keeps optimizer state (zero3: frozen and trained weights too) in the CPU's memory.
        attention: of the student and the Recalibrator; "auto" is sdpa, whose own flash kernels it can use since
            no mask is passed; "flash_attention_2" where that package is installed; any other of transformers' names.
        gradient_checkpointing: compute activations of the student's and Recalibrator's blocks again in the backward pass.
        max_tokens: longest conversation the student is given, in its tokens; 0 for no limit.
        log_every: optimizer steps between lines of metrics.
        keep_checkpoints: newest checkpoints of a stage that are kept.
        wandb: the Weights & Biases project that metrics go to besides TensorBoard; empty for none.
    """

    seed: int = 0
    objective: str = "genrecal"
    precision: str = "auto"
    device: str = "auto"
    engine: str = "auto"
    offload: bool = False
    attention: str = "auto"
    gradient_checkpointing: bool = True
    max_tokens: int = 0
    log_every: int = 1
    keep_checkpoints: int = 2
    wandb: str = ""
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(default_factory=lambda: StageConfig(batch_size=2))
    stage3: StageConfig = field(default_factory=StageConfig)
    recalibrator: RecalibratorConfig = field(default_factory=RecalibratorConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        objective_named(self.objective).check_settings(self.objective, self.loss)
        object.__setattr__(self, "precision", number_format(self.precision, "precision", without=("float16",)))
        choices = {"engine": ENGINES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.offload and not self.engine.startswith("zero"):
            raise UsageError(f"offload is for engine zero1, zero2 and zero3; engine is {self.engine}")

    def stage(self, number: int) -> StageConfig:
        return (self.stage1, self.stage2, self.stage3)[number - 1]


def objectives_by_store() -> dict[str, list[str]]:
    """For each `genrecal cache --store`, the objectives whose every stage it is enough for, but not the one before it."""
    found: dict[str, list[str]] = {"targets": [], "states": [], "questions": []}
    for name, objective in OBJECTIVES.items():
        config = TrainConfig(objective=name)
        tier = max(objective(stage, config).tier for stage in objective.stages)
        found["targets" if tier < Tier.STATES else tier.name.lower()].append(name)
    return found


def load_config(file: Path | None = None, settings: Sequence[str] = ()) -> TrainConfig:
    """A TOML file's tables, then `a.b=v` settings over them.

    Args:
        file: the TOML file, or the name of one in `genrecal/recipes/`, such as `paper`.
        settings: `a.b=v` each.

    Raises UsageError for a key that does not exist (naming the nearest that does) or a value of the wrong type.
    """
    return config_from(read_settings(file, settings))


def read_settings(file: Path | None = None, settings: Sequence[str] = (), *, option: str = "--set") -> dict[str, Any]:
    """The same as nested tables, their keys not looked at yet. `option` is where the settings come from, for errors."""
    values: dict[str, Any] = {}
    if file is not None:
        recipes = {path.stem: path for path in RECIPES.glob("*.toml")}
        found = file if file.exists() else recipes.get(str(file), file)
        try:
            values = tomllib.loads(found.read_text())
        except FileNotFoundError:
            raise UsageError(f"--config {file}: No such file, nor a recipe: {', '.join(sorted(recipes))}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--config {file}: expected TOML, as in `lr = 2e-4` under `[stage1]`: {error}; run.json and config.json "
                "cannot be read as settings"
            ) from None
        except OSError as error:
            raise UsageError(f"--config {file}: {error}") from None
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"{option} {setting!r}: expected a.b=value")
        *tables, name = key.strip().split(".")
        place = values
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise UsageError(f"{option} {setting!r}: {table} is no table")
        place[name] = _parse_value(text.strip())
    return values


def config_from(values: dict[str, Any]) -> TrainConfig:
    """Nested tables -> the configuration, defaults for what is not set. Raises UsageError as `load_config` does."""
    return _build(TrainConfig(), values, "")


def _parse_value(text: str) -> Any:
    """As TOML reads it; what TOML cannot read is a string (so `--set engine=ddp` needs no quotes)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(default: Any, values: dict[str, Any], prefix: str) -> Any:
    fields = {item.name: item for item in dataclasses.fields(default)}
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise UsageError(f"unknown setting {prefix}{name}; {_nearest(prefix, name)}")
        old = getattr(default, name)
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise UsageError(f"setting {prefix}{name}: expected a table, got {value!r}")
            changed[name] = _build(old, value, f"{prefix}{name}.")
        else:
            changed[name] = _converted(old, value, f"{prefix}{name}", kind=fields[name].type)
    return dataclasses.replace(default, **changed)


def _nearest(prefix: str, name: str) -> str:
    """Which settings a name that is none may mean."""
    keys = _all_keys(TrainConfig())
    known = OTHER_NAMES.get(name, "")
    if known.startswith("stage1."):
        own = prefix.rstrip(".") if re.fullmatch(r"stage\d\.", prefix) else ""
        found = [known.replace("stage1", stage) for stage in ([own] if own else ["stage1", "stage2", "stage3"])]
    elif known:
        found = [known]
    else:  # like the whole name, or like the end of one
        ends = {key.rpartition(".")[2]: key for key in reversed(keys)}
        found = difflib.get_close_matches(prefix + name, keys, n=1) or [
            ends[end] for end in difflib.get_close_matches(name, ends, n=1)
        ]
    if not found:
        return "docs/settings.md lists all settings"
    return f"the nearest {'one is' if len(found) == 1 else 'ones are'} {', '.join(found)}"


def number_format(name: str, where: str, *, without: Sequence[str] = ()) -> str:
    """A number format as torch calls it, or "auto". Raises UsageError, naming `where`, for one that is not taken there."""
    known = {key: value for key, value in NUMBER_FORMATS.items() if value not in without}
    if name not in known:
        raise UsageError(f"{where} {name!r}: expected one of {', '.join(known)}")
    return known[name]


def _converted(old: Any, value: Any, key: str, *, kind: Any = None) -> Any:
    if isinstance(old, tuple) and not isinstance(value, list):
        value = [value]  # one needs no brackets
    if kind == tuple[float, ...]:
        if isinstance(value, list) and all(type(item) in (int, float) for item in value):
            return tuple(map(float, value))
        raise UsageError(f"setting {key}: expected a list of numbers, got {value!r}")
    if isinstance(old, tuple):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UsageError(f"setting {key}: expected a list of strings, got {value!r}")
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(old):
        raise UsageError(f"setting {key}: expected {type(old).__name__}, got {value!r}")
    if isinstance(old, int | float) and not isinstance(old, bool) and not 0 <= value < float("inf"):
        raise UsageError(f"setting {key}: expected a finite number that is not negative, got {value!r}")
    if key.endswith((".batch_size", ".accumulation", "log_every", "keep_checkpoints", ".window")) and value < 1:
        raise UsageError(f"setting {key}: expected at least 1, got {value!r}")
    return value


def _all_keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        keys += _all_keys(value, f"{prefix}{item.name}.") if dataclasses.is_dataclass(value) else [prefix + item.name]
    return keys
