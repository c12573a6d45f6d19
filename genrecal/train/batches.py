"""Cached samples -> micro-batches on the CPU, in worker processes, a few of them ahead."""

import contextlib
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from genrecal.errors import DamageError, GenrecalError, SampleError, TrainingError
from genrecal.objectives.base import Batch, Objective, Tier, first_of, map_tensors
from genrecal.samples import ImageRef, Message, Sample
from genrecal.shards.mixture import Mixture
from genrecal.shards.order import MixedOrder, micro_batches, spread_out
from genrecal.shards.reader import Cache
from genrecal.shards.record import Record
from genrecal.train.advice import LoaderError, loader_died
from genrecal.vlm.loading import first_line
from genrecal.vlm.rendering import Encoded, Renderer

SPREAD_STEPS = 8  # steps among which samples of one conversation are moved
PREFETCH = 2  # micro-batches that each worker process reads ahead

# ----------------------------------------------------------------------------------------------------- sources of records


Fetched = tuple[Sample, Record | None] | DamageError


class RecordSource(Protocol):
    """Where a stage's records come from: the shards, or a live teacher."""

    def fetch(self, indices: Sequence[int], tier: Tier) -> list[Fetched]:
        """Samples of the cache and, unless the tier is NONE, their records up to that tier.

        A corrupt sample gives its error instead.
        """


class ShardSource:
    """Reads what is asked for from the shards, and nothing else."""

    def __init__(self, cache: Cache | Mixture):
        self.cache = cache

    def fetch(self, indices: Sequence[int], tier: Tier) -> list[Fetched]:
        return [self._one(index, tier) for index in indices]

    def _one(self, index: int, tier: Tier) -> Fetched:
        try:
            if tier == Tier.NONE:
                return self.cache[index].sample, None
            record = self.cache[index].record(states=tier >= Tier.STATES, question=tier >= Tier.QUESTIONS)
            return record.sample, record
        except DamageError as error:
            return error


class LiveSource:
    """Takes the samples from the cache and makes their states anew with a teacher that stands beside the student."""

    def __init__(self, cache: Cache | Mixture, live: Any):
        self.cache, self.live = cache, live

    def fetch(self, indices: Sequence[int], tier: Tier) -> list[Fetched]:
        entries = [self.cache[index] for index in indices]
        samples = [entry.sample for entry in entries]
        if tier == Tier.NONE:
            return [(sample, None) for sample in samples]
        wanted = [tier >= Tier.QUESTIONS and entry.has_question for entry in entries]
        return list(zip(samples, self.live.records(samples, questions=wanted), strict=True))


# --------------------------------------------------------------------------------------------------------------- building


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A loaded micro-batch; `batch` is None if the student can take none of its samples.

    skipped: "key: reason" of samples that it cannot take; damaged: messages about corrupt samples; error:
    what stopped the loading, in place of a batch (a worker process hands it over as a value: torch would wrap a raised
    one in its own traceback).
    """

    batch: Batch | None = None
    skipped: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    error: GenrecalError | None = None


class BatchBuilder(Dataset[Loaded]):
    """Indices of samples -> micro-batch; a Dataset so that torch's DataLoader can do it in worker processes.

    Args:
        beside: a conversation with an image that goes through the student after samples without one, no row of it read:
            ranks that work together must run the same modules in every micro-step, or they deadlock.
        fillers: samples of which the first that the student can take stands in for a micro-batch that has none left, so
            that this rank keeps in step with the others; its loss is multiplied by 0. Empty: `batch` is None then.
    """

    def __init__(
        self,
        source: RecordSource,
        renderer: Renderer,
        objective: Objective[Any],
        *,
        max_tokens: int = 0,
        on_damage: str = "fail",
        beside: Encoded | None = None,
        fillers: Sequence[int] = (),
    ):
        self.source, self.renderer, self.objective = source, renderer, objective
        self.max_tokens, self.on_damage, self.beside, self.fillers = max_tokens, on_damage, beside, fillers
        self._filler: Batch | None = None

    def __getitem__(self, indices: Sequence[int]) -> Loaded:  # type: ignore[override]
        """One micro-batch. A sample that the student cannot take is left out, with its reason; so is a damaged one, or it
        stops the loading (`data.on_damage`)."""
        try:
            loaded = self._load([int(i) for i in indices], on_damage=self.on_damage)
        except GenrecalError as error:
            loaded = Loaded(error=error)
        return loaded if loaded.batch is not None or not self.fillers else replace(loaded, batch=self.filler())

    def filler(self) -> Batch:
        """A batch that counts nothing. Raises TrainingError if the student can take none of `fillers`."""
        for index in self.fillers if self._filler is None else ():
            found = self._load([int(index)], on_damage="skip").batch
            if found is not None:
                self._filler = replace(found, filler=True, keys=[])
                break
        if self._filler is None:
            raise TrainingError(f"none of {len(self.fillers)} samples can be trained on; the metrics name the reasons")
        return self._filler

    def _load(self, indices: list[int], *, on_damage: str) -> Loaded:
        encoded, records, skipped, damaged = [], [], [], []
        for item in self.source.fetch(indices, self.objective.tier) if indices else ():
            if isinstance(item, DamageError):
                if on_damage == "fail":
                    raise item
                damaged.append(str(item))
                continue
            sample, record = item
            try:
                rendered = self.renderer.encode(sample, max_tokens=self.max_tokens or None)
                if record is not None:
                    self.objective.check(rendered, record)
                    records.append(record)
                encoded.append(rendered if self.objective.last_answer else self.renderer.without_last_answer(rendered))
            except SampleError as error:
                skipped.append(f"{sample.key}: {error}")
        batch = None
        if encoded:
            images = any(item.num_images for item in encoded)
            beside = [self.beside] if self.beside is not None and not images else []
            batch = self.objective.batch(student_batch(encoded, self.renderer, beside=beside), encoded, records)
        return Loaded(batch=batch, skipped=tuple(skipped), damaged=tuple(damaged))


def student_batch(encoded: Sequence[Encoded], renderer: Renderer, *, beside: Sequence[Encoded] = ()) -> Batch:
    """The student's part. `beside` goes through the student too, after the samples; no row of it is read."""
    passes = renderer.batches([*encoded, *beside]) if renderer.alone else []
    inputs = renderer.collate([*encoded, *beside], text_only=bool(passes))
    length = inputs["input_ids"].shape[1]
    answers = [
        (start + number * length, end + number * length)
        for number, item in enumerate(encoded)
        for start, end, is_answer in item.segments()
        if is_answer
    ]
    rows = torch.from_numpy(np.concatenate([np.arange(start - 1, end - 1) for start, end in answers]))
    return Batch(
        keys=[item.key for item in encoded],
        student_inputs=inputs,
        student_passes=passes,
        student_rows=rows,
        student_ids=inputs["input_ids"].flatten()[rows + 1],
        student_first=torch.from_numpy(first_of([end - start for start, end in answers])),
    )


