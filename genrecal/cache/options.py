"""Options of the cache job: what decides a cache's content, and how one run works."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from genrecal.cache.draws import MAX_DRAWS
from genrecal.errors import UsageError
from genrecal.shards.answer_source import GREEDY, SAMPLED, AnswerSource
from genrecal.shards.codecs import check_codec_option

MAX_THREADS = 16  # of the default


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What decides a cache's content, besides the teacher and the samples.

    Args:
        top_k: logits kept for each answer row.
        draws: draws kept for each answer row as sampled targets (`--targets sample:K`); 0 for none.
        answers: whose answers are cached: the data's, or the teacher's own.
        answer_codec, question_codec: names in `genrecal.shards.codecs`, or "none" where those states are not stored. Without
            answer states there are no question states either.
        question_fraction: share of samples whose question states are kept, chosen by key and seed.
        question_seed: see `keeps_question`.
        samples_per_shard: input records a shard.
        batch_tokens: tokens of a teacher batch, padding included.
        max_tokens: longest conversation the teacher is given, in its tokens; 0 for no limit.
        max_skip: share of the input that may be skipped before the job fails.
        kl_budget: mean KL through the head, nats, that a codec may cost on a shard; a shard over it is not written.
    """

    top_k: int = 64
    draws: int = 0
    answers: AnswerSource = field(default_factory=AnswerSource)
    answer_codec: str = "int8"
    question_codec: str = "int4"
    question_fraction: float = 1.0
    question_seed: int = 0
    samples_per_shard: int = 256
    batch_tokens: int = 16384
    max_tokens: int = 0
    max_skip: float = 0.01
    kl_budget: float = math.inf

    def __post_init__(self) -> None:
        for name in ("answer_codec", "question_codec"):
            if getattr(self, name) != "none":
                check_codec_option(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.answer_codec == "none" != self.question_codec:
            raise UsageError(
                f"--question-codec {self.question_codec} without answer states: expected --store targets, states or questions"
            )
        for name, least in (("top_k", 1), ("samples_per_shard", 1), ("batch_tokens", 1), ("max_tokens", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {least}")
        if not 0 <= self.draws <= MAX_DRAWS:
            raise UsageError(f"--targets sample:{self.draws}: expected 1 to {MAX_DRAWS} draws, or no sample at all")
        for name in ("question_fraction", "max_skip"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a share from 0 to 1")
        if not self.kl_budget >= 0:
            raise UsageError(f"--kl-budget {self.kl_budget}: expected nats, 0 or more")

    @property
    def stores_states(self) -> bool:
        return self.answer_codec != "none"

    def keeps_question(self, key: str) -> bool:
        """Whether this sample's question states are cached: its place in [0, 1) by hash is below the fraction."""
        place = xxhash.xxh3_64_intdigest(f"{self.question_seed}:{key}".encode()) / 2**64
        return self.question_codec != "none" and place < self.question_fraction

    def num_shards(self, num_samples: int) -> int:
        """Shards of an input of that many records."""
        return -(-num_samples // self.samples_per_shard)

    def records(self, shard: int, num_samples: int) -> range:
        """The input records of a shard."""
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, num_samples))


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """How one run of the job works; nothing here changes a byte of the cache.

    Args:
        workers, worker: of `workers` runs over one cache this is number `worker`, from 0; it does the shards whose number
            leaves that remainder.
        threads: that read, decode and preprocess samples; 0 takes the machine's cores less one, at most 16.
        status_file: where this run says how far it is, as JSON; it may not lie in the cache.
    """

    workers: int = 1
    worker: int = 0
    threads: int = 0
    status_file: Path | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: expected at least 1")
        if not 0 <= self.worker < self.workers:
            raise UsageError(
                f"--worker {self.worker}: expected 0 to {self.workers - 1} with --workers {self.workers} (counted from 0)"
            )
        if self.threads < 0:
            raise UsageError(
                f"--threads {self.threads}: expected at least 1, or 0 for as many as the machine has cores"
            )

    @property
    def num_threads(self) -> int:
        """`threads`, or what 0 stands for on this machine."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, min(MAX_THREADS, cores - 1))

    def shards(self, num_shards: int) -> range:
        """The shards that are this worker's to do."""
        return range(self.worker, num_shards, self.workers)


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How the job uses a Ray cluster; nothing here changes a byte of the cache.

    Args:
        address: of the cluster: host:port, "auto" for the one that runs on this machine, "local" for a new one on it.
        actors: teachers that work side by side; 0 for as many as the GPUs of the cluster allow, or one a node where the
            teacher takes none.
        gpus: that one teacher takes; None for one if the cluster has any.
    """

    address: str
    actors: int = 0
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.actors < 0:
            raise UsageError(f"--ray-actors {self.actors}: expected at least 1, or 0 for what the cluster allows")
        if self.gpus is not None and not (0 <= self.gpus <= 1 or self.gpus == int(self.gpus) > 0):
            raise UsageError(
                f"--ray-gpus {self.gpus}: expected a share of a GPU from 0 to 1, or a whole number of them"
            )


def parse_targets(text: str | None, top_k: int | None) -> tuple[int, int]:
    """`--targets` and `--top-k` -> logits and draws to store per row. Raises UsageError for text of another form, or two k."""
    widths: dict[str, int] = {}
    for part in text.split(",") if text is not None else []:
        kind, _, width = part.strip().partition(":")
        if kind not in ("topk", "sample") or kind in widths or not width.isdecimal() or not int(width):
            raise UsageError(f"--targets {text!r}: expected topk:K, sample:K or both, such as topk:64,sample:50")
        widths[kind] = int(width)
    if top_k is not None and widths.get("topk", top_k) != top_k:
        raise UsageError(f"--targets topk:{widths['topk']} and --top-k {top_k}: expected the same k; leave one out")
    return widths.get("topk", 64 if top_k is None else top_k), widths.get("sample", 0)


def written_answers(generate: bool, temperature: float, top_p: float, seed: int, max_tokens: int) -> AnswerSource:
    """The options of `--generate` as an answer source. Raises UsageError for an option without it."""
    if not generate:
        for name, value, default in (("temperature", temperature, 0), ("top-p", top_p, 1), ("seed", seed, 0)):
            if value != default:
                raise UsageError(f"--generate-{name} {value}: expected --generate with it")
        return AnswerSource()
    if temperature == 0:
        return AnswerSource(kind=GREEDY, max_tokens=max_tokens)
    return AnswerSource(kind=SAMPLED, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
