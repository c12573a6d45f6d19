"""The dry run of training: parameters, memory, steps and disk of each stage, before any weight is loaded.

Parameters are counted on the student built on torch's meta device by the code that trains it. Memory is arithmetic; the
teacher's token counts stand for the student's. `genrecal train --profile 2` measures instead.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from genrecal.errors import UsageError
from genrecal.objectives import objective_named
from genrecal.objectives.losses import CHUNK_BYTES
from genrecal.objectives.pairs import check_pair
from genrecal.progress import human_bytes
from genrecal.shards.mixture import Mixture
from genrecal.train.config import TrainConfig
from genrecal.train.engine import resolve_engine
from genrecal.train.loop import plan_stage, stages_to_train, too_few_samples
from genrecal.train.run import student_prompt
from genrecal.train.stages import add_lora, select_trainable
from genrecal.vlm.cached_teacher import prompt_options
from genrecal.vlm.loading import model_folder, processor_files
from genrecal.vlm.shape import meta_model

FLOAT32 = 4
SHOWN_ENGINES = ("none", "ddp", "zero1", "zero2", "zero3")
CONTEXT_BYTES = 1_500_000_000  # GPU memory that the driver's context and fragmentation take


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of trained (float32) and frozen parameters by owner, and the bytes of the frozen ones."""

    trained: dict[str, int]
    frozen: dict[str, int]
    frozen_bytes: int

    @property
    def num_trained(self) -> int:
        return sum(self.trained.values())


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """One stage. `memory`: bytes of one process, by engine and part; `disk_bytes`: checkpoints and the stage's result."""

    stage: int
    samples: int
    steps: int
    global_batch: int
    longest: int  # tokens
    parameters: Parameters
    memory: dict[str, dict[str, int]]
    disk_bytes: int

    def total(self, engine: str) -> int:
        """Bytes of one process."""
        return sum(self.memory[engine].values())


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A dry run. `engine` is the one that the settings ask for; `too_few`: what stops stages with too few samples."""

    student: str
    student_parameters: int
    teacher: str
    engine: str
    gpus: int
    gpu_gigabytes: float
    stages: list[StageForecast]
    free_bytes: int
    too_few: str

    @property
    def fits(self) -> bool:
        """Whether `genrecal train` would start, each stage fits on a GPU, and the disk has room."""
        enough = self.disk_bytes <= self.free_bytes and not self.too_few
        return enough and all(self.has_room(stage) for stage in self.stages)

    def has_room(self, stage: StageForecast) -> bool:
        return stage.total(self.engine) + CONTEXT_BYTES <= self.gpu_gigabytes * 1e9

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits, "disk_bytes": self.disk_bytes}


def make_forecast(
    config: TrainConfig,
    student: str,
    cache: Mixture,
    *,
    gpus: int = 1,
    gpu_gigabytes: float = 80.0,
    stages: Sequence[int] = (1, 2, 3),
    out: Path = Path("."),
    trust_remote_code: bool = False,
) -> Forecast:
    """Forecast a run on that many GPUs. Neither weights of the student nor the head or a state of the cache are read.

    Args:
        student: a folder with config.json, or a hub name.
        out: the run's folder, to look up the free space there.

    Raises ModelError if the student cannot be built from its config, UsageError as training with these settings would.
    """
    for name, value in (("gpus", gpus), ("gpu-gigabytes", gpu_gigabytes)):
        if not value > 0:
            raise UsageError(f"--{name} {value}: expected more than 0")
    numbers = stages_to_train(config, stages)
    for stage in numbers:
        for each in cache.caches:
            objective_named(config.objective)(stage, config).check_cache(config.objective, each)
    prompt = student_prompt(config, prompt_options(*cache.caches))
    if processor_files(model_folder(student)):
        check_pair(config.objective, cache.first, student, prompt=prompt, trust_remote_code=trust_remote_code)
    if not len(cache):
        raise UsageError(f"{cache.path}: no sample is left to train on")
    plans = {}
    for stage in numbers:
        settings = config.stage(stage)
        plans[stage] = plan_stage(settings, cache, global_batch=settings.batch_size * settings.accumulation * gpus)
    # What "auto" is on the GPUs that the forecast is for, wherever it runs.
    narrow = config.precision == "bfloat16" or (config.precision == "auto" and config.device != "cpu")
    dtype = torch.bfloat16 if narrow else torch.float32
    found, num_parameters = [], 0
    for stage, plan in plans.items():
        model = meta_model(student, trust_remote_code=trust_remote_code)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        parameters = count_parameters(stage, model, config, cache, dtype)
        longest = int((cache.column("question_tokens") + cache.column("answer_tokens"))[plan.indices].max())
        longest = min(longest, config.max_tokens or longest)
        activations = activation_bytes(stage, config, model.config, cache, longest, dtype)
        every, trained_bytes = config.stage(stage).checkpoint_every, FLOAT32 * parameters.num_trained
        checkpoints = min((plan.num_steps - 1) // every, config.keep_checkpoints + 1) if every else 0
        found.append(
            StageForecast(
                stage=stage,
                samples=plan.num_samples,
                steps=plan.num_steps,
                global_batch=plan.global_batch,
                longest=longest,
                parameters=parameters,
                memory={
                    name: memory_of(name, parameters, activations, gpus, offload=config.offload)
                    for name in SHOWN_ENGINES
                },
                disk_bytes=(3 * checkpoints + 1) * trained_bytes,  # a checkpoint has AdamW's two moments too
            )
        )
    return Forecast(
        student=student,
        student_parameters=num_parameters,
        teacher=cache.teachers,
        engine=resolve_engine(config.engine, gpus),
        gpus=gpus,
        gpu_gigabytes=gpu_gigabytes,
        stages=found,
        free_bytes=shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free,
        too_few=too_few_samples(plans, config, processes=gpus),
    )


def count_parameters(stage: int, model: Any, config: TrainConfig, cache: Mixture, dtype: torch.dtype) -> Parameters:
    """What a stage trains and what it holds frozen.

    Args:
        model: the student on the meta device; LoRA is put into it where the stage has it.
        dtype: that frozen weights take where the stage trains none of the student's own.
    """
    student = SimpleNamespace(path="", model=model)
    uses_lora = stage == 2 and config.lora.rank > 0
    objective = objective_named(config.objective)(stage, config)
    with torch.device("meta"):
        if uses_lora:
            add_lora(student, config.lora)
        names = set(select_trainable(stage, student, config.lora))
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        trained = {"LoRA" if uses_lora else "student": sum(sizes[name] for name in names)} if names else {}
        for name, module in objective.modules(model.config, cache.hidden_size).items():
            trained[name] = sum(parameter.numel() for parameter in module.parameters())
    frozen = {"student": sum(size for name, size in sizes.items() if name not in names)}
    frozen_bytes = (FLOAT32 if names and not uses_lora else dtype.itemsize) * frozen["student"]
    if objective.needs_head:
        frozen["teacher's head"] = cache.head_rows * cache.hidden_size
        frozen_bytes += frozen["teacher's head"] * getattr(torch, cache.first.description["teacher"]["dtype"]).itemsize
    return Parameters(trained=trained, frozen=frozen, frozen_bytes=frozen_bytes)


def memory_of(
    engine: str, parameters: Parameters, activations: int, gpus: int, *, offload: bool = False
) -> dict[str, int]:
    """Bytes of one process by part, under an engine (ZeRO: Rajbhandari et al. 2020, stages 1 to 3).

    Trained weights, gradients and AdamW's two moments are float32. ZeRO divides the optimizer's state among the processes
    (1), the gradients too (2) and the weights too (3), and keeps another float32 copy of its share of the trained weights.
    Offloading keeps the optimizer's state, and with ZeRO-3 the weights, in the CPU's memory. Buckets and what ZeRO-3
    gathers for a moment are not counted.
    """
    trained = FLOAT32 * parameters.num_trained
    zero = int(engine.removeprefix("zero")) if engine.startswith("zero") else 0

    def share(size: int, from_stage: int) -> int:
        return math.ceil(size / gpus) if zero >= from_stage else size

    return {
        "weights": 0 if zero == 3 and offload else share(parameters.frozen_bytes + trained, 3),
        "gradients": share(trained, 2),
        "optimizer": 0 if zero and offload else share((3 if zero else 2) * trained, 1),
        "activations": activations,
    }


def activation_bytes(
    stage: int,
    config: TrainConfig,
    student_config: Any,
    cache: Mixture,
    longest: int,
    dtype: torch.dtype,
) -> int:
    """What the backward pass of a micro-step of the longest samples needs, roughly; images are not counted.

    A decoder block keeps about 8 D + 4 I values for each token (norms, queries to output, the MLP's four widths). With
    gradient checkpointing a block keeps its input, D values, and one block at a time has the rest. The losses have up to
    three chunks of float32 logits at once.
    """
    text = student_config.get_text_config()
    tokens = config.stage(stage).batch_size * longest
    block = tokens * (8 * text.hidden_size + 4 * text.intermediate_size) * dtype.itemsize
    layers = text.num_hidden_layers if stage > 1 else 0
    layers += objective_named(config.objective)(stage, config).extra_blocks
    kept = layers * block
    if config.gradient_checkpointing:
        kept = layers * tokens * text.hidden_size * dtype.itemsize + block
    rows = max(cache.head_rows, text.vocab_size)
    return int(kept + 3 * (config.loss.chunk_rows * rows * FLOAT32 or CHUNK_BYTES))


def forecast_text(forecast: Forecast) -> str:
    """A dry run as lines of text."""
    lines = [
        f"student   {forecast.student}, {forecast.student_parameters / 1e9:.3g} billion parameters; teacher {forecast.teacher}",
        f"machine   {forecast.gpus} GPU(s) of {forecast.gpu_gigabytes:g} GB; engine {forecast.engine}",
    ]
    for stage in forecast.stages:
        lines.append(
            f"stage {stage.stage}   {stage.samples} samples, {stage.steps} steps of {stage.global_batch}; longest sample: "
            f"{stage.longest} tokens"
        )
        for name, counts in (("trained", stage.parameters.trained), ("frozen", stage.parameters.frozen)):
            lines.append(f"  {name:<10}  " + ", ".join(f"{owner} {count:,}" for owner, count in counts.items()))
        parts = stage.memory[forecast.engine]
        lines.append("  memory      " + "".join(f"{name:>12}" for name in (*parts, "in all")))
        for engine, parts in stage.memory.items():
            cells = "".join(f"{human_bytes(size):>12}" for size in (*parts.values(), stage.total(engine)))
            chosen = "  <" if forecast.has_room(stage) else "  < NOT enough room"
            lines.append(f"    {engine:<10}{cells}{chosen if engine == forecast.engine else ''}")
        lines.append(f"  disk        {human_bytes(stage.disk_bytes)}")
    room = "enough" if forecast.disk_bytes <= forecast.free_bytes else "NOT enough"
    disk = f"{human_bytes(forecast.disk_bytes)} of checkpoints and results, {human_bytes(forecast.free_bytes)} free, {room}"
    return "\n".join(
        [
            *lines,
            f"disk      {disk}",
            *([f"NOT enough samples: `genrecal train` would stop: {forecast.too_few}"] if forecast.too_few else []),
            "measure   activations are a rough formula, images not counted: `genrecal train --profile 2` measures them",
        ]
    )
