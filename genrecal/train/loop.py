"""The training loop, from top to bottom: for each stage, set up, step through the samples, keep the result."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from genrecal.errors import TrainingError, UsageError
from genrecal.progress import Progress
from genrecal.shards.order import SampleOrder
from genrecal.shards.reader import Cache
from genrecal.train.batches import BatchBuilder, LiveSource, MicroBatch, RecordSource, ShardSource, micro_batch_stream
from genrecal.train.checkpoint import (
    copy_weights,
    find_checkpoints,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    trained_parameters,
)
from genrecal.train.config import StageConfig, TrainConfig
from genrecal.train.logs import RunLog, term_means
from genrecal.train.recalibrator import Recalibrator
from genrecal.train.run import Run
from genrecal.train.stages import Denominators, Distiller, add_lora, select_trainable, wanted_by
from genrecal.vlm.loading import resolve_device


def train(run: Run, *, stages: Sequence[int] = (1, 2, 3), live_teacher: Any = None) -> None:
    """Train the stages asked for, going on from where an earlier call of the same run stopped.

    Args:
        live_teacher: a `genrecal.cache.teacher.LiveTeacher` that makes the records in place of the shards; handed in,
            since the trainer does not know teachers.

    Raises:
        UsageError: settings, student or cache are not those the run's folder was begun with.
        TrainingError: a loss or gradient is not finite, or an earlier stage's result is missing.
    """
    cache = Cache(run.cache)
    if not cache.is_complete:
        raise UsageError(
            f"--cache {run.cache}: {len(cache.shards)} of {cache.num_shards} shards are finished; "
            "run `genrecal cache` again with the same options to finish it"
        )
    if not cache.draws and any(wanted_by(stage, run.config).sampled for stage in stages):
        raise UsageError(
            f"--cache {run.cache}: loss.target sample needs sampled targets, and this cache has none; "
            "make one with `genrecal cache --targets sample:50`, or set loss.target to topk or exact"
        )
    run.begin(cache)
    for stage in sorted(set(stages)):
        if run.config.objective == "sft" and stage == 1:
            continue  # there is no Recalibrator to align
        if not run.stage_result(stage).exists():
            _train_stage(run, cache, stage, LiveSource(cache, live_teacher) if live_teacher else ShardSource(cache))


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Which samples a stage sees, in how many steps."""

    indices: np.ndarray  # of the cache, those the stage uses
    global_batch: int
    num_samples: int  # in all epochs
    num_steps: int


