"""The dry run of training: parameters, memory, steps, reading, time and disk of each stage, before any weight is loaded.

Parameters are counted on the student built on torch's meta device by the code that trains it; activations are those of a
made micro-step (`genrecal.train.activations`); samples, lengths and bytes are the cache's own.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genrecal.errors import ModelError, SampleError, UsageError
from genrecal.progress import human_bytes
from genrecal.shards.mixture import Mixture
from genrecal.train.activations import StepShape, TeacherSide, activation_bytes
from genrecal.train.batches import TURNS, Wanted
from genrecal.train.config import TrainConfig
from genrecal.train.dual_space import DualSpace
from genrecal.train.engine import resolve_engine
from genrecal.train.loop import plan_stage, stages_to_train
from genrecal.train.objectives import check_cache, check_pair
from genrecal.train.recalibrator import Recalibrator
from genrecal.train.stages import (
    add_lora,
    keeps_pictures,
    needs_recalibrator,
    needs_teacher_head,
    select_trainable,
    wanted_by,
)
from genrecal.vlm.loading import load_processor, model_folder, processor_files
from genrecal.vlm.rendering import Renderer
from genrecal.vlm.shape import ModelShape, meta_model, patches_of, shape_of_model

FLOAT32, INT64 = 4, 8
SHOWN_ENGINES = ("none", "ddp", "zero1", "zero2", "zero3")
ZERO_BUCKET = 500_000_000  # gradients that ZeRO reduces at once, as genrecal.train.engine sets it
ZERO_LIVE = 1_000_000_000  # weights that DeepSpeed's ZeRO-3 leaves whole after their use (stage3_max_live_parameters)
BYTES_PROBE = 256  # samples whose members' sizes are looked up
CONTEXT_BYTES = 1_500_000_000  # of a GPU's memory: what the driver's context and fragmentation take


@dataclass(frozen=True, kw_only=True)
class ForecastOptions:
    """What a forecast assumes.

    Args:
        gpus: processes that train together, one a GPU.
        peak_tflops: of a GPU, dense, in the precision that is trained in; utilisation: share of it that is reached.
        gpu_gigabytes: memory of a GPU.
        probe: samples that the student's processor renders, drawn from the cache, besides the longest.
    """

    gpus: int = 1
    peak_tflops: float = 989.0
    utilisation: float = 0.4
    gpu_gigabytes: float = 80.0
    probe: int = 32

    def __post_init__(self) -> None:
        for name in ("gpus", "peak_tflops", "gpu_gigabytes", "probe"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected more than 0")
        if not 0 < self.utilisation <= 1:
            raise UsageError(f"--utilisation {self.utilisation}: expected a share over 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters, and the bytes that the frozen and the trained ones take (trained ones are float32).

    Args:
        trained, frozen: by whose they are: student, LoRA, Recalibrator, teacher's head.
        head_bytes: of the teacher's and the student's head.
    """

    trained: dict[str, int]
    frozen: dict[str, int]
    frozen_bytes: int
    head_bytes: int

    @property
    def num_trained(self) -> int:
        return sum(self.trained.values())

    @property
    def num_frozen(self) -> int:
        return sum(self.frozen.values())


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """One stage. Bytes of `memory` are of one process, by engine and part; `read_bytes` and `flops` of one sample.

    Args:
        shape: the micro-step that the activations are of, the longest samples of the stage together.
        other_activations: what they would be with gradient checkpointing switched the other way.
        host: bytes of the CPU's memory that a process fills, by what: samples that were read, pictures' embeddings
            (`data.vision_cache_gb`) at most, and what ZeRO offloads.
        hours: of computing at the assumed rate; read_rate: MB/s of all processes together at that rate.
        disk_bytes: checkpoints that are kept and the one being written, and the stage's result.
    """

    stage: int
    samples: int
    steps: int
    global_batch: int
    shape: StepShape
    parameters: Parameters
    memory: dict[str, dict[str, int]]
    other_activations: int
    host: dict[str, int]
    flops: float
    hours: float
    read_bytes: int
    read_rate: float
    disk_bytes: int

    def total(self, engine: str) -> int:
        """Bytes of one process."""
        return sum(self.memory[engine].values())


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A dry run. `engine` is the one that the settings ask for; `fits`: each stage under it, and the disk."""

    student: str
    student_parameters: int
    teacher: str
    engine: str
    gradient_checkpointing: bool
    stages: list[StageForecast]
    rendered: bool  # the student's tokens were counted with its processor; else the teacher's stand for them
    free_bytes: int
    assumed: dict[str, float] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.disk_bytes <= self.free_bytes and all(self.has_room(stage) for stage in self.stages)

    def has_room(self, stage: "StageForecast") -> bool:
        """Whether a GPU holds the stage under the engine asked for, beside the driver's own 1.5 GB."""
        return stage.total(self.engine) + CONTEXT_BYTES <= self.assumed["gpu_gigabytes"] * 1e9

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits, "disk_bytes": self.disk_bytes}


