"""The training loop, from top to bottom: for each stage, set up, step through the samples, save the result."""

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
from types import SimpleNamespace
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
from genrecal.progress import Progress, counted
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
    STATE,
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
from genrecal.train.stages import Distiller, StepOutput, add_lora, describe_trained, select_trainable, try_stages
from genrecal.vlm.loading import empty_model, resolve_device

FILLERS = 64  # samples that are tried for `BatchBuilder.fillers`


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run on this rank. `begun` is the content of run.json."""

    run: Run
    cache: Mixture
    ranks: Ranks
    device: torch.device
    signals: StopSignals
    begun: dict[str, Any]
    midway: Midway | None
    wandb: Wandb | None
    clock: Clock


def train(run: Run, *, stages: Sequence[int] = (1, 2, 3), live_teacher: Any = None, profile: bool = False) -> None:
    """Train the stages asked for, resuming where an earlier call of the same run stopped.

    Under a launcher every process calls this, and each trains on its share of every global batch.

    Args:
        live_teacher: a `genrecal.cache.teacher.LiveTeacher` that makes the records in place of the shards; handed in,
            since the trainer does not know teachers.
        profile: measure time and memory by part and write them with each step's metrics.

    Raises:
        UsageError: settings, student or cache are not those the run's folder was begun with.
        TrainingError: a loss or gradient is not finite, or an earlier stage's result is missing.
        StoppedError: a signal asked the run to stop.
        OtherRankError: on all ranks but the one that reports the error.
    """
    objective = objective_named(run.config.objective)
    with all_ranks(run.config) as ranks, StopSignals() as signals, ExitStack() as held:
        if ranks.first and (missing := sorted(set(stages) - set(objective.stages))):
            sys.stderr.write(
                f"genrecal: objective {run.config.objective} has no stage {missing[0]}: it has no Recalibrator to train\n"
            )
        device = ranks.together(lambda: own_device(run.config.device))
        check_devices(ranks, device)
        if device.index is not None:
            torch.cuda.set_device(device)
        cache, midway = ranks.together(lambda: (open_for(run, stages), Midway.of(run.config)))

        def begin() -> tuple[dict[str, Any], Wandb | None]:
            if not ranks.first:
                return {}, None
            check_stages(run, cache, stages, run.check(cache, ranks.size)["global_batch"])
            check_layout(run.student, trust_remote_code=run.trust_remote_code)
            empty = empty_model(run.student, trust_remote_code=run.trust_remote_code)
            try_stages(SimpleNamespace(path=run.student, model=empty), run.config.lora)
            held.enter_context(FolderLock(run.path / LOCK_FILE, "training in"))
            begun = run.begin(cache, ranks.size)
            if not (run.path / CACHE_FACTS).exists():
                write_whole(run.path / CACHE_FACTS, (json.dumps(cache_facts(cache), indent=2) + "\n").encode())
            project = run.config.wandb
            wandb = held.enter_context(Wandb(project, run.path, asdict(run.config))) if project else None
            return begun, wandb

        begun, wandb = ranks.together(begin)
        begun = ranks.gather(begun)[0]
        ranks.wait_for(run.path / RUN_FILE)
        ranks.together(lambda: run.check_files(begun, cache))
        session = Session(
            run=run,
            cache=cache,
            ranks=ranks,
            device=device,
            signals=signals,
            begun=begun,
            midway=midway,
            wandb=wandb,
            clock=Clock(device if profile else None),
        )
        for stage in stages_to_train(run.config, stages):
            if received := next((name for name in ranks.gather(signals.received) if name), None):
                ranks.stop(StoppedError(f"{received}: stopped before stage {stage}; run the same command to resume"))
            if not ranks.gather(run.stage_result(stage).exists())[0]:
                source = LiveSource(cache, live_teacher) if live_teacher else ShardSource(cache)
                with explain_failures(stage, run.config):
                    StageTrainer(session, stage, source).train()
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


# ------------------------------------------------------------------------------------------- before anything is trained


def stages_to_train(config: TrainConfig, stages: Sequence[int]) -> list[int]:
    """In order; an objective without a Recalibrator has no stage 1."""
    return [stage for stage in sorted(set(stages)) if stage in objective_named(config.objective).stages]


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
    several = run.teacher == "cache" and objective_named(run.config.objective).several_teachers(run.config.loss)
    mixture = Mixture(caches, run.config.data.weights, several_teachers=several)
    check_pair(
        run.config.objective, mixture.first, run.student, prompt=run.prompt, trust_remote_code=run.trust_remote_code
    )
    return mixture


def objective_of(run: Run, stage: int) -> Objective[Any]:
    """The run's objective in a stage."""
    return objective_named(run.config.objective)(stage, run.config)


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
    if config.drop_unlikely:
        indices = cache.without_unlikely(indices, config.drop_unlikely)
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


