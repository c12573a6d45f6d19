"""The training loop, from top to bottom: for each stage, set up, step through the samples, keep the result."""

import gc
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from genrecal.errors import GenrecalError, StoppedError, UsageError
from genrecal.files import write_whole
from genrecal.folders import FolderLock
from genrecal.objectives import objective_named
from genrecal.objectives.base import Objective, Tier
from genrecal.objectives.pairs import check_pair
from genrecal.objectives.recalibrator import checkpoint_activations
from genrecal.progress import Progress
from genrecal.run_folder import CACHE_FACTS, LOCK_FILE, RUN_FILE
from genrecal.shards.mixture import Mixture
from genrecal.shards.reader import Cache
from genrecal.train.advice import explain_failures, explain_loading, not_finite, too_many_left_out
from genrecal.train.batches import (
    BatchBuilder,
    LiveSource,
    Loaded,
    RecordSource,
    ShardSource,
    StageData,
    image_beside,
    micro_batch_stream,
)
from genrecal.train.checkpoint import (
    Checkpoint,
    copy_weights,
    find_checkpoints,
    read_checkpoint,
    remove_checkpoints,
    remove_unfinished,
    save_checkpoint,
    trained_parameters,
)
from genrecal.train.config import StageConfig, TrainConfig
from genrecal.train.engine import Engine, import_deepspeed, resolve_engine, start_engine
from genrecal.train.export import check_layout
from genrecal.train.logs import RunLog, TermSums, Wandb, cache_facts, read_metrics, term_means, term_sums
from genrecal.train.midway import Midway
from genrecal.train.profiling import Clock, profile_text, profiled_run, scratch
from genrecal.train.ranks import Ranks, StopSignals, check_devices, joined, own_device, world_size
from genrecal.train.run import Run
from genrecal.train.snapshot import take_snapshot
from genrecal.train.stages import Distiller, StepOutput, add_lora, select_trainable
from genrecal.vlm.loading import VLM, resolve_device


def train(run: Run, *, stages: Sequence[int] = (1, 2, 3), live_teacher: Any = None, profile: bool = False) -> None:
    """Train the stages asked for, going on from where an earlier call of the same run stopped.

    Under a launcher every process calls this, and each trains on its share of every global batch.

    Args:
        live_teacher: a `genrecal.cache.teacher.LiveTeacher` that makes the records in place of the shards; handed in,
            since the trainer does not know teachers.
        profile: measure time and memory by part and write them with each step's metrics.

    Raises:
        UsageError: settings, student or cache are not those the run's folder was begun with.
        TrainingError: a loss or gradient is not finite, or an earlier stage's result is missing.
        StoppedError: a signal asked the run to stop.
        OtherRankError: on the ranks that leave it to another to say what is wrong.
    """
    with all_ranks(run.config) as ranks, StopSignals() as signals, ExitStack() as held:
        if ranks.first and (left_out := sorted(set(stages) - set(objective_named(run.config.objective).stages))):
            sys.stderr.write(
                f"genrecal: objective {run.config.objective} has no stage {left_out[0]}, which trains the Recalibrator alone; "
                "it has none\n"
            )
        device = ranks.together(lambda: own_device(run.config.device))
        check_devices(ranks, device)
        if device.index is not None:
            torch.cuda.set_device(device)
        cache = ranks.together(lambda: open_for(run, stages))
        midway = ranks.together(lambda: Midway.of(run.config))
        ranks.together(lambda: _check(run, cache, stages, ranks) if ranks.first else None)
        held.enter_context(
            ranks.together(lambda: FolderLock(run.path / LOCK_FILE, "training in") if ranks.first else nullcontext())
        )
        begun = ranks.gather(ranks.together(lambda: _begin(run, cache, ranks) if ranks.first else {}))[0]
        ranks.wait_for(run.path / RUN_FILE)
        ranks.together(lambda: run.check_files(begun, cache))
        with ranks.together(lambda: _wandb_of(run) if ranks.first else nullcontext()) as wandb:
            for stage in stages_to_train(run.config, stages):
                if received := next((name for name in ranks.gather(signals.received) if name), None):
                    ranks.stop(
                        StoppedError(f"{received}: stopped before stage {stage}; run the same command to resume")
                    )
                if not ranks.gather(run.stage_result(stage).exists())[0]:
                    source = LiveSource(cache, live_teacher) if live_teacher else ShardSource(cache)
                    job = StageJob(
                        run=run,
                        cache=cache,
                        stage=stage,
                        ranks=ranks,
                        device=device,
                        begun=begun,
                        midway=midway,
                        wandb=wandb,
                        clock=Clock(device if profile else None),
                    )
                    with explain_failures(stage, run.config):
                        _train_stage(job, source, signals)
                ranks.wait_for(run.stage_result(stage))
                if ranks.first:
                    remove_checkpoints(run.checkpoints, stage)