def make_forecast(
    config: TrainConfig,
    student: str,
    cache: Mixture,
    options: ForecastOptions,
    *,
    stages: Sequence[int] = (1, 2, 3),
    out: Path | None = None,
    trust_remote_code: bool = False,
) -> Forecast:
    """Forecast a run. Neither weights of the student nor the head or a state of the cache are read.

    Args:
        student: a folder with config.json, or a hub name. With its processor's files its tokens are counted exactly.
        out: the run's folder, to ask for room there.

    Raises ModelError if the student cannot be built from its config, UsageError as training with these settings would.
    """
    for each in cache.caches:
        check_cache(config.objective, each)
    if processor_files(model_folder(student)):
        check_pair(config.objective, cache.first, student, trust_remote_code=trust_remote_code)
    model = meta_model(student, trust_remote_code=trust_remote_code)
    lengths = _Lengths.measure(cache, student, options.probe, config, trust_remote_code)
    sizes = shape_of_model(model, name=student)
    forecasts = []
    for stage in stages_to_train(config, stages):
        forecasts.append(_stage(stage, config, student, cache, options, lengths, sizes, trust_remote_code))
    return Forecast(
        student=student,
        student_parameters=sizes.parameters,
        teacher=str(cache.first.description["teacher"]["name"]),
        engine=resolve_engine(config.engine, options.gpus),
        gradient_checkpointing=config.gradient_checkpointing,
        stages=forecasts,
        rendered=lengths.rendered,
        free_bytes=_free(out or Path(".")),
        assumed=asdict(options),
    )