def plan_stage(config: StageConfig, cache: Cache) -> StagePlan:
    """Steps of a stage over a cache. The last step takes what is left, so that no sample is dropped."""
    indices = np.arange(len(cache))
    if config.include_categories or config.exclude_categories:
        categories = cache.arrow_column("category").cast(pa.string())
        known = set(categories.unique().to_pylist())
        for name in ("include_categories", "exclude_categories"):
            chosen = getattr(config, name)
            for category in chosen:
                if category not in known:
                    raise UsageError(
                        f"{name}: no sample has the category {category!r}; the cache has {', '.join(sorted(known))}"
                    )
            if chosen:
                listed = np.asarray(pc.is_in(categories, value_set=pa.array(chosen, pa.string())).to_numpy())
                indices = indices[listed[indices] if name == "include_categories" else ~listed[indices]]
    if not len(indices):
        raise UsageError(f"{cache.path}: no sample is left to train on")
    global_batch = config.batch_size * config.accumulation
    num_samples = round(len(indices) * config.epochs)
    if not num_samples:
        raise UsageError(f"epochs = {config.epochs}: no step to train")
    if config.max_steps:
        num_samples = min(num_samples, config.max_steps * global_batch)
    return StagePlan(
        indices=indices,
        global_batch=global_batch,
        num_samples=num_samples,
        num_steps=-(-num_samples // global_batch),
    )


def _train_stage(run: Run, cache: Cache, stage: int, source: RecordSource) -> None:
    config, settings = run.config, run.config.stage(stage)
    plan = plan_stage(settings, cache)
    if wanted_by(stage, config).questions and not cache.column("has_question").any():
        raise UsageError(
            f"{cache.path}: stage 1's regularisation needs the teacher's question states, and this cache has none; "
            "set loss.reg_weight=0 to train without it"
        )
    device, compute_dtype = resolve_device(config.device), resolve_precision(config)
    torch.manual_seed(config.seed * 4 + stage)
    distiller = build_distiller(run, cache, stage, device, compute_dtype)
    parameters = trained_parameters(distiller)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    remove_unfinished(run.checkpoints)
    checkpoints = find_checkpoints(run.checkpoints, stage)
    first_step = load_checkpoint(checkpoints[-1], parameters, optimizer) if checkpoints else 0
    builder = BatchBuilder(
        _Subset(source, plan.indices),
        distiller.student.renderer,
        wanted_by(stage, config),
        max_tokens=config.max_tokens,
        on_damage=config.data.on_damage,
    )
    stream = micro_batch_stream(
        builder,
        order=SampleOrder(cache.column("shard")[plan.indices], seed=config.seed * 4 + stage, window=config.data.window),
        lengths=(cache.column("question_tokens") + cache.column("answer_tokens"))[plan.indices],
        steps=range(first_step, plan.num_steps),
        global_batch=plan.global_batch,
        last_sample=plan.num_samples,
        batch_size=settings.batch_size,
        workers=config.data.workers if isinstance(source, ShardSource) else 0,  # a live teacher stays in this process
    )
    with (
        RunLog(run.path, stage, first_step=first_step) as log,
        Progress(f"stage {stage}", plan.num_steps, "steps", done=first_step) as progress,
    ):
        skipped, damaged = log.left_out["skipped"], log.left_out["damaged"]
        started = time.perf_counter()
        for step in range(first_step, plan.num_steps):
            loaded = next(stream)
            batches = loaded.batches
            left_out = {name: texts for name in ("skipped", "damaged") if (texts := getattr(loaded, name))}
            skipped += len(loaded.skipped)
            damaged += len(loaded.damaged)
            if skipped + damaged > config.data.max_skip * plan.num_samples:
                raise TrainingError(
                    f"stage {stage}: the student cannot take {skipped} of {plan.num_samples} samples, and {damaged} are "
                    f"damaged, over the limit of {config.data.max_skip:.2%} (data.max_skip): "
                    f"{'; '.join([*loaded.skipped, *loaded.damaged][:3])}"
                )
            if not batches:
                log.write(step, {"samples": 0, **left_out})
                continue
            waited = time.perf_counter() - started
            set_learning_rate(optimizer, settings, step, plan.num_steps)
            values = train_step(distiller, batches, optimizer, parameters, settings, device, compute_dtype)
            seconds = time.perf_counter() - started
            tokens = sum(int(batch.student_inputs["attention_mask"].sum()) for batch in batches)
            values |= {
                "lr": optimizer.param_groups[0]["lr"], "samples": sum(len(batch.keys) for batch in batches),
                "student_tokens": tokens, "seconds": seconds, "data_wait": waited / seconds,
            }  # fmt: skip
            values |= left_out
            if step % config.log_every == 0 or step == plan.num_steps - 1 or left_out:
                log.write(step, values)
            if settings.checkpoint_every and (step + 1) % settings.checkpoint_every == 0 and step + 1 < plan.num_steps:
                save_checkpoint(run.checkpoints, stage, step + 1, parameters, optimizer, config.keep_checkpoints)
            progress.advance(1, f"loss {values['loss']:.3f}, {tokens / seconds:.0f} tokens/s")
            started = time.perf_counter()
    if damaged:
        sys.stderr.write(
            f"genrecal: stage {stage}: {damaged} of {plan.num_samples} samples were skipped since they are damaged; "
            f"metrics.jsonl names them under damaged, and `genrecal verify {cache.path}` the shards\n"
        )
    run.save_result(stage, parameters)


class _Subset:
    """A source that knows a stage's samples by their place among those it uses."""

    def __init__(self, source: RecordSource, indices: np.ndarray):
        self.source, self.indices = source, indices

    def fetch(self, indices: Sequence[int], *, teacher: bool, questions: bool) -> Any:
        return self.source.fetch([int(self.indices[i]) for i in indices], teacher=teacher, questions=questions)


def build_distiller(run: Run, cache: Cache, stage: int, device: torch.device, compute_dtype: torch.dtype) -> Distiller:
    """The student as the stage before left it, what the stage trains, and the frozen head.

    Trained parameters are float32; frozen ones take the compute dtype.
    """
    config = run.config
    trains_base = stage == 3 or (stage == 2 and not config.lora.rank)
    dtype = torch.float32 if trains_base else compute_dtype
    has_teacher = wanted_by(stage, config).teacher
    before = 2 if stage == 3 and (config.objective == "genrecal" or run.stage_result(2).exists()) else 0
    student = run.student_after(before, dtype, device)
    if stage == 2 and config.lora.rank:
        add_lora(student, config.lora)
    for name in select_trainable(stage, student, config.lora):
        parameter = student.model.get_parameter(name)
        parameter.data = parameter.data.float()
    recalibrator, head = None, None
    if has_teacher:
        attention = "sdpa" if config.attention == "auto" else config.attention
        recalibrator = Recalibrator(student.model.config, cache.hidden_size, attention=attention).to(device)
        head = cache.head(str(device))
    student.model.train(stage > 1)
    if config.gradient_checkpointing:
        _checkpoint_activations(student.model if stage > 1 else None, recalibrator)
    distiller = Distiller(
        stage,
        student,
        recalibrator,
        head,
        config.loss,
        question_fraction=float(cache.description["question_fraction"]) or 1.0,
    )
    if stage == 2 and recalibrator is not None:
        parameters = {f"recalibrator.{name}": value for name, value in recalibrator.named_parameters()}
        copy_weights(run.load_result(1), parameters, where=str(run.stage_result(1)))
    return distiller


def _checkpoint_activations(model: Any, recalibrator: Recalibrator | None) -> None:
    import logging

    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that a body without embeddings has none to make differentiable
    try:
        for module in (model, recalibrator.rec_body if recalibrator is not None else None):
            if module is not None:
                # transformers 5.19, which vLLM's pin allows, knows it by its older name.
                (getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable)()
    finally:
        logger.setLevel(level)


def train_step(
    distiller: Distiller,
    batches: Sequence[MicroBatch],
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    settings: StageConfig,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> dict[str, Any]:
    """One optimizer step over the micro-batches of a global batch; the means of its terms.

    Raises TrainingError, before anything is changed, if a loss or the gradient is not finite.
    """
    denominators = Denominators(
        teacher_rows=sum(len(batch.target_ids) for batch in batches if batch.target_ids is not None),
        student_rows=sum(len(batch.sft_ids) for batch in batches),
    )
    outputs = []
    for batch in batches:
        with torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
            output = distiller(batch.to(device, compute_dtype), denominators)
        if not torch.isfinite(output.loss):
            raise TrainingError(
                f"the loss is {output.loss.item()} on samples {', '.join(batch.keys)}; nothing was updated"
            )
        output.loss.backward()
        outputs.append(output)
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm or float("inf"))
    if not torch.isfinite(norm):
        keys = ", ".join(key for batch in batches for key in batch.keys)
        raise TrainingError(f"the gradient's norm is {norm.item()} on samples {keys}; nothing was updated")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss = sum(output.loss.item() for output in outputs)
    return {"loss": loss, "grad_norm": norm.item(), **term_means(outputs)}


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: StageConfig, step: int, num_steps: int) -> None:
    """Linear from `lr` at step 0 towards `lr_end` at step `num_steps` (paper, section 4.1(c))."""
    rate = settings.lr + (settings.lr_end - settings.lr) * step / num_steps
    for group in optimizer.param_groups:
        group["lr"] = rate


def resolve_precision(config: TrainConfig) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if resolve_device(config.device).type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32