def profile(run: Run, steps: int, *, stages: Sequence[int] = (1, 2, 3), live_teacher: Any = None) -> str:
    """Run the first steps of each stage in a folder that is removed again; what they took, as text."""
    short = profiled_run(run, steps)
    first = os.environ.get("RANK", "0") == "0"
    with scratch(short.path, first=first):
        train(short, stages=stages, live_teacher=live_teacher, profile=True)
        return profile_text(read_metrics(short.path)) if first else ""


def stages_to_train(config: TrainConfig, stages: Sequence[int]) -> list[int]:
    """In order; an objective without a Recalibrator has no stage 1."""
    return [stage for stage in sorted(set(stages)) if stage in objective_named(config.objective).stages]


def _wandb_of(run: Run) -> AbstractContextManager[Wandb | None]:
    return Wandb(run.config.wandb, run.path, asdict(run.config)) if run.config.wandb else nullcontext()


def _check(run: Run, cache: Mixture, stages: Sequence[int], ranks: Ranks) -> None:
    check_stages(run, cache, stages, run.check(cache, ranks.size)["global_batch"])
    check_layout(run.student, trust_remote_code=run.trust_remote_code)


def _begin(run: Run, cache: Mixture, ranks: Ranks) -> dict[str, Any]:
    begun = run.begin(cache, ranks.size)
    if not (run.path / CACHE_FACTS).exists():
        write_whole(run.path / CACHE_FACTS, (json.dumps(cache_facts(cache), indent=2) + "\n").encode())
    return begun


def check_stages(run: Run, cache: Mixture, stages: Sequence[int], global_batches: dict[str, int]) -> None:
    """Find out before the first stage what would stop a later one days after.

    Args:
        global_batches: of "stage1" and so on, samples.

    Raises:
        UsageError: stages have no samples or fewer than a global batch, or the cache lacks what one reads.
        TrainingError: a stage begins from one that is neither finished nor to be trained.
    """
    numbers = stages_to_train(run.config, stages)
    plans = {}
    for stage in numbers:
        if run.stage_result(stage).exists():
            continue
        if stage > 1 and objective_named(run.config.objective).chained and stage - 1 not in numbers:
            run.need_result(stage - 1)
        if objective_of(run, stage).tier >= Tier.QUESTIONS and not cache.column("has_question").any():
            raise UsageError(
                f"{cache.path}: stage {stage} of objective {run.config.objective} reads the teacher's question states, and "
                "this cache has none; set loss.reg_weight=0 to train without the regularisation"
            )
        plans[stage] = plan_stage(run.config.stage(stage), cache, global_batch=global_batches[f"stage{stage}"])
    if short := too_few_samples(plans, run.config, processes=max(world_size(), 1)):
        raise UsageError(short)