# ------------------------------------------------------------------------------------------------------------ one stage


@dataclass(kw_only=True)
class Share:
    """What one rank did of an optimizer step, gathered before anything is updated.

    Args:
        loss: its part of the step's. sums: of its terms. bad: losses that are not finite, with their samples.
        keys: its samples. student_tokens: of them. waited: seconds for data. memory: peak bytes of its device.
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


class StageTrainer:
    """One stage of a run on this rank, from its newest checkpoint or its beginning to its result."""

    def __init__(self, session: Session, stage: int, source: RecordSource):
        self.session, self.stage, self.source = session, stage, source
        self.run, self.ranks, self.config = session.run, session.ranks, session.run.config
        self.settings, self.dtype = self.config.stage(stage), resolve_precision(self.config)
        self.plan, self.distiller = self.ranks.together(self._build)
        if self.ranks.first:
            trained = describe_trained(self.distiller.student, self.config.lora, stage)
            sys.stderr.write(f"genrecal: stage {stage} {trained}\n")
        self.engine, self.first_step = self._start_engine()
        self.builder = self.ranks.together(self._builder)
        cache, indices = session.cache, self.plan.indices
        self.data = StageData(
            order=cache.order(indices, seed=self.config.seed * 4 + stage, window=self.config.data.window),
            lengths=(cache.column("question_tokens") + cache.column("answer_tokens"))[indices],
            tokens=cache.column("answer_tokens")[indices],
            global_batch=self.plan.global_batch,
            last_sample=self.plan.num_samples,
            batch_size=self.settings.batch_size,
            conversations=cache.conversations()[indices] if len(cache.caches) > 1 else None,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
        )

    def _build(self) -> tuple["StagePlan", Distiller]:
        cache, global_batch = self.session.cache, self.session.begun["global_batch"][f"stage{self.stage}"]
        plan = plan_stage(self.settings, cache, global_batch=int(global_batch))
        torch.manual_seed(self.config.seed * 4 + self.stage)
        device = self.session.device
        distiller = build_distiller(self.run, cache, self.stage, device, self.dtype, samples=plan.indices)
        if distiller.student.renderer.alone and resolve_engine(self.config.engine, self.ranks.size) == "zero3":
            raise UsageError(
                f"{self.run.student}: engine zero3 needs as many forward passes on each process, and this student runs each "
                "conversation alone; set engine=zero2"
            )
        return plan, distiller

    def _start_engine(self) -> tuple[Engine, int]:
        """The engine, where the newest checkpoint left it, and the first step."""
        run, ranks = self.run, self.ranks
        if ranks.first:
            remove_unfinished(run.checkpoints)
        paths = ranks.gather(find_checkpoints(run.checkpoints, self.stage)[-1:])[0]
        for path in paths:
            ranks.wait_for(path / STATE)

        def newest() -> Checkpoint | None:
            """The newest checkpoint, its weights in place."""
            if not paths:
                return None
            checkpoint = read_checkpoint(paths[-1])
            run.check_checkpoint(checkpoint, self.stage, self.session.begun)
            checkpoint.put_weights(trained_parameters(self.distiller))
            return checkpoint

        checkpoint = ranks.together(newest)
        micro_steps = -(-self.plan.global_batch // (self.settings.batch_size * ranks.size))
        engine = start_engine(
            self.config,
            self.settings,
            self.distiller,
            ranks,
            device=self.session.device,
            compute_dtype=self.dtype,
            micro_steps=micro_steps,
            clock=self.session.clock,
        )
        if ranks.first and ranks.size > 1:
            name, batch_size = resolve_engine(self.config.engine, ranks.size), self.settings.batch_size
            sys.stderr.write(
                f"genrecal: stage {self.stage}: {counted(ranks.size, 'process', 'processes')}, engine {name}; "
                f"a global batch of {counted(self.plan.global_batch, 'sample')} is "
                f"{counted(micro_steps, 'micro-step')} of {batch_size} on each\n"
            )
        if checkpoint is None:
            return engine, 0
        engine.load_moments(checkpoint.state, where=str(checkpoint.path))
        return engine, checkpoint.step

    def _builder(self) -> BatchBuilder:
        renderer, same_modules = self.distiller.student.renderer, self.engine.same_modules
        fillers, beside = np.empty(0, np.int64), None
        if self.ranks.size > 1 or same_modules:
            images = self.session.cache.column("images")[self.plan.indices]
            fillers = np.arange(min(FILLERS, len(images)))
            if same_modules and images.any():
                fillers, beside = np.flatnonzero(images)[:FILLERS], image_beside(renderer)
        builder = BatchBuilder(
            _Subset(self.source, self.plan.indices),
            renderer,
            self.distiller.objective,
            max_tokens=self.config.max_tokens,
            on_damage=self.config.data.on_damage,
            beside=beside,
            fillers=fillers.tolist(),
        )
        if len(fillers):
            builder.filler()
        return builder

    def train(self) -> None:
        run, stage, plan, ranks, session = self.run, self.stage, self.plan, self.ranks, self.session
        if stage == 1 and self.first_step == 0:
            self._measure("start")
        # A live teacher stays in this process.
        workers = self.config.data.workers if isinstance(self.source, ShardSource) else 0
        steps = range(self.first_step, plan.num_steps)
        stream = micro_batch_stream(self.builder, self.data, steps, workers=workers)
        with (
            frozen_gc(),
            closing(stream),  # type: ignore[type-var]
            RunLog(run.path, stage, first_step=steps.start, writes=ranks.first, wandb=session.wandb) as log,
            Progress(f"stage {stage}", plan.num_steps, "steps", done=steps.start, shown=ranks.first) as progress,
        ):
            left_out = ranks.gather(log.left_out)[0]
            points = session.midway.points(stage, plan.num_steps) if session.midway else set()
            points -= ranks.gather(log.evaluations)[0]
            for step in steps:
                if step in points:
                    self._evaluate(step, log)
                values, received = self._step(step, stream, left_out)
                last = step + 1 == plan.num_steps
                if step % self.config.log_every == 0 or last or "skipped" in values or "damaged" in values:
                    log.write(step, values)
                due = self.settings.checkpoint_every and (step + 1) % self.settings.checkpoint_every == 0
                if (due or received) and not last:
                    self._save(step + 1)
                if received and not last:
                    ranks.stop(
                        StoppedError(
                            f"{received}: saved a checkpoint at stage {stage}, step {step + 1}; run the same command to "
                            "resume"
                        )
                    )
                progress.advance(1, self._in_words(values))
            if plan.num_steps in points:
                self._evaluate(plan.num_steps, log)
        if left_out["damaged"] and ranks.first:
            sys.stderr.write(
                f"genrecal: stage {stage}: {left_out['damaged']} of {plan.num_samples} samples were skipped since they are "
                "damaged; metrics.jsonl names them under damaged, and `genrecal verify CACHE` the shards of "
                f"{session.cache.path}\n"
            )
        if stage < 3:
            self._measure("end")
        state = self.engine.state(moments=False)
        self.engine.close()
        ranks.together(lambda: run.save_result(stage, state.weights) if state is not None else None)

    def _step(self, step: int, stream: Iterator[Loaded], left_out: dict[str, int]) -> tuple[dict[str, Any], str | None]:
        """One optimizer step: what is logged of it, and the name of a signal that a rank received."""
        started = time.perf_counter()
        ranks, plan, config = self.ranks, self.plan, self.config
        tokens, rate = self.data.answer_tokens(step), learning_rate(self.settings, step, plan.num_steps)
        seed_step(config.seed, self.stage, step, ranks.rank)
        own = self._micro_steps(stream, self.data.micro_steps(step), tokens)
        own.signal = self.session.signals.received
        shares = ranks.gather(own)
        if error := next((share.error for share in shares if share.error), None):
            ranks.stop(explain_loading(error, self.stage, config))
        if broken := next((share.bad for share in shares if share.bad), None):
            ranks.stop(not_finite("loss", *broken[0], self.dtype))
        texts = {name: [text for share in shares for text in getattr(share, name)] for name in ("skipped", "damaged")}
        for name, found in texts.items():
            left_out[name] += len(found)
        if sum(left_out.values()) > config.data.max_skip * plan.num_samples:
            ranks.stop(
                too_many_left_out(
                    self.stage,
                    config,
                    **left_out,
                    seen=min((step + 1) * plan.global_batch, plan.num_samples),
                    total=plan.num_samples,
                    examples=[*texts["skipped"], *texts["damaged"]],
                )
            )
        values = update(self.engine, rate, shares, ranks)
        seconds, student_tokens = time.perf_counter() - started, sum(share.student_tokens for share in shares)
        values |= {
            "lr": rate, "samples": sum(len(share.keys) for share in shares), "teacher_tokens": tokens,
            "student_tokens": student_tokens, "seconds": seconds,
            "data_wait": max(share.waited for share in shares) / seconds,
            "tokens_per_second": student_tokens / seconds, "memory_gb": max(share.memory for share in shares) / 1e9,
        }  # fmt: skip
        values |= {name: found for name, found in texts.items() if found} | self.session.clock.read()
        return values, next((share.signal for share in shares if share.signal), None)

    def _micro_steps(self, stream: Iterator[Loaded], count: int, tokens: int) -> Share:
        """Forward and backward of this rank's micro-batches of a step, as they come. An error is kept for later, and the
        other micro-steps are done with fillers: the other ranks wait for this one's."""
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
            if batch is None and self.builder.fillers:
                batch = self.builder.filler()
            if batch is None:
                continue
            longest = batch.student_inputs["input_ids"].shape[1]
            with explain_failures(self.stage, self.config, longest=longest):
                output = self.engine.micro_step(batch, tokens, last=number == count)
            outputs.append(StepOutput(loss=output.loss.detach(), sums=output.sums, counts=output.counts))
            losses.append((outputs[-1].loss, batch.keys))
            share.keys += batch.keys
            share.student_tokens += int(batch.student_inputs["attention_mask"][: len(batch.keys)].sum())
        values = [(loss.item(), keys) for loss, keys in losses]
        share.loss, share.sums = sum(loss for loss, _ in values), term_sums(outputs)
        share.bad = [(loss, keys) for loss, keys in values if not math.isfinite(loss)]
        share.memory = peak_memory()
        return share

    def _in_words(self, values: dict[str, Any]) -> str:
        """A step's values, for the line of progress."""
        names = ("loss", "sft", *self.distiller.objective.logs)
        terms = ", ".join(f"{name} {values[name]:.3f}" for name in names if name in values)
        speed, waiting = values["tokens_per_second"], values["data_wait"]
        return f"{terms}, {speed:.0f} tokens/s, {waiting:.0%} waiting for data, {values['memory_gb']:.1f} GB"

    def _evaluate(self, step: int, log: RunLog) -> None:
        """Ask the student as `step` steps have left it."""
        assert self.session.midway is not None
        evaluation = self.session.midway.ask(
            self.distiller.student, self.ranks, compute_dtype=self.dtype, seed=self.config.seed
        )
        log.evaluated(step, evaluation, done=step / self.plan.num_steps, shown=self.config.evaluate.shown)

    def _measure(self, moment: str) -> None:
        """A snapshot for the report, which rank 0 takes while the others wait. Not with zero3, where no process has the
        whole student."""
        config = self.config
        if not hasattr(self.distiller, "recalibrator") or not config.measure.samples or config.engine == "zero3":
            return

        def measure() -> None:
            if self.ranks.first:
                take_snapshot(
                    self.distiller,
                    self.source,
                    self.session.cache,
                    self.plan.indices,
                    samples=config.measure.samples,
                    moment=moment,
                    compute_dtype=self.dtype,
                    max_tokens=config.max_tokens,
                ).write(self.run.path)

        self.ranks.together(measure)

    def _save(self, step: int) -> None:
        """A checkpoint, which rank 0 writes; the others wait, and stop too if it cannot be written."""
        state, run = self.engine.state(), self.run

        def write() -> None:
            # Nothing is asked of the cache's store here: it may be away when a signal comes.
            if state is not None:
                keep, begun = run.config.keep_checkpoints, self.session.begun
                save_checkpoint(run.checkpoints, self.stage, step, state, run=begun, keep=keep)

        self.ranks.together(write)


@contextmanager
def frozen_gc() -> Iterator[None]:
    """Freeze existing objects so that GC pauses do not hit ranks in the middle of a step, nor copy the pages of forked
    loader processes."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def update(engine: Engine, rate: float, shares: Sequence[Share], ranks: Ranks) -> dict[str, Any]:
    """The optimizer's step; the loss and the means of its terms, over all ranks.

    Stops all ranks with a TrainingError, before anything is changed, if the gradient is not finite.
    """
    norm = engine.step(rate)
    if not math.isfinite(norm):
        keys = [key for share in shares for key in share.keys]
        ranks.stop(not_finite("gradient's norm", norm, keys, engine.compute_dtype))
    loss = sum(share.loss for share in shares)
    return {"loss": loss, "grad_norm": norm, **term_means([share.sums for share in shares])}


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


def peak_memory() -> int:
    """Peak bytes that torch allocated on this process's GPU; without one, the process's largest resident size."""
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
