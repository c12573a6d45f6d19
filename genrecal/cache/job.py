"""The cache job, from top to bottom: plan shards, make those that are missing, complete the cache if all are there.

If the teacher writes the answers (`--generate`), it writes those of all of this run's shards first: generating and running
over whole conversations may take two engines, of which only one fits into memory.

Which samples are in which shard follows from the input's order and the shard size alone, so a restart makes only the
shards that have no manifest, with the same bytes.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import genrecal
from genrecal.cache.answers import answer_shard, answered, finished_answers, first_turns
from genrecal.cache.options import CacheOptions, WorkOptions
from genrecal.cache.shard import Facts, cache_shard, finished_facts
from genrecal.cache.teacher import Teacher
from genrecal.cache.watch import Watch, check_skipped, stop_signals
from genrecal.cache.windows import Item, ReadRecord, Run
from genrecal.errors import StorageError, UsageError
from genrecal.folders import KINDS, refuse_other_content
from genrecal.samples import SampleSet
from genrecal.samples.images import BACKGROUND
from genrecal.shards.head import HEAD_FILE
from genrecal.shards.index import INDEX_FILE, READERS, complete_cache
from genrecal.shards.layout import (
    CACHE_FILE,
    FORMAT_VERSION,
    LATER,
    TEACHER_FOLDER,
    TIERS,
    answers_name,
    manifest_name,
    read_cache_json,
    write_cache_json,
)
from genrecal.shards.manifest import CACHED, SKIPPED
from genrecal.shards.storage import LocalStore, Store, open_store, storage_errors
from genrecal.vlm.loading import file_digest, image_backend, model_folder, processor_files

FOLDERS = ("manifest", "answers", "quarantine", *TIERS)  # of a cache whose cache.json was deleted to be made again


@dataclass(frozen=True)
class Step:
    """What is done for every shard; any worker can do any shard.

    Args:
        title: for people and programs.
        mark: name of the file that exists once a shard is done.
        read: gives a shard's records by their number.
        make: does a shard, from its rendered windows.
        finished: facts of those of these shards that are done.
    """

    title: str
    mark: Callable[[int], str]
    read: Callable[[Run, int], ReadRecord]
    make: Callable[[Run, int, Iterator[list[Item]]], "Future[Facts]"]
    finished: Callable[[Store, Sequence[int]], dict[int, Facts]]


@dataclass
class CacheReport:
    """What a run of the job did.

    Args:
        shards_done: shards that this run made. shards_found: those of this worker that were finished before.
        shards_missing: shards of other workers that are not finished. If any are, the cache has no index and totals yet.
        cached, skipped: samples of the whole cache, or of this worker's shards if the cache is not complete.
        reasons: why this run skipped samples.
        seconds: by part (`genrecal.cache.watch.PARTS`), over all threads of this run.
        counts: see `Watch.count`.
    """

    cache: str
    shards_done: int = 0
    shards_found: int = 0
    shards_missing: int = 0
    cached: int = 0
    skipped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def run_cache_job(
    teacher: Teacher,
    samples: SampleSet,
    cache: "str | os.PathLike[str] | Store",
    options: CacheOptions,
    work: WorkOptions | None = None,
) -> CacheReport:
    """Cache `samples` into `cache`, a directory or any fsspec URL, skipping shards that are finished.

    Each of several workers makes its own shards. A worker that finds all shards of the cache finished at its end writes the
    index and the totals; if several do, they write the same bytes.

    Raises:
        UsageError: there is a cache made with other options, another teacher or other data.
        DataError: more than `options.max_skip` of the input cannot be used.
        StorageError: the cache cannot be written, or a remote store keeps failing.
        StoppedError: a signal such as SIGTERM stopped the job.

    After an error, finished shards stay; run the job again to resume.
    """
    work, store = work or WorkOptions(), open_store(cache)
    check_status_file(work, store)
    prepare_directory(teacher, samples, store, options)
    return run_job(
        lambda step, shards, watch: run_shards(step, teacher, samples, store, shards, options, work, watch),
        samples,
        store,
        options,
        work,
    )


@stop_signals()
def run_job(
    make: Callable[[Step, list[int], Watch], dict[int, Facts]],
    samples: SampleSet,
    store: Store,
    options: CacheOptions,
    work: WorkOptions,
) -> CacheReport:
    """Have `make` make the shards that are missing, and complete the cache if all are there; see `run_cache_job`.

    Args:
        make: does a step for these shards, tells the watch, and gives their facts.
    """
    num_shards = options.num_shards(len(samples))
    mine = work.shards(num_shards)
    found = finished_shards(store, mine)
    report = CacheReport(store.url, shards_found=len(found))

    def watching(title: str, shards: Sequence[int], found: dict[int, Facts]) -> Watch:
        return Watch(
            sum(len(options.records(shard, len(samples))) for shard in shards),
            done=sum(facts["rows"] for facts in found.values()),
            skipped=sum(facts[SKIPPED] for facts in found.values()),
            num_samples=len(samples),
            max_skip=options.max_skip,
            status_file=work.status_file,
            facts={"worker": work.worker, "workers": work.workers},
            title=title,
        )

    answers = 0
    if options.answers.written_by_teacher:
        missing = [shard for shard in mine if shard not in found]
        written = finished_answers(store, missing)
        if unwritten := [shard for shard in missing if shard not in written]:
            with watching(ANSWERS.title, missing, written) as watch:
                make(ANSWERS, unwritten, watch)
                answers = watch.counts["answers"]
    with watching(CACHE.title, mine, found) as watch:
        watch.count(answers=answers)
        done = make(CACHE, [shard for shard in mine if shard not in found], watch)
        report.shards_done = len(done)
        report.reasons, report.seconds, report.counts = watch.reasons, watch.seconds, watch.counts
        every = found | done
        others = [shard for shard in range(num_shards) if shard not in every]
        every |= finished_shards(store, others)
        report.shards_missing = num_shards - len(every)
        if not report.shards_missing:
            with storage_errors(f"{store.url}: the index and the totals"):
                _complete(store, num_shards)
        counted = (found | done).values() if report.shards_missing else every.values()
        report.cached, report.skipped = (sum(facts[name] for facts in counted) for name in (CACHED, SKIPPED))
        check_skipped(report.skipped, len(samples), options.max_skip, report.reasons)
        watch.state = "waiting" if report.shards_missing else "finished"
    return report


def run_shards(
    step: Step,
    teacher: Teacher,
    samples: SampleSet,
    store: Store,
    shards: Sequence[int],
    options: CacheOptions,
    work: WorkOptions,
    watch: Watch,
) -> dict[int, Facts]:
    """Do a step for these shards, in order; their facts. The teacher runs in this thread."""
    found: dict[int, Facts] = {}
    done: dict[int, Future[Facts]] = {}
    with Run(teacher, samples, store, options, work.num_threads, watch) as run:

        def windows() -> Iterator[tuple[int, list[Item]]]:
            for shard in shards:
                if store.exists(step.mark(shard)):  # another worker may have done it in the meantime
                    found.update(step.finished(store, [shard]))
                if shard in found:
                    watch.count(records=found[shard]["rows"], through=found[shard]["rows"])
                else:
                    yield from ((shard, window) for window in run.windows(run.records(shard), step.read(run, shard)))

        try:
            for shard, group in groupby(run.ahead(windows()), key=lambda pair: pair[0]):
                done[shard] = step.make(run, shard, (window for _, window in group))
            return found | {shard: facts.result() for shard, facts in done.items()}
        except BaseException as error:
            watch.end(error)
            raise


def finished_shards(store: Store, shards: Sequence[int]) -> dict[int, Facts]:
    """The facts of those that are finished."""
    sizes = {f"{folder}/{name}": size for folder in ("manifest", *TIERS) for name, size in store.sizes(folder).items()}
    with ThreadPoolExecutor(READERS) as pool:
        facts = pool.map(lambda shard: finished_facts(store, shard, sizes.get), shards)
        return {shard: found for shard, found in zip(shards, facts, strict=True) if found is not None}


ANSWERS = Step("answers", answers_name, first_turns, answer_shard, finished_answers)
CACHE = Step("cache", manifest_name, answered, cache_shard, finished_shards)


# ------------------------------------------------------------------------------------------------------- the directory


def check_status_file(work: WorkOptions, store: Store) -> None:
    """It changes as the job goes, and a finished cache is the same bytes whoever made it."""
    if work.status_file is not None and isinstance(store, LocalStore):
        if work.status_file.resolve().is_relative_to(store.root.resolve()):
            raise UsageError(f"--status-file {work.status_file}: expected a place outside the cache {store.url}")


def check_place(cache: "str | os.PathLike[str] | Store") -> None:
    """Raises UsageError for a place that holds something else than a cache."""
    store = open_store(cache)
    if isinstance(store, LocalStore):
        if not (store.root / CACHE_FILE).exists():
            refuse_other_content(store.root, "a cache", ours=(HEAD_FILE, INDEX_FILE, TEACHER_FOLDER, *FOLDERS))
    elif not store.exists(CACHE_FILE) and (found := next((name for name in KINDS if store.exists(name)), None)):
        raise UsageError(
            f"--out {store.url}: expected a cache or nothing, found {KINDS[found]} ({found}); choose another --out"
        )


def prepare_directory(teacher: Teacher, samples: SampleSet, store: Store, options: CacheOptions) -> None:
    """Write cache.json, the head and the teacher's files, or check that the ones there are of the same job."""
    check_place(store)
    source = model_folder(teacher.path)
    files = [source / "config.json", *processor_files(source)]
    try:
        store.prepare()
        exists = store.exists(CACHE_FILE)
        head_digest = _known_head(store) if exists else None
        if not exists and options.stores_states:
            head = teacher.head.to_bytes()
            store.write(HEAD_FILE, head)
            head_digest = hashlib.sha256(head).hexdigest()
    except (OSError, StorageError) as error:
        raise UsageError(f"--out {store.url}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    description = _description(teacher, samples, options, files, head_digest)
    if exists:
        _refuse_another_job(store, description)
        return
    try:
        for file in files:
            store.write(f"{TEACHER_FOLDER}/{file.name}", file.read_bytes())
        if not store.exists(CACHE_FILE):  # another worker may have come first
            write_cache_json(store, description)
    except OSError as error:
        raise UsageError(f"--out {store.url}: cannot be written: {error.strerror or error}") from None
    _refuse_another_job(store, description)


KEPT_OPTIONS = (
    "answer_codec", "question_codec", "question_fraction", "question_seed", "samples_per_shard", "batch_tokens", "max_tokens",
)  # fmt: skip


def _description(
    teacher: Teacher, samples: SampleSet, options: CacheOptions, files: list[Path], head_digest: str | None
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
            "head_xxh3": teacher.head.fingerprint(),  # tells another head at a restart, without writing it out
            "dtype": str(teacher.head.weight.dtype).removeprefix("torch."),
        },
        "backend": teacher.backend,
        "image_backend": image_backend(),
        "image_background": BACKGROUND,
        "hidden_size": hidden_size,
        "head_rows": num_rows,
        "vocab_size": teacher.head.vocab_size,
        "top_k": min(options.top_k, num_rows),
        "sampled_targets": options.draws,
        "answers": options.answers.to_json(),
        "template_args": teacher.renderer.template_args,
        "allowed_tokens": list(teacher.renderer.allowed_tokens),
        **{name: getattr(options, name) for name in KEPT_OPTIONS},
        "num_samples": len(samples),
        "num_shards": options.num_shards(len(samples)),
        "selection": samples.selection.to_json(),
        "fields": dict(samples.fields.fields),
        "roles": dict(samples.fields.roles),
        "data": samples.describe_files(),
    }  # fmt: skip


