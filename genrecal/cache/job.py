"""The cache job, from top to bottom: plan shards, run the teacher over each, commit, say what was skipped.

Which samples are in which shard follows from the input's order and the shard size alone, so a restart repeats only the
shards that have no manifest, and makes the same bytes.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

import genrecal
from genrecal.cache.draws import MOST_DRAWS
from genrecal.cache.proof import Proof
from genrecal.cache.teacher import States, Teacher
from genrecal.errors import DamageError, DataError, SampleError, StorageError, UsageError
from genrecal.progress import Progress
from genrecal.samples import BadRecord, Sample, SampleSet
from genrecal.shards.codecs import CODECS, check_codec_option
from genrecal.shards.head import HEAD_FILE
from genrecal.shards.index import INDEX_FILE, index_bytes, read_shard_manifest, scan, totals_of
from genrecal.shards.layout import (
    CACHE_FILE,
    FORMAT_VERSION,
    TEACHER_FOLDER,
    TIERS,
    read_cache_json,
    shard_name,
    write_cache_json,
)
from genrecal.shards.record import Record
from genrecal.shards.storage import Store, open_store
from genrecal.shards.writer import ShardWriter
from genrecal.vlm.loading import file_digest, image_backend, model_folder, processor_files
from genrecal.vlm.rendering import Encoded

LOOKAHEAD = 64  # samples rendered before they are grouped by length; bounds the pictures held in memory


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What decides a cache's content, besides the teacher and the samples.

    Args:
        top_k: logits kept for each answer row.
        draws: draws kept for each answer row as sampled targets (`--targets sample:K`); 0 for none.
        answer_codec, question_codec: names in `genrecal.shards.codecs`; `question_codec` may be "none".
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
        check_codec_option("--answer-codec", self.answer_codec)
        if self.question_codec != "none":
            check_codec_option("--question-codec", self.question_codec)
        for name, least in (("top_k", 1), ("samples_per_shard", 1), ("batch_tokens", 1), ("max_tokens", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {least}")
        if not 0 <= self.draws <= MOST_DRAWS:
            raise UsageError(f"--targets sample:{self.draws}: expected 1 to {MOST_DRAWS} draws, or no sample at all")
        for name in ("question_fraction", "max_skip"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a share from 0 to 1")
        if not self.kl_budget >= 0:
            raise UsageError(f"--kl-budget {self.kl_budget}: expected nats, 0 or more")

    def keeps_question(self, key: str) -> bool:
        """Whether this sample's question states are cached: its place in [0, 1) by hash is below the fraction."""
        place = xxhash.xxh3_64_intdigest(f"{self.question_seed}:{key}".encode()) / 2**64
        return self.question_codec != "none" and place < self.question_fraction


@dataclass
class CacheReport:
    """What a run of the job did."""

    cache: str
    shards_done: int = 0
    shards_found: int = 0  # finished by an earlier run
    cached: int = 0
    skipped: int = 0
    proof: Proof = field(default_factory=Proof)  # that the teacher's states are what they are taken for
    reasons: Counter[str] = field(default_factory=Counter)  # why samples of this run's shards were skipped


