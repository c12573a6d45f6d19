"""One shard, from its input records to its commit: render, run the teacher, code, write.

Rendering and coding are done by other threads while the teacher works, and shards may be made side by side. What is
written does not depend on it: batches are formed of the shard's records alone, and members stand in the input's order.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pyarrow.compute as pc

from genrecal.cache.answers import answered
from genrecal.cache.batching import batches_by_length
from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import States, Teacher
from genrecal.cache.watch import Watch
from genrecal.cache.windows import Item, Threads, windows
from genrecal.errors import DamageError, SampleError
from genrecal.samples import BadRecord, Sample
from genrecal.shards.codecs import CODECS
from genrecal.shards.index import read_shard_manifest
from genrecal.shards.layout import manifest_name, tar_name
from genrecal.shards.manifest import CACHED, SKIPPED
from genrecal.shards.record import Record
from genrecal.shards.storage import Store, storage_errors
from genrecal.shards.writer import CodedRecord, ShardWriter

UNCODED_BATCHES = 2  # batches whose states may wait for a coder


def cache_shard(
    teacher: Teacher,
    samples: Sequence[Sample | BadRecord],
    shard: int,
    store: Store,
    options: CacheOptions,
    *,
    threads: Threads,
    watch: Watch,
) -> dict[str, Any]:
    """Make one shard and return its facts; or those of the same shard if another worker has finished it.

    Any worker can do any shard, and two may do the same one: both write the same bytes, each under names of its own until
    they are whole. In memory are a window of records (see `genrecal.cache.windows.windows`), rendered or coded, and the
    states of UNCODED_BATCHES batches that wait to be coded. Where the teacher writes the answers, they are there already.

    Args:
        teacher: asked from the calling thread, its `encode` from the threads that render.
        watch: is told of every batch and skipped record.

    Raises:
        DataError: too many records are skipped, or a codec costs more than its budget.
        StorageError: the shard cannot be written.
    """
    facts = finished_facts(store, shard, size_of_store(store))
    records = options.records(shard, len(samples))
    if facts is not None:
        watch.count(records=len(records), through=len(records))
        return facts
    question_codec = None if options.question_codec == "none" else CODECS[options.question_codec]
    where = f"{store.url}: shard {shard}"
    with storage_errors(where):
        writer = ShardWriter(
            store,
            shard,
            answer_codec=CODECS[options.answer_codec],
            question_codec=question_codec,
            head=teacher.head,
            kl_budget=options.kl_budget,
        )
    with writer:
        read = answered(samples, shard, store, options) if options.answers.written_by_teacher else samples.__getitem__
        for window in windows(teacher, read, records, options, threads, watch):
            coded = _run_window(teacher, window, writer, options, threads, watch)
            for number, item in enumerate(window):
                untouched = number not in coded  # by the teacher
                result = coded.pop(number, item.result)
                result = _result(result) if isinstance(result, Future) else result
                with watch.timed("writing"), storage_errors(where):
                    _write(writer, item, result, watch)
                notes = item.notes if isinstance(result, CodedRecord) else {}
                watch.count(records=1, through=int(untouched), **notes)
        with watch.timed("writing"), storage_errors(where):
            facts = _commit(writer, store, shard)
        watch.finished(writer.rows, writer.bytes, teacher.head.weight.shape[0])
        return facts


# --------------------------------------------------------------------------------------------------- the teacher, coding


def _run_window(
    teacher: Teacher, window: list[Item], writer: ShardWriter, options: CacheOptions, threads: Threads, watch: Watch
) -> dict[int, Any]:
    """Run the window's batches; by place in the window, the coded record to come, or why there is none."""
    lengths = {number: len(item.encoded) for number, item in enumerate(window) if item.encoded is not None}
    usable = [(item.sample, item.encoded) for item in window if isinstance(item.sample, Sample) and item.encoded]
    watch.prove(teacher, usable, batch_tokens=options.batch_tokens)
    samples = {number: item.sample for number, item in enumerate(window) if isinstance(item.sample, Sample)}
    results: dict[int, Any] = {}
    uncoded: deque[list[Future[CodedRecord]]] = deque()
    for batch in batches_by_length(lengths, options.batch_tokens):
        while len(uncoded) >= UNCODED_BATCHES:
            for future in uncoded.popleft():
                future.exception()  # waits
        encoded = [item.encoded for item in (window[number] for number in batch) if item.encoded is not None]
        questions = [options.keeps_question(item.key) for item in encoded]
        found = teacher.states(encoded, questions=questions, top_k=options.top_k, draws=options.draws)
        watch.count(samples=len(batch), through=len(batch), tokens=sum(len(item) for item in encoded))
        started = []
        for number, states in zip(batch, found, strict=True):
            window[number].encoded = None  # its tensors are not needed any more
            if isinstance(states, SampleError):
                results[number] = states
                continue
            results[number] = threads.code.submit(_code, writer, samples[number], states, watch)
            started.append(results[number])
        uncoded.append(started)
    return results


def _code(writer: ShardWriter, sample: Sample, states: States, watch: Watch) -> CodedRecord:
    with watch.timed("coding"):
        return writer.code(Record(sample=sample, answer=states.answer, question=states.question))


def _result(future: "Future[CodedRecord]") -> CodedRecord | SampleError:
    try:
        return future.result()
    except SampleError as error:
        return error


# --------------------------------------------------------------------------------------------------------------- writing


def _write(writer: ShardWriter, item: Item, result: CodedRecord | SampleError | None, watch: Watch) -> None:
    """Append the record, or note why there is none."""
    if isinstance(result, CodedRecord):
        writer.append(result, [image.read() for image in result.sample.images])
        return
    assert result is not None, "a record that was rendered has a result"
    reason = str(result)
    writer.skip(item.sample, reason)
    watch.skip(reason)


def _commit(writer: ShardWriter, store: Store, shard: int) -> dict[str, Any]:
    """Put the shard in place, unless another worker has done so in the meantime."""
    facts = finished_facts(store, shard, size_of_store(store))
    if facts is not None:
        return facts
    try:
        return writer.commit()
    except FileNotFoundError:  # who finishes a cache clears away what is unfinished: then this shard is there
        facts = finished_facts(store, shard, size_of_store(store))
        if facts is None:
            raise
        return facts


SizeOf = Callable[[str], int | None]  # bytes of a file by its name in the cache; None if it is not there


def size_of_store(store: Store) -> SizeOf:
    """Sizes as they are now."""

    def size(name: str) -> int | None:
        try:
            return store.size(name)
        except FileNotFoundError:
            return None

    return size


def finished_facts(store: Store, shard: int, size_of: SizeOf) -> dict[str, Any] | None:
    """The counts of a shard that is done: its manifest can be read and its tars have the size it says."""
    if size_of(manifest_name(shard)) is None:
        return None
    try:
        table, facts = read_shard_manifest(store, shard)
    except DamageError:
        return None
    members = pc.list_flatten(table.column("members"))
    tiers, offsets, sizes = (pc.struct_field(members, name) for name in ("tier", "offset", "size"))
    for tier in facts["sha256"]:
        end = pc.max(pc.add(offsets, sizes).filter(pc.equal(tiers, tier))).as_py() or 0
        size = size_of(tar_name(tier, shard))
        if size is None and tier == "questions":
            continue  # the tier may be deleted after stage 1
        if size is None or size < end:
            return None
    return {name: facts[name] for name in ("rows", CACHED, SKIPPED)}