def _stage(
    stage: int,
    config: TrainConfig,
    student: str,
    cache: Mixture,
    options: ForecastOptions,
    lengths: "_Lengths",
    sizes: ModelShape,
    trust_remote_code: bool,
) -> StageForecast:
    settings, wanted = config.stage(stage), wanted_by(stage, config)
    plan = plan_stage(settings, cache, global_batch=settings.batch_size * settings.accumulation * options.gpus)
    dtype = _dtype(config)
    model = meta_model(student, trust_remote_code=trust_remote_code)
    parameters = count_parameters(stage, model, config, cache, dtype)
    shape = lengths.longest(plan.indices, settings.batch_size, wanted)
    teacher = TeacherSide(
        hidden_size=cache.hidden_size,
        head_rows=cache.head_rows,
        top_k=int(cache.first.description["top_k"]),
        draws=cache.first.draws,
    )
    activations = {}
    for checkpointing in (True, False):
        changed = replace(config, gradient_checkpointing=checkpointing)
        text = activation_bytes(model.config, stage, changed, teacher, shape, dtype)
        activations[checkpointing] = max(text, lengths.vision_bytes(sizes, settings.batch_size, dtype))
    flops = _flops(stage, config, cache, lengths, plan.indices, sizes, model.config)
    per_second = options.gpus * options.peak_tflops * 1e12 * options.utilisation / flops
    read = _read_bytes(cache, plan.indices, teacher=wanted.teacher, questions=wanted.questions)
    checkpoint = 3 * FLOAT32 * parameters.num_trained  # weights and AdamW's two moments
    kept = 0
    if settings.checkpoint_every:
        kept = min((plan.num_steps - 1) // settings.checkpoint_every, config.keep_checkpoints + 1)
    return StageForecast(
        stage=stage,
        samples=plan.num_samples,
        steps=plan.num_steps,
        global_batch=plan.global_batch,
        shape=shape,
        parameters=parameters,
        memory={
            engine: memory_of(
                engine, parameters, activations[config.gradient_checkpointing], options.gpus, offload=config.offload
            )
            for engine in SHOWN_ENGINES
        },
        other_activations=activations[not config.gradient_checkpointing],
        host=host_memory(
            stage,
            model,
            config,
            parameters,
            options.gpus,
            lengths.sample_bytes(plan.indices, wanted, teacher, dtype),
        ),
        flops=flops,
        hours=plan.num_samples / per_second / 3600,
        read_bytes=read,
        read_rate=per_second * read / 1e6,
        disk_bytes=kept * checkpoint + FLOAT32 * parameters.num_trained,
    )


def _dtype(config: TrainConfig) -> torch.dtype:
    """What "auto" is on the GPUs that the forecast is for, wherever it runs."""
    narrow = config.precision == "bf16" or (config.precision == "auto" and config.device != "cpu")
    return torch.bfloat16 if narrow else torch.float32


# ------------------------------------------------------------------------------------------------- parameters and memory


@dataclass(frozen=True, kw_only=True)
class _Student:
    path: str
    model: Any


def count_parameters(
    stage: int, model: Any, config: TrainConfig, cache: Mixture, dtype: torch.dtype, *, path: str = ""
) -> Parameters:
    """What a stage trains and what it holds frozen.

    Args:
        model: the student on the meta device; LoRA is put into it where the stage has it.
        dtype: that frozen weights take where the stage trains none of the student's own.
    """
    student, head = _Student(path=path, model=model), model.get_output_embeddings()
    uses_lora = stage == 2 and config.lora.rank > 0
    with torch.device("meta"):
        if uses_lora:
            add_lora(student, config.lora)
        names = set(select_trainable(stage, student, config.lora))
        bridges: dict[str, torch.nn.Module] = {}
        if needs_recalibrator(stage, config):
            bridges["Recalibrator"] = Recalibrator.of(config, model.config, cache.hidden_size)
        if config.objective == "dskd":
            bridges["dual space"] = DualSpace(head.weight.shape[1], cache.hidden_size)
    base = FLOAT32 if names and not uses_lora else dtype.itemsize
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = {"LoRA" if uses_lora else "student": sum(sizes[name] for name in names)} if names else {}
    frozen = {"student": sum(size for name, size in sizes.items() if name not in names)}
    frozen_bytes = base * frozen["student"]
    head_bytes = base * head.weight.numel()
    for name, bridge in bridges.items():
        trained[name] = sum(parameter.numel() for parameter in bridge.parameters())
    if needs_teacher_head(stage, config):
        frozen["teacher's head"] = cache.head_rows * cache.hidden_size
        teacher_bytes = frozen["teacher's head"] * getattr(torch, cache.first.description["teacher"]["dtype"]).itemsize
        frozen_bytes += teacher_bytes
        head_bytes += teacher_bytes
    return Parameters(trained=trained, frozen=frozen, frozen_bytes=frozen_bytes, head_bytes=head_bytes)


def memory_of(
    engine: str, parameters: Parameters, activations: int, gpus: int, *, offload: bool = False
) -> dict[str, int]:
    """Bytes of one process by part, under an engine (ZeRO: Rajbhandari et al. 2020, stages 1 to 3).

    AdamW keeps two float32 moments. Under ZeRO it makes one more array of that size for a moment, which stands under
    activations where it is larger than those; else its update is one kernel. ZeRO shares out the optimizer's state over the
    processes (1), the gradients too (2) and the student's and Recalibrator's weights too (3); DeepSpeed adds a copy of its
    share of the trained weights and a bucket for gradients on their way. Under ZeRO-3 both heads are whole, and so are other
    weights that were used lately, up to a thousand million. Offloading keeps the optimizer's state, and under ZeRO-3 the
    shares of the weights, in the CPU's memory.
    """
    trained = FLOAT32 * parameters.num_trained
    zero = int(engine.removeprefix("zero")) if engine.startswith("zero") else 0

    def share(size: int, from_stage: int) -> int:
        return math.ceil(size / gpus) if zero >= from_stage else size

    whole = parameters.head_bytes if zero == 3 else 0
    weights = share(parameters.frozen_bytes + trained - whole, 3)
    live = min(parameters.frozen_bytes + trained - whole, FLOAT32 * ZERO_LIVE) - weights if zero == 3 else 0
    return {
        "weights": whole + (0 if zero == 3 and offload else weights),
        "gradients": share(trained, 2),
        "optimizer": 0 if zero and offload else share((3 if zero else 2) * trained, 1),
        "activations": max(activations, share(trained, 1)) if zero else activations,
        "buffers": (zero > 0) * FLOAT32 * min(parameters.num_trained, ZERO_BUCKET) + max(0, live),
    }


def host_memory(
    stage: int, model: Any, config: TrainConfig, parameters: Parameters, gpus: int, sample_bytes: float
) -> dict[str, int]:
    """Bytes of the CPU's memory that a process fills, by what. What is read ahead, a whole step beside the one that is
    computed, lies in shared memory (/dev/shm).

    Args:
        model: the student, on the meta device. sample_bytes: of a sample that was read, the mean.
    """
    host, settings = {}, config.stage(stage)
    if config.data.workers:
        host["two steps' samples (/dev/shm)"] = int(2 * settings.batch_size * settings.accumulation * sample_bytes)
    if config.data.vision_cache_gb and keeps_pictures(stage, model.base_model):
        host["pictures' embeddings"] = int(config.data.vision_cache_gb * 1e9)
    engine = resolve_engine(config.engine, gpus)
    if config.offload:
        kept, left = (memory_of(engine, parameters, 0, gpus, offload=offload) for offload in (False, True))
        host["offloaded"] = sum(kept[part] - left[part] for part in ("weights", "optimizer"))
    return host


# --------------------------------------------------------------------------------------------------------- the samples


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    """Tokens of each cached sample, int64 `[n]`: the teacher's, and the student's (rendered, or scaled from those).

    patches: of each rendered sample's pictures, tile by tile. picture_bytes: of a rendered sample's inputs, the mean.
    """

    question: np.ndarray
    answer: np.ndarray
    student_question: np.ndarray
    student_answer: np.ndarray
    has_question: np.ndarray
    patches: list[tuple[int, ...]]
    picture_bytes: float
    rendered: bool
    max_tokens: int

    @classmethod
    def measure(
        cls, cache: Mixture, student: str, probe: int, config: TrainConfig, trust_remote_code: bool
    ) -> "_Lengths":
        question, answer = (
            cache.column("question_tokens").astype(np.int64),
            cache.column("answer_tokens").astype(np.int64),
        )
        if not len(question):
            raise UsageError(f"{cache.path}: no sample is left to train on")
        student_question, student_answer = question.copy(), answer.copy()
        folder = model_folder(student)
        patches: list[tuple[int, ...]] = []
        picture_bytes: list[int] = []
        if rendered := bool(processor_files(folder)):
            renderer = Renderer(load_processor(folder, trust_remote_code=trust_remote_code))
            most = max(config.stage(stage).batch_size for stage in (1, 2, 3))
            drawn = np.random.default_rng(0).choice(len(cache), min(probe, len(cache)), replace=False)
            longest = np.argsort(question + answer)[::-1][:most]
            seen: dict[int, tuple[int, int]] = {}
            for place in sorted({int(i) for i in (*drawn, *longest)}):
                try:
                    encoded = renderer.encode(cache[place].sample)
                except SampleError:
                    continue
                seen[place] = sum(encoded.question_lengths), sum(encoded.answer_lengths)
                patches.append(patches_of(encoded.inputs, renderer.processor))
                picture_bytes.append(encoded.num_bytes)
            if not seen:
                raise ModelError(f"{student}: its processor can render none of {len(drawn)} samples of the cache")
            places = np.array(list(seen))
            lengths = np.array(list(seen.values()))
            student_question = np.ceil(question * (lengths[:, 0].sum() / question[places].sum())).astype(np.int64)
            student_answer = np.ceil(answer * (lengths[:, 1].sum() / answer[places].sum())).astype(np.int64)
            student_question[places], student_answer[places] = lengths[:, 0], lengths[:, 1]
        return cls(
            question=question,
            answer=answer,
            student_question=student_question,
            student_answer=student_answer,
            has_question=cache.column("has_question").astype(bool),
            patches=patches,
            picture_bytes=float(np.mean(picture_bytes)) if picture_bytes else 0.0,
            rendered=rendered,
            max_tokens=config.max_tokens,
        )

    def longest(self, indices: np.ndarray, batch_size: int, wanted: Wanted) -> StepShape:
        """The micro-step of a stage's longest samples together, as batches by length have it."""
        own = self.student_question + self.student_answer
        splice, regular = self.student_question + self.answer - 1, self.question + self.answer - 1
        taken = indices[own[indices] <= self.max_tokens] if self.max_tokens else indices
        if not len(taken):
            raise UsageError(f"max_tokens {self.max_tokens}: every sample has more of the student's tokens")
        size = np.maximum(own, np.maximum(splice, regular * self.has_question) if wanted.splice else 0)
        chosen = taken[np.argsort(size[taken])[::-1][:batch_size]]
        asked = chosen[self.has_question[chosen]] if wanted.questions else chosen[:0]
        return StepShape(
            samples=len(chosen),
            student_tokens=int(own[chosen].max()),
            splice=int(splice[chosen].max()) if wanted.splice else 0,
            reg_splice=int(regular[asked].max()) if len(asked) else 0,
            answers=int(self.answer[chosen].sum()) if wanted.teacher else 0,
            most_answers=int(self.answer[chosen].max()) if wanted.teacher else 0,
            questions=int(self.question[asked].sum()),
            student_answers=int(self.student_answer[chosen].sum()),
        )

    def sample_bytes(self, indices: np.ndarray, wanted: Wanted, teacher: TeacherSide, dtype: torch.dtype) -> float:
        """Of a sample as it is handed to the training process: pictures, the teacher's states in the dtype of computing, and
        in float32 where they are a target, its top k; the mean."""
        answers, questions = self.answer[indices], self.question[indices] * self.has_question[indices]
        read = answers * (wanted.teacher and wanted.splice) + questions * wanted.questions
        whole = answers * (wanted.exact or wanted.beside == TURNS)
        states = (read * dtype.itemsize + whole * FLOAT32) * teacher.hidden_size
        return (
            float(np.mean(states + answers * wanted.teacher * teacher.top_k * (INT64 + FLOAT32))) + self.picture_bytes
        )

    def vision_bytes(self, sizes: ModelShape, batch_size: int, dtype: torch.dtype) -> int:
        """What the frozen image encoder holds at once for a micro-step's pictures: the residual stream, the MLP's two
        widths of 4 and the attention's inputs, about 16 values a channel and patch. 0 where nothing was rendered."""
        patches = max((sum(tiles) for tiles in self.patches), default=0)
        return batch_size * patches * 16 * sizes.vision_width * dtype.itemsize


# ------------------------------------------------------------------------------------------------ time, reading, disk


def _flops(
    stage: int,
    config: TrainConfig,
    cache: Mixture,
    lengths: _Lengths,
    indices: np.ndarray,
    sizes: ModelShape,
    student_config: Any,
) -> float:
    """FLOPs of training on one sample, the mean over a stage's.

    A backward pass costs a forward pass for the gradient of what flows in and another for that of the weights; frozen
    weights leave the second out, gradient checkpointing computes the blocks forward once more.
    """
    wanted, again = wanted_by(stage, config), int(config.gradient_checkpointing)
    own = (lengths.student_question + lengths.student_answer)[indices]
    vision = np.mean([sizes.vision_flops(tiles) for tiles in lengths.patches]) if lengths.patches else 0.0
    text = np.mean(sizes.text_flops(own))
    if stage == 1:
        total = vision + text
    else:
        trains_base = stage == 3 or not config.lora.rank
        head = np.mean(sizes.head_flops(lengths.student_answer[indices]))
        # The student's own cross-entropy: a frozen head's gradient is worked out with the logits; one that is trained has
        # its logits computed twice, and two gradients.
        total = vision + text * (2 + trains_base + again) + head * (4 if stage == 3 else 2)
    if wanted.teacher and not needs_recalibrator(stage, config):
        total += np.mean(_direct_flops(config, wanted.exact, cache, lengths, indices, sizes))
    elif wanted.teacher:
        answer, question = lengths.answer[indices], lengths.question[indices] * lengths.has_question[indices]
        bridge = _Bridge.of(config, student_config, cache.hidden_size)
        products = (
            3 if wanted.exact else 2
        )  # of the frozen head: logits, their gradient's way back, the teacher's logits
        head_pass = products * 2.0 * cache.head_rows * cache.hidden_size
        if wanted.splice:
            splice = lengths.student_question[indices] + answer - 1
            total += np.mean(bridge.flops(splice, answer, answer, again) + head_pass * answer)
        if wanted.aligned:  # every row of the teacher's at most
            total += np.mean(bridge.flops(own, answer, 0 * own, again) + head_pass * answer)
        if wanted.questions:
            asked = lengths.has_question[indices]
            total += np.mean(
                asked * (bridge.flops(question + answer - 1, answer, question, again) + head_pass * answer)
            )
    return float(total)


def _direct_flops(
    config: TrainConfig, exact: bool, cache: Mixture, lengths: _Lengths, indices: np.ndarray, sizes: ModelShape
) -> np.ndarray:
    """Of comparing the student itself with the teacher, beside its own cross-entropy: what goes through heads besides."""
    answer, own = lengths.answer[indices].astype(float), lengths.student_answer[indices]
    rows, width = cache.head_rows, cache.hidden_size
    of_teacher = 2.0 * rows * width * answer  # one product of its head
    if config.objective != "dskd":
        return exact * of_teacher
    width_s = sizes.hidden_size
    projections = 3 * 2.0 * (4 * width_s * width * own + width_s * width * (answer + own))
    # The student's head reads the projected teacher twice and gives one gradient; the teacher's gives one.
    return projections + 3 * np.asarray(sizes.head_flops(own)) + (2 + exact) * of_teacher


@dataclass(frozen=True, kw_only=True)
class _Bridge:
    """The Recalibrator's sizes.

    Args:
        everywhere: weights that all places of a splice run through; where_read: those of the last block that only the
            places read do.
        projection: D_t x D_s. attention: a layer's heads' width; layers: blocks that attend from all places.
    """

    everywhere: int
    where_read: int
    projection: int
    attention: int
    layers: int

    @classmethod
    def of(cls, config: TrainConfig, student_config: Any, teacher_size: int) -> "_Bridge":
        with torch.device("meta"):
            recalibrator = Recalibrator.of(config, student_config, teacher_size)
        body, where_read = recalibrator.rec_body, 0
        if recalibrator.trims_last_block:
            last = body.layers[-1]
            where_read = _numel(last) - _numel(last.self_attn.k_proj) - _numel(last.self_attn.v_proj)
        text = student_config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            everywhere=(_numel(body) if body is not None else 0) - where_read,
            where_read=where_read,
            projection=recalibrator.rec_proj_post.weight.numel(),
            attention=text.num_attention_heads * width,
            layers=config.recalibrator.layers - bool(where_read),
        )

    def flops(self, tokens: np.ndarray, read: np.ndarray, projected: np.ndarray, again: int) -> np.ndarray:
        """Forward and backward over splices of so many tokens, of which so many are read and so many came through
        rec_proj_pre. Causal attention is half a square."""
        weights = 2.0 * (self.everywhere * tokens + self.where_read * read)
        looks = self.layers * tokens.astype(float) ** 2 + 2.0 * tokens * read * bool(self.where_read)
        blocks = weights + 2.0 * self.attention * looks
        return blocks * (3 + again) + 3 * 2.0 * self.projection * (read + projected)


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _read_bytes(cache: Mixture, indices: np.ndarray, *, teacher: bool, questions: bool) -> int:
    """Bytes of the members that a stage reads of a sample, the mean over some of them."""
    drawn = np.random.default_rng(1).choice(indices, min(BYTES_PROBE, len(indices)), replace=False)
    total = 0
    for place in sorted(int(i) for i in drawn):
        for member in cache[place].row["members"]:
            name = member["name"].rsplit("/", 1)[-1]
            if name.endswith(".arrow") and not (questions if name.endswith(".question.arrow") else teacher):
                continue
            total += member["size"]
    return total // len(drawn)


