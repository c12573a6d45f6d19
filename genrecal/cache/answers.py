"""The teacher's own answers (`genrecal cache --generate`): written first, one file per shard, then cached like given ones.

A conversation's answers are written turn by turn. Each follows the teacher's own earlier answers, not the given ones, as
it does when its states are cached and when a student learns it.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from genrecal.cache.shard import Facts
from genrecal.cache.windows import Item, ReadRecord, Run
from genrecal.errors import DamageError
from genrecal.samples import BadRecord, ImageRef, Message, Sample
from genrecal.shards.index import READERS
from genrecal.shards.layout import answers_name
from genrecal.shards.manifest import SKIPPED
from genrecal.shards.storage import Store, storage_errors
from genrecal.shards.strict_json import strict_json

MAX_FILE_BYTES = 2**30
PLACEHOLDER = "a"  # in place of the answer that the teacher is to write


def answer_shard(run: Run, shard: int, windows: Iterator[list[Item]]) -> "Future[Facts]":
    """Have the teacher write the answers of one shard's conversations. The future gives its facts once they are stored.

    Any worker can do any shard, as in `genrecal.cache.shard.cache_shard`.

    Args:
        windows: the conversations up to their first turn, as `first_turns` gives them.
    """
    options, watch = run.options, run.watch
    entries: dict[int, dict[str, Any]] = {}
    turn = 0

    def wrote(count: int) -> None:
        watch.count(answers=count, through=count if turn == 0 else 0)

    while True:
        left = []  # conversations with a further turn
        for window in windows:
            run.prove(window)
            ready = [item.encoded for item in window if item.encoded is not None]
            with watch.timed("teacher"):
                written = run.teacher.write(
                    ready, turn=turn, how=options.answers, batch_tokens=options.batch_tokens, wrote=wrote
                )
            if turn == 0:
                watch.count(through=len(window) - len(ready))
            answers = iter(written)
            for item in window:
                answer = next(answers) if item.encoded is not None else item.problem
                entry = entries.setdefault(item.index, {"key": item.sample.key, "answers": []})
                if not isinstance(answer, str):
                    del entry["answers"]
                    entry["reason"] = str(answer)
                    watch.skip(str(answer))
                else:
                    entry["answers"].append(answer)
                    given = run.samples[item.index]
                    if isinstance(given, Sample) and turn + 1 < len(given.answers):
                        left.append(item.index)
                        continue
                watch.count(records=1)
        if not left:
            return run.write_later(_store_answers, run, shard, [entries[index] for index in run.records(shard)])
        turn += 1
        windows = run.windows(left, lambda index: up_to_turn(run.samples[index], entries[index]["answers"]))


def _store_answers(run: Run, shard: int, entries: list[dict[str, Any]]) -> Facts:
    lines = [json.dumps(entry, sort_keys=True, ensure_ascii=False) for entry in entries]
    with storage_errors(f"{run.store.url}: the answers of shard {shard}"):
        run.store.write(answers_name(shard), "".join(f"{line}\n" for line in lines).encode())
    return _facts(entries)


def first_turns(run: Run, shard: int) -> ReadRecord:
    """Gives a shard's conversations up to their first turn."""
    return lambda index: up_to_turn(run.samples[index], ())


def up_to_turn(sample: Sample | BadRecord, answers: Sequence[str]) -> Sample | BadRecord:
    """The conversation up to the turn after these answers, which replace the given ones.

    Images of later turns are left out. The last answer is a placeholder.
    """
    if isinstance(sample, BadRecord):
        return sample
    messages, left = [], [*answers, PLACEHOLDER]
    for message in sample.messages:
        if not left:
            break
        messages.append(message if not message.is_target else Message(role="assistant", parts=(left.pop(0),)))
    images = 1 + max((part.index for m in messages for part in m.parts if isinstance(part, ImageRef)), default=-1)
    return dataclasses.replace(sample, messages=tuple(messages), images=sample.images[:images])


def with_answers(sample: Sample, answers: Sequence[str]) -> Sample:
    """The conversation with these answers in place of the given ones, which are kept beside it."""
    left = list(answers)
    messages = tuple(
        Message(role="assistant", parts=(left.pop(0),)) if message.is_target else message for message in sample.messages
    )
    return dataclasses.replace(sample, messages=messages, given_answers=sample.answers)


def answered(run: Run, shard: int) -> ReadRecord:
    """Gives a shard's records with the answers that `answer_shard` wrote. Raises DamageError if it has not."""
    if not run.options.answers.written_by_teacher:
        return run.samples.__getitem__
    store, records = run.store, run.records(shard)
    entries = _read(store, shard)
    if entries is None or len(entries) != len(records):
        raise DamageError(
            f"{store.where(answers_name(shard))}: missing or broken; run `genrecal cache` again to write these answers again"
        )

    def read(index: int) -> Sample | BadRecord:
        sample, entry = run.samples[index], entries[index - records.start]
        if sample.key != entry["key"]:
            raise DamageError(
                f"{store.where(answers_name(shard))}: expected the answers of {sample.key}, got those of {entry['key']}; "
                "delete it and run `genrecal cache` again"
            )
        if isinstance(sample, BadRecord):
            return sample
        if "reason" in entry:
            names = ("key", "sample_id", "location", "category", "source")
            return BadRecord(reason=entry["reason"], **{name: getattr(sample, name) for name in names})
        return with_answers(sample, entry["answers"])

    return read


def finished_answers(store: Store, shards: Sequence[int]) -> dict[int, Facts]:
    """The facts of those shards whose answers are written."""
    there = store.sizes("answers")
    shards = [shard for shard in shards if answers_name(shard).removeprefix("answers/") in there]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda shard: _read(store, shard), shards)
        return {shard: _facts(entries) for shard, entries in zip(shards, found, strict=True) if entries is not None}


def _facts(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": len(entries), SKIPPED: sum("reason" in entry for entry in entries)}


def _read(store: Store, shard: int) -> list[dict[str, Any]] | None:
    """A shard's answers, a record each; None if they are not there, or not whole."""
    try:
        data = store.read(answers_name(shard), 0, MAX_FILE_BYTES + 1)
        entries = [strict_json(line, MAX_FILE_BYTES) for line in data.split(b"\n")[:-1]]
        whole = data.endswith(b"\n") and all(map(_is_entry, entries))
    except (OSError, ValueError):
        return None
    return entries if whole else None


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        return False
    answers = entry.get("answers")
    if isinstance(entry.get("reason"), str):
        return answers is None
    return isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
