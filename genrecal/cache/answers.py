"""The teacher's own answers (`genrecal cache --generate`): written first, a file a shard, and then cached like given ones.

A conversation's answers are written turn by turn. Each follows the teacher's own earlier answers, not the given ones: it is
in that company that its states are cached, and that a student learns it.
"""

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from genrecal.cache.options import CacheOptions
from genrecal.cache.teacher import Teacher
from genrecal.cache.watch import Watch
from genrecal.cache.windows import ReadRecord, Threads, windows
from genrecal.errors import DamageError
from genrecal.samples import BadRecord, ImageRef, Message, Sample
from genrecal.shards.index import READERS
from genrecal.shards.layout import answers_name
from genrecal.shards.manifest import SKIPPED
from genrecal.shards.storage import Store, storage_errors
from genrecal.shards.strict_json import strict_json
from genrecal.shards.vocabulary import Vocabulary, load_vocabulary
from genrecal.token_bytes import SPACE

MOST_FILE_BYTES = 2**30
CHECKED = 1  # how answers were checked as they were written; those of another number are written again
PLACEHOLDER = "a"  # stands for the answer that is asked for


def answer_shard(
    teacher: Teacher,
    samples: Sequence[Sample | BadRecord],
    shard: int,
    store: Store,
    options: CacheOptions,
    *,
    threads: Threads,
    watch: Watch,
) -> dict[str, Any]:
    """Have the teacher write the answers of one shard's conversations, unless that is done; its facts.

    Any worker can do any shard, as in `genrecal.cache.shard.cache_shard`, whose arguments and bounds these are.
    """
    records = options.records(shard, len(samples))
    found = finished_answers(store, [shard])
    if found:
        watch.count(records=len(records), through=len(records))
        return found[shard]
    entries: dict[int, dict[str, Any]] = {}
    turns: dict[int, int] = {}  # of each conversation

    def asked(index: int) -> Sample | BadRecord:
        sample = samples[index]
        if isinstance(sample, BadRecord):
            return sample
        turns[index] = len(sample.answers)
        return up_to_turn(sample, entries[index]["answers"] if index in entries else [])

    through = 0.0  # of these records

    def wrote(count: int) -> None:
        nonlocal through
        share = count * len(turns) / sum(turns.values())  # of a conversation of several turns each is a part
        through += share
        watch.count(answers=count, through=share)

    turn, asking = 0, list(records)
    while asking:
        places = iter(asking)
        for window in windows(teacher, asked, asking, options, threads, watch):
            rendered = [(next(places), item) for item in window]
            # What cannot be rendered says why; the others are written together.
            ready = [(index, item.sample, item.encoded) for index, item in rendered if item.encoded is not None]
            watch.prove(teacher, [(sample, encoded) for _, sample, encoded in ready if isinstance(sample, Sample)])
            written = teacher.write(
                [encoded for _, _, encoded in ready],
                turn=turn,
                how=options.answers,
                batch_tokens=options.batch_tokens,
                wrote=wrote,
            )
            answers = dict(zip([index for index, _, _ in ready], written, strict=True))
            for index, item in rendered:
                answer = answers.get(index, item.result)
                if isinstance(answer, str):
                    entry = entries.setdefault(index, {"key": item.sample.key, "answers": []})
                    entry["answers"].append(answer)
                else:
                    entries[index] = {"key": item.sample.key, "reason": str(answer)}
                    watch.skip(str(answer))
                if "reason" in entries[index] or len(entries[index]["answers"]) == turns[index]:
                    watch.count(records=1)
        turn += 1
        asking = [index for index in asking if "reason" not in entries[index] and turns[index] > turn]
    watch.count(through=len(records) - through)  # what could not be asked
    checked = [entries[index] | {"checked": CHECKED} for index in records]
    lines = [json.dumps(entry, sort_keys=True, ensure_ascii=False) for entry in checked]
    with storage_errors(f"{store.url}: the answers of shard {shard}"):
        store.write(answers_name(shard), "".join(f"{line}\n" for line in lines).encode())
    return _facts(list(entries.values()))


def up_to_turn(sample: Sample, answers: Sequence[str]) -> Sample:
    """The conversation up to the turn after these answers, which stand in the place of the given ones.

    Pictures of later turns are left out. The last answer is a placeholder.
    """
    messages, left = [], [*answers, PLACEHOLDER]
    for message in sample.messages:
        if not left:
            break
        messages.append(message if not message.is_target else Message(role="assistant", parts=(left.pop(0),)))
    images = 1 + max((part.index for m in messages for part in m.parts if isinstance(part, ImageRef)), default=-1)
    return dataclasses.replace(sample, messages=tuple(messages), images=sample.images[:images])


def with_answers(sample: Sample, answers: Sequence[str]) -> Sample:
    """The conversation with these answers in the place of the given ones, which it keeps beside them."""
    left = list(answers)
    messages = tuple(
        Message(role="assistant", parts=(left.pop(0),)) if message.is_target else message for message in sample.messages
    )
    return dataclasses.replace(sample, messages=messages, given_answers=sample.answers)


def answered(samples: Sequence[Sample | BadRecord], shard: int, store: Store, options: CacheOptions) -> ReadRecord:
    """Gives the shard's records with the answers that `answer_shard` wrote. Raises DamageError if it has not."""
    records = options.records(shard, len(samples))
    entries = _read(store, shard)
    if entries is None or len(entries) != len(records):
        raise DamageError(
            f"{store.where(answers_name(shard))}: missing or broken; run `genrecal cache` again, it writes these answers again"
        )

    def read(index: int) -> Sample | BadRecord:
        sample, entry = samples[index], entries[index - records.start]
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


def finished_answers(store: Store, shards: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The facts of those whose answers are written, and are such as the teacher's tokenizer can write."""
    there = store.sizes("answers")
    shards = [shard for shard in shards if answers_name(shard).removeprefix("answers/") in there]
    vocabulary = load_vocabulary(store)[0] if shards else None
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda shard: _read(store, shard), shards)
        return {
            shard: _facts(entries)
            for shard, entries in zip(shards, found, strict=True)
            if entries is not None and not any(_has_marks(entry, vocabulary) for entry in entries)
        }


def _has_marks(entry: dict[str, Any], vocabulary: Vocabulary | None) -> bool:
    """Whether an answer holds what a vocabulary writes for a space, which no text that was decoded does."""
    return vocabulary is not None and SPACE in vocabulary.decoder and SPACE in "".join(entry.get("answers", ()))


def _facts(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": len(entries), SKIPPED: sum("reason" in entry for entry in entries)}


def _read(store: Store, shard: int) -> list[dict[str, Any]] | None:
    """A shard's answers, a record each; None if they are not there, or not whole."""
    try:
        data = store.read(answers_name(shard), 0, MOST_FILE_BYTES + 1)
        entries = [strict_json(line, MOST_FILE_BYTES) for line in data.split(b"\n")[:-1]]
        whole = data.endswith(b"\n") and all(map(_is_entry, entries))
    except (OSError, ValueError):
        return None
    return entries if whole else None


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str) or entry.get("checked") != CHECKED:
        return False
    answers = entry.get("answers")
    if isinstance(entry.get("reason"), str):
        return answers is None
    return isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