def _free(path: Path) -> int:
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


# ----------------------------------------------------------------------------------------------------------- the text


def forecast_text(forecast: Forecast) -> str:
    """A dry run as lines of text."""
    assumed = forecast.assumed
    lines = [
        f"student   {forecast.student}, {forecast.student_parameters / 1e9:.3g} billion parameters; teacher {forecast.teacher}",
        f"machine   {assumed['gpus']:g} GPU(s) of {assumed['gpu_gigabytes']:g} GB, {assumed['utilisation']:.0%} of "
        f"{assumed['peak_tflops']:g} TFLOP/s each; engine {forecast.engine}",
    ]
    if not forecast.rendered:
        lines.append(
            "tokens    the student's folder has no processor: the teacher's tokens stand for its own, pictures cost nothing"
        )
    for stage in forecast.stages:
        lines += _stage_lines(stage, forecast)
    room = "enough" if forecast.disk_bytes <= forecast.free_bytes else "NOT enough"
    lines.append(
        f"disk      {human_bytes(forecast.disk_bytes)} of checkpoints and results, "
        f"{human_bytes(forecast.free_bytes)} free, {room}"
    )
    hours = sum(stage.hours for stage in forecast.stages)
    lines.append(f"time      {hours:.3g} hours, {hours * assumed['gpus']:.3g} GPU-hours")
    return "\n".join(lines)