def _known_head(store: Store) -> Any:
    """The head's sha256 as cache.json has it."""
    teacher = read_cache_json(store).get("teacher")
    return teacher.get("head_sha256") if isinstance(teacher, dict) else None


def _refuse_another_job(store: Store, wanted: dict[str, Any]) -> None:
    found, wanted = dict(read_cache_json(store)), dict(wanted)
    for name in LATER:
        found.pop(name, None)
    different = _changed_files(found.pop("data", []), wanted.pop("data"))
    different += [
        f"{name} was {found.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name) and name != "software"
    ]
    if different:
        raise UsageError(
            f"--out {store.url} holds a cache made by another job: {'; '.join(different)}. "
            "Use the same options to resume it, or another --out"
        )


def _changed_files(found: list[dict[str, str]], wanted: list[dict[str, str]]) -> list[str]:
    """Where the data differ, in words: files by content, wherever they were fetched from."""
    if len(found) != len(wanted):
        return [f"data was {len(found)} files, now {len(wanted)}"]
    return [
        f"data file {new.get('url', new['name'])} is not the {old.get('url', old['name'])} of then"
        for old, new in zip(found, wanted, strict=True)
        if (old["name"], old["sha256"]) != (new["name"], new["sha256"])
    ][:3]


def _complete(store: Store, num_shards: int) -> None:
    """Every shard is finished: write the index, then the totals, which say so. Any number of workers may do it."""
    for tier in TIERS:
        store.discard_temporaries(tier)  # of workers that were lost, or do a finished shard again
    complete_cache(store, num_shards)