def image_beside(renderer: Renderer) -> Encoded:
    """A short conversation with an image, for `BatchBuilder.beside`."""
    messages = [Message(role="user", parts=(ImageRef(0), "?")), Message(role="assistant", parts=("!",))]
    return renderer.encode_messages(messages, [Image.new("RGB", (56, 56))])


# ---------------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, kw_only=True)
class StageData:
    """A stage's samples in order, and how its steps are cut into micro-batches.

    Args:
        order: the endless stream of samples. last_sample: where the stage ends in it; the last step takes what is left.
        lengths: int `[n]`, to put samples of like length together. tokens: int `[n]`, the teacher's answer tokens of each.
        conversations: int `[n]`, of each sample: none comes twice in a global batch where that can be avoided. None where
            every sample has its own.
    """

    order: MixedOrder
    lengths: np.ndarray
    tokens: np.ndarray
    global_batch: int
    last_sample: int
    batch_size: int
    conversations: np.ndarray | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "_spread", lru_cache(maxsize=2)(self._make_spread))

    def step(self, number: int) -> np.ndarray:
        """int64: the samples of a step's global batch."""
        if self.conversations is not None:
            block, place = divmod(number, SPREAD_STEPS)
            spread: np.ndarray = self._spread(block)  # type: ignore[attr-defined]
            return spread[place * self.global_batch :][: self.global_batch]
        return self._slice(number, 1)

    def _slice(self, step: int, count: int) -> np.ndarray:
        start = step * self.global_batch
        return self.order.slice(start, min(start + count * self.global_batch, self.last_sample))

    def _make_spread(self, block: int) -> np.ndarray:
        assert self.conversations is not None
        samples = self._slice(block * SPREAD_STEPS, SPREAD_STEPS)
        return spread_out(samples, self.conversations[samples], self.global_batch)

    def answer_tokens(self, number: int) -> int:
        """The teacher's answer tokens in a step's global batch, by the manifests: what its loss is divided by."""
        return int(self.tokens[self.step(number)].sum())

    def micro_steps(self, number: int) -> int:
        """How many micro-batches a step has on every rank."""
        samples = min((number + 1) * self.global_batch, self.last_sample) - number * self.global_batch
        return -(-samples // (self.batch_size * self.world_size))

    def micro_batches(self, steps: range) -> Iterator[np.ndarray]:
        """The samples of this rank's micro-batches, step after step."""
        for number in steps:
            yield from micro_batches(
                self.step(number),
                self.lengths,
                batch_size=self.batch_size,
                rank=self.rank,
                world_size=self.world_size,
            )


def micro_batch_stream(builder: BatchBuilder, data: StageData, steps: range, *, workers: int) -> Iterator[Loaded]:
    """This rank's micro-batches, one after another, read ahead in worker processes: at most `PREFETCH` for each.

    Close it at the end: the interpreter would ask its processes to end by the signal that they ignore, and wait.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's advice on the number of workers
        loader: Any = iter(
            DataLoader(
                builder,
                sampler=data.micro_batches(steps),  # type: ignore[arg-type]
                batch_size=None,
                num_workers=workers,
                prefetch_factor=PREFETCH if workers else None,
                multiprocessing_context="fork" if workers else None,  # processors and readers are shared, not pickled
                collate_fn=_in_shared_memory if workers else None,  # type: ignore[arg-type]
                worker_init_fn=_ignore_stop_signals,
                generator=torch.Generator(),  # its own: a draw from the global one would change dropout after a resume
            )
        )
    try:
        while True:
            try:
                loaded = next(loader)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # Where a process that loads has ended, torch says so, or its tensors can no longer be fetched from it.
                if not workers or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                    raise
                loaded = Loaded(error=loader_died(error))
                with contextlib.suppress(
                    RuntimeError
                ):  # torch may notice twice, once by the signal of the process's end
                    loader = None
            yield loaded
            if loaded.error is not None:
                return
    finally:
        del loader


def _in_shared_memory(loaded: Loaded) -> Loaded:
    """Move the tensors to shared memory. torch would do so in a thread of its own, and hang
    where there is no room."""
    try:
        return map_tensors(loaded, lambda tensor: tensor.share_memory_())
    except RuntimeError as error:
        return Loaded(
            error=LoaderError(
                f"a micro-batch does not fit into shared memory (/dev/shm): {first_line(error)}; give the container more "
                "(docker run --shm-size=16g, or --ipc=host)"
            )
        )


def _ignore_stop_signals(_: int) -> None:
    """A scheduler signals every process of a job; what the training process makes of it still needs its workers."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