TOO_FEW = "  NOT enough samples for one step: lower the stage's accumulation or train more epochs; `genrecal train` would stop"


def _stage_lines(stage: StageForecast, forecast: Forecast) -> list[str]:
    shape, parameters = stage.shape, stage.parameters
    other = "without" if forecast.gradient_checkpointing else "with"
    spliced = f", splices of {shape.splice}" if shape.splice else ""
    lines = [
        f"stage {stage.stage}   {stage.samples} samples, {stage.steps} steps of {stage.global_batch}; longest micro-step: "
        f"{shape.samples} samples of {shape.student_tokens} tokens{spliced}",
        *([TOO_FEW] if stage.samples < stage.global_batch else []),
        "  trained     " + (", ".join(f"{name} {count:,}" for name, count in parameters.trained.items())),
        "  frozen      " + (", ".join(f"{name} {count:,}" for name, count in parameters.frozen.items())),
        "  memory      " + "".join(f"{name:>12}" for name in (*stage.memory[forecast.engine], "in all")),
    ]
    for engine, parts in stage.memory.items():
        cells = "".join(f"{human_bytes(size):>12}" for size in (*parts.values(), stage.total(engine)))
        chosen = "  < NOT enough room" if not forecast.has_room(stage) else "  <"
        lines.append(f"    {engine:<10}{cells}{chosen if engine == forecast.engine else ''}")
    return [
        *lines,
        f"  activations {other} gradient checkpointing: {human_bytes(stage.other_activations)}",
        *(
            [
                f"  host        {human_bytes(sum(stage.host.values()))} of the CPU's memory a process: "
                + ", ".join(f"{what} {human_bytes(size)}" for what, size in stage.host.items())
            ]
            if stage.host
            else []
        ),
        f"  compute     {stage.flops:.3g} FLOPs a sample, {stage.hours:.3g} hours",
        f"  reading     {human_bytes(stage.read_bytes)} a sample, {stage.read_rate:.3g} MB/s",
        f"  disk        {human_bytes(stage.disk_bytes)}",
    ]