def too_few_samples(plans: Mapping[int, "StagePlan"], config: TrainConfig, *, processes: int) -> str:
    """The stages that have fewer samples than one global batch, with the settings under which all fit; "" if all do."""
    short = {stage: plan for stage, plan in plans.items() if plan.num_samples < plan.global_batch}
    if not short:
        return ""
    found, settings = [], []
    for stage, plan in short.items():
        found.append(
            f"stage {stage} has {plan.num_samples} samples in all its epochs, its global batch {plan.global_batch}"
        )
        batch_size = min(config.stage(stage).batch_size, plan.num_samples // processes)
        if not batch_size:
            return f"{found[-1]}, and each of {processes} processes takes at least one: start fewer processes"
        if batch_size < config.stage(stage).batch_size:
            settings.append(f"--set stage{stage}.batch_size={batch_size}")
        settings.append(f"--set stage{stage}.accumulation={plan.num_samples // (batch_size * processes)}")
    return (
        f"fewer samples than one global batch (batch_size x accumulation x {processes} processes): {'; '.join(found)}; add "
        f"{' '.join(settings)}, or train more epochs"
    )


def all_ranks(config: TrainConfig) -> AbstractContextManager[Ranks]:
    """The processes of the run, connected. Without a launcher, and without an engine that needs one, there is this one."""
    processes = world_size()
    if not processes and resolve_engine(config.engine, processes) == "none":
        return nullcontext(Ranks())
    return joined(resolve_device(config.device).type, launched=processes > 0)


def open_for(run: Run, stages: Sequence[int]) -> Mixture:
    """The run's caches. Raises UsageError if they, or the launcher, cannot serve what the run asks for."""
    if resolve_engine(run.config.engine, world_size()).startswith("zero"):
        import_deepspeed(resolve_device(run.config.device))
    caches = [Cache(path) for path in run.caches]
    for path, cache in zip(run.caches, caches, strict=True):
        if not cache.is_complete:
            raise UsageError(
                f"--cache {path}: {len(cache.shards)} of {cache.num_shards} shards are finished; "
                "run `genrecal cache` again with the same options to finish it"
            )
        for stage in stages_to_train(run.config, stages):
            objective_of(run, stage).check_cache(run.config.objective, cache)
    mixture = Mixture(caches, run.config.data.weights)
    check_pair(
        run.config.objective, mixture.first, run.student, prompt=run.prompt, trust_remote_code=run.trust_remote_code
    )
    return mixture


def objective_of(run: Run, stage: int) -> Objective[Any]:
    """The run's objective in a stage."""
    return objective_named(run.config.objective)(stage, run.config)


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """One stage of a run on this rank. `begun` is the content of run.json; `midway` what is asked between its steps."""

    run: Run
    cache: Mixture
    stage: int
    ranks: Ranks
    device: torch.device
    begun: dict[str, Any]
    midway: Midway | None = None
    wandb: Wandb | None = None
    clock: Clock = field(default_factory=Clock)

    @property
    def settings(self) -> StageConfig:
        return self.run.config.stage(self.stage)

    @property
    def global_batch(self) -> int:
        return int(self.begun["global_batch"][f"stage{self.stage}"])


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Which samples a stage sees, in how many steps."""

    indices: np.ndarray  # of the cache, those the stage uses
    global_batch: int
    num_samples: int  # in all epochs
    num_steps: int


def plan_stage(config: StageConfig, cache: Mixture, *, global_batch: int | None = None) -> StagePlan:
    """Steps of a stage over a cache. The last step takes what is left, so that no sample is dropped.

    Args:
        global_batch: samples of an optimizer step; None for one process with the stage's own settings.
    """
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
    global_batch = global_batch or config.batch_size * config.accumulation
    num_samples = round(int(cache.counts(indices).sum()) * config.epochs)
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


def _train_stage(job: StageJob, source: RecordSource, signals: StopSignals) -> None:
    run, stage, ranks, config, settings = job.run, job.stage, job.ranks, job.run.config, job.settings
    plan, engine, distiller, builder, data, first_step = _prepare(job, source)
    if stage == 1 and first_step == 0:
        _measure(job, distiller, source, plan, "start")
    # A live teacher stays in this process.
    workers = config.data.workers if isinstance(source, ShardSource) else 0
    stream = micro_batch_stream(builder, data, range(first_step, plan.num_steps), workers=workers)
    with (
        few_to_collect(),
        closing(stream),  # type: ignore[type-var]
        RunLog(run.path, stage, first_step=first_step, writes=ranks.first, wandb=job.wandb) as log,
        Progress(f"stage {stage}", plan.num_steps, "steps", done=first_step, shown=ranks.first) as progress,
    ):
        skipped, damaged = (ranks.gather(log.left_out)[0][name] for name in ("skipped", "damaged"))
        points = job.midway.points(stage, plan.num_steps) - ranks.gather(log.evaluations)[0] if job.midway else set()
        for step in range(first_step, plan.num_steps):
            if step in points:
                _evaluate(job, distiller.student, plan, step, log)
            started = time.perf_counter()
            tokens, rate = data.answer_tokens(step), learning_rate(settings, step, plan.num_steps)
            seed_step(config.seed, stage, step, ranks.rank)
            own = micro_steps(engine, stream, builder, data.micro_steps(step), tokens, job)
            own.signal = signals.received
            shares = ranks.gather(own)
            _check_shares(shares, job, engine)
            left_out = {
                name: texts
                for name in ("skipped", "damaged")
                if (texts := [text for share in shares for text in getattr(share, name)])
            }
            skipped += len(left_out.get("skipped", ()))
            damaged += len(left_out.get("damaged", ()))
            if skipped + damaged > config.data.max_skip * plan.num_samples:
                ranks.stop(
                    too_many_left_out(
                        stage,
                        config,
                        skipped=skipped,
                        damaged=damaged,
                        seen=min((step + 1) * plan.global_batch, plan.num_samples),
                        total=plan.num_samples,
                        examples=[text for texts in left_out.values() for text in texts],
                    )
                )
            values = update(engine, rate, shares, ranks)
            seconds = time.perf_counter() - started
            student_tokens = sum(share.student_tokens for share in shares)
            values |= {
                "lr": rate, "samples": sum(len(share.keys) for share in shares), "teacher_tokens": tokens,
                "student_tokens": student_tokens, "seconds": seconds,
                "data_wait": max(share.waited for share in shares) / seconds,
                "tokens_per_second": student_tokens / seconds, "memory_gb": max(share.memory for share in shares) / 1e9,
            }  # fmt: skip
            values |= left_out | job.clock.read()
            last = step + 1 == plan.num_steps
            if step % config.log_every == 0 or last or left_out:
                log.write(step, values)
            received = next((share.signal for share in shares if share.signal), None)
            due = settings.checkpoint_every and (step + 1) % settings.checkpoint_every == 0
            if (due or received) and not last:
                _save(job, engine, step + 1)
            if received and not last:
                ranks.stop(
                    StoppedError(
                        f"{received}: saved a checkpoint at stage {stage}, step {step + 1}; run the same command to resume"
                    )
                )
            progress.advance(1, _in_words(values, distiller.objective))
        if plan.num_steps in points:
            _evaluate(job, distiller.student, plan, plan.num_steps, log)
    if damaged and ranks.first:
        sys.stderr.write(
            f"genrecal: stage {stage}: {damaged} of {plan.num_samples} samples were skipped since they are damaged; "
            f"metrics.jsonl names them under damaged, and `genrecal verify CACHE` the shards of {job.cache.path}\n"
        )
    if stage < 3:
        _measure(job, distiller, source, plan, "end")
    state = engine.state(moments=False)
    engine.close()
    ranks.together(lambda: run.save_result(stage, state.weights) if state is not None else None)


@contextmanager
def few_to_collect() -> Iterator[None]:
    """What is there before the steps is left out of Python's garbage collection until they are done.

    Half a million objects, nearly all of them modules', take it half a second, in the middle of a step and on each rank at
    another one; and in a forked process it writes to every page that it looks at, which copies them.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _in_words(values: dict[str, Any], objective: Objective[Any]) -> str:
    """A step's values, for the line of progress."""
    terms = [f"{name} {values[name]:.3f}" for name in ("loss", "sft", *objective.logs) if name in values]
    return (
        f"{', '.join(terms)}, {values['tokens_per_second']:.0f} tokens/s, {values['data_wait']:.0%} waiting for data, "
        f"{values['memory_gb']:.1f} GB"
    )


def _evaluate(job: StageJob, student: VLM, plan: StagePlan, step: int, log: RunLog) -> None:
    """Ask the student as `step` steps have left it."""
    assert job.midway is not None
    config = job.run.config
    evaluation = job.midway.ask(student, job.ranks, compute_dtype=resolve_precision(config), seed=config.seed)
    log.evaluated(step, evaluation, done=step / plan.num_steps, shown=config.evaluate.shown)


def _measure(job: StageJob, distiller: Distiller, source: RecordSource, plan: StagePlan, moment: str) -> None:
    """A snapshot for the report, which rank 0 takes; the others wait. Not with zero3, where no process has the whole
    student."""
    config = job.run.config
    if not hasattr(distiller, "recalibrator") or not config.measure.samples or config.engine == "zero3":
        return

    def measure() -> None:
        if job.ranks.first:
            take_snapshot(
                distiller,
                source,
                job.cache,
                plan.indices,
                samples=config.measure.samples,
                moment=moment,
                compute_dtype=resolve_precision(config),
                max_tokens=config.max_tokens,
            ).write(job.run.path)

    job.ranks.together(measure)


def _prepare(job: StageJob, source: RecordSource) -> tuple[StagePlan, Engine, Distiller, BatchBuilder, StageData, int]:
    """The stage's plan; its engine, where the newest checkpoint left it; what it trains; its samples; and the first step."""
    run, cache, stage, ranks, config, settings = job.run, job.cache, job.stage, job.ranks, job.run.config, job.settings
    compute_dtype = resolve_precision(config)

    def build() -> tuple[StagePlan, Distiller]:
        plan = plan_stage(settings, cache, global_batch=job.global_batch)
        torch.manual_seed(config.seed * 4 + stage)
        return plan, build_distiller(run, cache, stage, job.device, compute_dtype, samples=plan.indices)

    plan, distiller = ranks.together(build)

    if ranks.first:
        remove_unfinished(run.checkpoints)
    paths = ranks.gather(find_checkpoints(run.checkpoints, stage)[-1:])[0]
    for path in paths:
        ranks.wait_for(path)

    def newest() -> Checkpoint | None:
        """The newest checkpoint, its weights in place."""
        if not paths:
            return None
        checkpoint = read_checkpoint(paths[-1])
        run.check_checkpoint(checkpoint, stage, job.begun)
        checkpoint.put_weights(trained_parameters(distiller))
        return checkpoint

    checkpoint = ranks.together(newest)
    micro_steps = -(-plan.global_batch // (settings.batch_size * ranks.size))
    engine = start_engine(
        config,
        settings,
        distiller,
        ranks,
        device=job.device,
        compute_dtype=compute_dtype,
        micro_steps=micro_steps,
        clock=job.clock,
    )
    if ranks.first and ranks.size > 1:
        sys.stderr.write(
            f"genrecal: stage {stage}: {ranks.size} processes, engine {resolve_engine(config.engine, ranks.size)}; a global "
            f"batch of {plan.global_batch} samples is {micro_steps} micro-steps of {settings.batch_size} on each\n"
        )
    if checkpoint is not None:
        engine.load_moments(checkpoint.state, where=str(checkpoint.path))
    first_step = checkpoint.step if checkpoint is not None else 0
    builder = ranks.together(lambda: _builder(job, source, plan, distiller, engine))
    data = StageData(
        order=cache.order(plan.indices, seed=config.seed * 4 + stage, window=config.data.window),
        lengths=(cache.column("question_tokens") + cache.column("answer_tokens"))[plan.indices],
        tokens=cache.column("answer_tokens")[plan.indices],
        global_batch=plan.global_batch,
        last_sample=plan.num_samples,
        batch_size=settings.batch_size,
        conversations=cache.conversations()[plan.indices] if len(cache.caches) > 1 else None,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    return plan, engine, distiller, builder, data, first_step


FILLERS = 64  # samples that are tried for `BatchBuilder.fillers`


def _builder(
    job: StageJob, source: RecordSource, plan: StagePlan, distiller: Distiller, engine: Engine
) -> BatchBuilder:
    config, renderer = job.run.config, distiller.student.renderer
    fillers, beside = np.empty(0, np.int64), None
    if job.ranks.size > 1 or engine.same_modules:
        images = job.cache.column("images")[plan.indices]
        fillers = np.arange(min(FILLERS, len(images)))
        if engine.same_modules and images.any():
            fillers, beside = np.flatnonzero(images)[:FILLERS], image_beside(renderer)
    builder = BatchBuilder(
        _Subset(source, plan.indices),
        renderer,
        distiller.objective,
        max_tokens=config.max_tokens,
        on_damage=config.data.on_damage,
        beside=beside,
        fillers=fillers.tolist(),
    )
    if len(fillers):
        builder.filler()
    return builder


def _save(job: StageJob, engine: Engine, step: int) -> None:
    """A checkpoint, which rank 0 writes; the others wait, and stop too if it cannot be written."""
    state, run = engine.state(), job.run

    def write() -> None:
        if state is not None:
            save_checkpoint(
                run.checkpoints,
                job.stage,
                step,
                state,
                run=job.begun,  # nothing is asked of the cache's store here: it may be away when a signal comes
                keep=run.config.keep_checkpoints,
            )

    job.ranks.together(write)


@dataclass(kw_only=True)
class Share:
    """What one rank did of an optimizer step, gathered before anything is updated.

    Args:
        loss: its part of the step's. sums: of its terms. bad: losses that are not finite, with their samples.
        keys: its samples. student_tokens: of them. waited: seconds for data. memory: bytes of its device, the most so far.
        skipped, damaged: why samples were left out. error: what stopped its loading. signal: what told it to stop.
    """

    loss: float = 0.0
    sums: TermSums = field(default_factory=dict)
    bad: list[tuple[float, list[str]]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    student_tokens: int = 0
    waited: float = 0.0
    memory: int = 0
    skipped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    error: GenrecalError | None = None
    signal: str | None = None


def micro_steps(
    engine: Engine, stream: Iterator[Loaded], builder: BatchBuilder, count: int, tokens: int, job: StageJob
) -> Share:
    """Forward and backward of this rank's micro-batches of a step, as they come. An error is kept for later, and the other
    ranks' micro-steps are gone through with fillers: they wait for this one's."""
    share, losses = Share(), []
    outputs: list[StepOutput] = []
    for number in range(1, count + 1):
        waiting = time.perf_counter()
        loaded = next(stream) if share.error is None else Loaded()
        share.waited += time.perf_counter() - waiting
        share.error = share.error or loaded.error
        share.skipped += loaded.skipped
        share.damaged += loaded.damaged
        batch = loaded.batch
        if batch is None and builder.fillers:
            batch = builder.filler()
        if batch is None:
            continue
        with explain_failures(job.stage, job.run.config, longest=batch.student_inputs["input_ids"].shape[1]):
            output = engine.micro_step(batch, tokens, last=number == count)
        outputs.append(StepOutput(loss=output.loss.detach(), sums=output.sums, counts=output.counts))
        losses.append((outputs[-1].loss, batch.keys))
        share.keys += batch.keys
        share.student_tokens += int(batch.student_inputs["attention_mask"][: len(batch.keys)].sum())
    values = [(loss.item(), keys) for loss, keys in losses]
    share.loss, share.sums = sum(loss for loss, _ in values), term_sums(outputs)
    share.bad = [(loss, keys) for loss, keys in values if not math.isfinite(loss)]
    share.memory = most_memory()
    return share


def _check_shares(shares: Sequence[Share], job: StageJob, engine: Engine) -> None:
    """Stop all ranks where loading or a loss went wrong on one; nothing is updated then."""
    if error := next((share.error for share in shares if share.error), None):
        job.ranks.stop(explain_loading(error, job.stage, job.run.config))
    if broken := next((share.bad for share in shares if share.bad), None):
        job.ranks.stop(not_finite("loss", *broken[0], engine.compute_dtype))


def update(engine: Engine, rate: float, shares: Sequence[Share], ranks: Ranks) -> dict[str, Any]:
    """The optimizer's step; the loss and the means of its terms, over all ranks.

    Stops all ranks with a TrainingError, before anything is changed, if the gradient is not finite.
    """
    norm = engine.step(rate)
    if not math.isfinite(norm):
        keys = [key for share in shares for key in share.keys]
        ranks.stop(not_finite("gradient's norm", norm, keys, engine.compute_dtype))
    return {
        "loss": sum(share.loss for share in shares),
        "grad_norm": norm,
        **term_means([share.sums for share in shares]),
    }


class _Subset:
    """A source that knows a stage's samples by their place among those it uses."""

    def __init__(self, source: RecordSource, indices: np.ndarray):
        self.source, self.indices = source, indices

    def fetch(self, indices: Sequence[int], tier: Tier) -> Any:
        return self.source.fetch([int(self.indices[i]) for i in indices], tier)


def build_distiller(
    run: Run,
    cache: Mixture,
    stage: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    *,
    samples: np.ndarray | None = None,
) -> Distiller:
    """The student as the stage before left it, and what the objective trains beside it.

    Trained parameters are float32; frozen ones take the compute dtype. `samples` are those of the stage; None for all.
    """
    config, objective = run.config, objective_of(run, stage)
    trains_base = stage == 3 or (stage == 2 and not config.lora.rank)
    dtype = torch.float32 if trains_base else compute_dtype
    before = 2 if stage == 3 and (objective.chained or run.stage_result(2).exists()) else 0
    student = run.student_after(before, dtype, device)
    if stage == 2 and config.lora.rank:
        add_lora(student, config.lora)
    for name in select_trainable(stage, student, config.lora):
        parameter = student.model.get_parameter(name)
        parameter.data = parameter.data.float()
    modules = {
        name: module.to(device) for name, module in objective.modules(student.model.config, cache.hidden_size).items()
    }
    student.model.train(stage > 1)
    if config.gradient_checkpointing:
        if stage > 1:
            checkpoint_activations(student.model)
        for module in modules.values():
            if hasattr(module, "gradient_checkpointing_enable"):
                module.gradient_checkpointing_enable()  # type: ignore[operator]
    objective.prepare(student, cache, np.arange(len(cache)) if samples is None else samples, modules)
    previous = stage - 1
    if modules and previous in objective.stages and (objective.chained or run.stage_result(previous).exists()):
        learnt = run.load_result(previous)
        for name, module in modules.items():
            parameters = {f"{name}.{key}": value for key, value in module.named_parameters()}
            own = {key: value for key, value in learnt.items() if key.startswith(f"{name}.")}
            if own:
                copy_weights(own, parameters, where=str(run.stage_result(previous)))
    return Distiller(student, objective, modules)


def most_memory() -> int:
    """Bytes that torch has had of this process's GPU at once; without one, the process's largest resident size."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def learning_rate(settings: StageConfig, step: int, num_steps: int) -> float:
    """Linear from `lr` at step 0 towards `lr_end` at step `num_steps` (paper, section 4.1(c))."""
    return settings.lr + (settings.lr_end - settings.lr) * step / num_steps


def seed_step(seed: int, stage: int, step: int, rank: int) -> None:
    """Dropout's random state of a step: the same after a resume, another on every rank."""
    torch.manual_seed(int(np.random.SeedSequence([seed, stage, step, rank]).generate_state(1, np.uint64)[0]))


def resolve_precision(config: TrainConfig) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if resolve_device(config.device).type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32
