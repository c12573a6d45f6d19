"""One shard: run the teacher over rendered windows, code the records, write them, commit.

Other threads render, code and write while the teacher works. The bytes do not depend on that: a batch holds records of one
window alone, and members stand in the order of the input.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import pyarrow.compute as pc

from genrecal.cache.batching import batches_by_length
from genrecal.cache.extract import States
from genrecal.cache.windows import Item, Run
from genrecal.errors import DamageError, SampleError
from genrecal.samples import Sample
from genrecal.shards.codecs import CODECS
from genrecal.shards.index import read_shard_manifest
from genrecal.shards.layout import manifest_name, tar_name
from genrecal.shards.manifest import CACHED, SKIPPED
from genrecal.shards.record import Record
from genrecal.shards.storage import Store, storage_errors
from genrecal.shards.writer import CodedRecord, ShardWriter

Facts = dict[str, Any]  # of a finished shard: at least its `rows`, and how many of them are `skipped`


def cache_shard(run: Run, shard: int, windows: Iterator[list[Item]]) -> "Future[Facts]":
    """Make one shard. The future gives its facts once it is committed.

    Any worker can make any shard, and two may make the same one: both write the same bytes, under temporary names until
    they are whole. In memory are a window that the teacher runs over, one that is rendered ahead, one that is written, and
    the states of two batches. If the teacher writes the answers, they were written before.

    Raises (here, from the future, or from the next use of the writing thread):
        DataError: too many records are skipped, or a codec costs more than its budget.
        StorageError: the shard cannot be written.
    """
    options = run.options
    with storage_errors(f"{run.store.url}: shard {shard}"):
        writer = ShardWriter(
            run.store,
            shard,
            answer_codec=CODECS.get(options.answer_codec),
            question_codec=CODECS.get(options.question_codec),
            head=run.teacher.head,
            kl_budget=options.kl_budget,
        )
    with contextlib.ExitStack() as unfinished:
        unfinished.enter_context(writer)
        unfinished.callback(run.wait_for_writing)
        for window in windows:
            _run_teacher(run, window, writer)
            run.write_later(_append, run, window, writer)
        committed = run.write_later(_commit, run, writer)
        unfinished.pop_all()  # from here on `_commit` closes the writer
    return committed


def _run_teacher(run: Run, window: list[Item], writer: ShardWriter) -> None:
    """Run the window's batches. Each item then has a record that is being coded, or the reason why there is none."""
    options, watch = run.options, run.watch
    lengths = {place: len(item.encoded) for place, item in enumerate(window) if item.encoded is not None}
    run.prove(window, batch_tokens=options.batch_tokens)
    coding: list[Future[CodedRecord]] = []
    for places in batches_by_length(lengths, options.batch_tokens):
        batch = [item.encoded for item in (window[place] for place in places) if item.encoded is not None]
        questions = [options.keeps_question(encoded.key) for encoded in batch]
        with watch.timed("teacher"):
            found = run.teacher.states(batch, questions=questions, top_k=options.top_k, draws=options.draws)
        watch.count(samples=len(batch), through=len(batch), tokens=sum(map(len, batch)))
        wait(coding)  # so that the states of at most two batches are in memory
        coding = []
        for place, states in zip(places, found, strict=True):
            item = window[place]
            item.encoded = None  # frees its tensors
            if isinstance(states, SampleError):
                item.problem = states
            else:
                item.coded = run.code.submit(_code, run, writer, item.sample, states)
                coding.append(item.coded)
    watch.count(through=len(window) - len(lengths))


def _code(run: Run, writer: ShardWriter, sample: Any, states: States) -> CodedRecord:
    with run.watch.timed("coding"):
        return writer.code(Record(sample=sample, answer=states.answer, question=states.question))


def _append(run: Run, window: list[Item], writer: ShardWriter) -> None:
    """Append the window's records, or note why there is none."""
    for item in window:
        problem, coded = item.problem, None
        try:
            coded = item.coded.result() if item.coded is not None else None
        except SampleError as error:  # a codec cannot hold its states
            problem = error
        with run.watch.timed("writing"), storage_errors(f"{run.store.url}: shard {writer.shard}"):
            if coded is not None:
                assert isinstance(item.sample, Sample)
                writer.append(coded, [image.read() for image in item.sample.images])
                run.watch.count(**item.notes)
            else:
                writer.skip(item.sample, str(problem))
                run.watch.skip(str(problem))
        run.watch.count(records=1)


def _commit(run: Run, writer: ShardWriter) -> Facts:
    """Put the shard in place, unless another worker has done so in the meantime."""
    store, shard = run.store, writer.shard
    with writer, run.watch.timed("writing"), storage_errors(f"{store.url}: shard {shard}"):
        facts = finished_facts(store, shard, size_of_store(store))
        if facts is None:
            try:
                facts = writer.commit()
            except FileNotFoundError:  # a worker that completed the cache removed the temporary files
                facts = finished_facts(store, shard, size_of_store(store))
                if facts is None:
                    raise
    run.watch.finished(writer.rows, writer.bytes, run.teacher.head.weight.shape[0])
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


def finished_facts(store: Store, shard: int, size_of: SizeOf) -> Facts | None:
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