def run_cache_job(
    teacher: Teacher, samples: SampleSet, cache: "str | os.PathLike[str] | Store", options: CacheOptions
) -> CacheReport:
    """Cache `samples` into `cache`, a directory or any fsspec URL, skipping shards that are finished.

    Raises:
        UsageError: there is a cache made with other options, another teacher or other data.
        DataError: more than `options.max_skip` of the input cannot be used.
        StorageError: a remote store goes on failing. What is finished stays; run the job again.
    """
    store = open_store(cache)
    num_shards = -(-len(samples) // options.samples_per_shard)
    _prepare_directory(teacher, samples, store, options, num_shards)
    sizes = {folder: store.sizes(folder) for folder in ("manifest", *TIERS)}  # when the job starts
    report = CacheReport(store.url)
    with Progress("cache", len(samples), "samples") as progress:
        for shard in range(num_shards):
            start = shard * options.samples_per_shard
            records = range(start, min(start + options.samples_per_shard, len(samples)))
            facts = _finished(store, shard, sizes)
            if facts is not None:
                report.shards_found += 1
            else:
                facts = _run_shard(teacher, samples, records, store, shard, options, report)
                report.shards_done += 1
            report.cached += facts["cached"]
            report.skipped += facts["skipped"]
            progress.advance(len(records), f"{report.skipped} skipped")
    _complete(store, num_shards)
    _check_skipped(report.skipped, len(samples), options, report)
    return report


def _run_shard(
    teacher: Teacher,
    samples: SampleSet,
    records: range,
    store: Store,
    shard: int,
    options: CacheOptions,
    report: CacheReport,
) -> dict[str, Any]:
    """One shard from its input records to its commit."""
    question_codec = None if options.question_codec == "none" else CODECS[options.question_codec]
    skipped = report.skipped
    with ShardWriter(
        store,
        shard,
        answer_codec=CODECS[options.answer_codec],
        question_codec=question_codec,
        head=teacher.head,
        kl_budget=options.kl_budget,
    ) as writer:
        for start in range(records.start, records.stop, LOOKAHEAD):
            window = [samples[i] for i in range(start, min(start + LOOKAHEAD, records.stop))]
            for sample, result in zip(window, _run_window(teacher, window, options, report), strict=True):
                reason = _write(writer, sample, result)
                if reason is not None:
                    writer.skip(sample, reason)
                    report.reasons[reason] += 1
                    skipped += 1
                    _check_skipped(skipped, len(samples), options, report)
        return writer.commit()


def _write(writer: ShardWriter, sample: Sample | BadRecord, result: States | SampleError) -> str | None:
    """Write a sample's record, or say why it cannot be."""
    if isinstance(sample, BadRecord):
        return sample.reason
    if isinstance(result, SampleError):
        return str(result)
    try:
        images = [image.read() for image in sample.images]
        writer.add(Record(sample=sample, answer=result.answer, question=result.question), images)
    except SampleError as error:
        return str(error)
    return None


def _run_window(
    teacher: Teacher, window: Sequence[Sample | BadRecord], options: CacheOptions, report: CacheReport
) -> list[States | SampleError]:
    """Render, group by length, run; results in the window's order."""
    results: list[Any] = [SampleError("") for _ in window]
    encoded: dict[int, Encoded] = {}
    for number, sample in enumerate(window):
        if isinstance(sample, BadRecord):
            continue
        try:
            encoded[number] = teacher.encode(sample, max_tokens=options.max_tokens or None)
        except SampleError as error:
            results[number] = error
    usable = [(sample, encoded[n]) for n, sample in enumerate(window) if isinstance(sample, Sample) and n in encoded]
    report.proof.check(teacher, usable)
    for batch in batches_by_length({number: len(item) for number, item in encoded.items()}, options.batch_tokens):
        questions = [options.keeps_question(encoded[number].key) for number in batch]
        states = teacher.states(
            [encoded[number] for number in batch], questions=questions, top_k=options.top_k, draws=options.draws
        )
        for number, state in zip(batch, states, strict=True):
            results[number] = state
    return results


def batches_by_length(lengths: dict[int, int], batch_tokens: int) -> Iterator[list[int]]:
    """Ids of like length together, each batch at most `batch_tokens` with its padding (but at least one id)."""
    batch: list[int] = []
    for number in sorted(lengths, key=lambda n: (lengths[n], n)):
        if batch and lengths[number] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------------- the directory


def _prepare_directory(
    teacher: Teacher, samples: SampleSet, store: Store, options: CacheOptions, num_shards: int
) -> None:
    """Write cache.json, the head and the teacher's files, or check that the ones there are of the same job."""
    source = model_folder(teacher.path)
    files = [source / "config.json", *processor_files(source)]
    try:
        store.prepare()
        exists = store.exists(CACHE_FILE)
        head_digest = _write_head(teacher, store, exists)
    except (OSError, StorageError) as error:
        raise UsageError(f"--out {store.url}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    description = _description(teacher, samples, options, num_shards, files, head_digest)
    if exists:
        _refuse_another_job(store, description)
        return
    for file in files:
        store.write(f"{TEACHER_FOLDER}/{file.name}", file.read_bytes())
    write_cache_json(store, description)


def _description(
    teacher: Teacher,
    samples: SampleSet,
    options: CacheOptions,
    num_shards: int,
    files: list[Path],
    head_digest: str,
) -> dict[str, Any]:
    import torch
    import transformers

    num_rows, hidden_size = teacher.head.weight.shape
    folder = Path(teacher.path)
    return {
        "format_version": FORMAT_VERSION,
        "software": {
            "genrecal": genrecal.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            **teacher.versions,
        },
        "teacher": {
            "name": folder.resolve().name if folder.is_dir() else teacher.path,
            "files_sha256": {file.name: file_digest(file) for file in files},
            "head_sha256": head_digest,
            "dtype": str(teacher.head.weight.dtype).removeprefix("torch."),
        },
        "backend": teacher.backend,
        "image_backend": image_backend(),
        "hidden_size": hidden_size,
        "head_rows": num_rows,
        "vocab_size": teacher.head.vocab_size,
        "top_k": min(options.top_k, num_rows),
        "sampled_targets": options.draws,
        "answer_codec": options.answer_codec,
        "question_codec": options.question_codec,
        "question_fraction": options.question_fraction,
        "question_seed": options.question_seed,
        "samples_per_shard": options.samples_per_shard,
        "batch_tokens": options.batch_tokens,
        "max_tokens": options.max_tokens,
        "num_samples": len(samples),
        "num_shards": num_shards,
        "data": [{"name": file.path.name, "sha256": file_digest(file.path)} for file in samples.files],
    }  # fmt: skip


def _write_head(teacher: Teacher, store: Store, exists: bool) -> str:
    """The head's digest; written unless this cache has its head already."""
    temporary = store.temporary(HEAD_FILE)
    try:
        teacher.head.save(temporary)
        digest = file_digest(temporary)
        if not exists:
            store.place(temporary, HEAD_FILE)
        return digest
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_another_job(store: Store, wanted: dict[str, Any]) -> None:
    found = read_cache_json(store)
    found.pop("totals", None)
    different = [
        f"{name} was {found.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name) and name != "software"
    ]
    if different:
        raise UsageError(
            f"--out {store.url} holds a cache made by another job: {'; '.join(different)}. "
            "Use the same options to resume it, or another --out"
        )


def _finished(store: Store, shard: int, sizes: dict[str, dict[str, int]]) -> dict[str, Any] | None:
    """The facts of a shard that is done: its manifest can be read and its tars have the size it says.

    Args:
        sizes: of the files in each folder of the cache.
    """
    if f"{shard_name(shard)}.parquet" not in sizes["manifest"]:
        return None
    try:
        table, facts = read_shard_manifest(store, shard)
    except DamageError:
        return None
    ends = {tier: 0 for tier in facts["sha256"]}
    for members in table.column("members").to_pylist():
        for member in members:
            ends[member["tier"]] = max(ends[member["tier"]], member["offset"] + member["size"])
    for tier, end in ends.items():
        size = sizes[tier].get(f"{shard_name(shard)}.tar")
        if size is None and tier == "questions":
            continue  # the tier may be deleted after stage 1
        if size is None or size < end:
            return None
    return facts


def _complete(store: Store, num_shards: int) -> None:
    """Every shard is finished: write the index, then the totals, which say so."""
    scanned = scan(store, range(num_shards))
    description = read_cache_json(store)
    index, totals = index_bytes(scanned), totals_of(scanned)
    if description.get("totals") == totals and store.exists(INDEX_FILE) and store.read(INDEX_FILE) == index:
        return
    store.write(INDEX_FILE, index)
    write_cache_json(store, description | {"totals": totals})


def _check_skipped(skipped: int, total: int, options: CacheOptions, report: CacheReport) -> None:
    if skipped > options.max_skip * total:
        most = "; ".join(f"{count} x {reason}" for reason, count in report.reasons.most_common(3))
        raise DataError(
            f"{skipped} of {total} samples cannot be used, over the limit of {options.max_skip:.2%} (--max-skip)"
            + (f": {most}" if most else f"; `genrecal inspect {report.cache}` lists the reasons")
        )
