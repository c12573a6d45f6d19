"""Open a cache and read records by byte range, each checked against the checksum that its manifest holds."""

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from genrecal.errors import DamageError, FormatError
from genrecal.samples import ImageSource, Sample
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.head import HEAD_FILE, MAX_HEADER_BYTES, FrozenHead
from genrecal.shards.index import (
    INDEX_FILE,
    READERS,
    index_of,
    read_index,
    read_shard_manifest,
    scan,
)
from genrecal.shards.index import SCHEMA as INDEX_SCHEMA
from genrecal.shards.layout import TIERS, manifest_name, read_cache_json, tar_name, wrong_settings
from genrecal.shards.manifest import CACHED, DIGEST, SCHEMA, SKIPPED
from genrecal.shards.record import AnswerRows, QuestionRows, Record, answer_rows, question_rows, read_table
from genrecal.shards.storage import Store, files_in, open_store
from genrecal.shards.strict_json import strict_json

MAKE_AGAIN = "delete cache.json and the head, and run `genrecal cache` again: finished shards are kept"
MANIFESTS_HELD = 256  # of shards read from lately; a manifest of 256 records takes about 0.2 MB
MAX_CONVERSATION_BYTES = 2**24
MAX_SAMPLE_BYTES = 2**32  # of what is read of a sample at once; 100,000 tokens of D 16384 are 3.3e9 in bf16


class Cache(Sequence["CachedRecord"]):
    """The cached samples of a cache, in input order; skipped ones are in `manifest()` only.

    Opening reads `cache.json` and the index, or the manifests of a cache that is not finished; a record's bytes are read
    when it is asked for them. `path` may be a directory or any fsspec URL.
    Raises FormatError for what is no cache or of a version or codec that is not known, DamageError for manifests that
    cannot be read or are missing from a cache that says it is complete.
    """

    def __init__(self, path: "str | os.PathLike[str] | Store"):
        self.store = open_store(path)
        self.path = self.store.url
        self.description = read_cache_json(self.store)
        for name, expected in wrong_settings(self.description).items():
            raise FormatError(
                f"{self.path}: {name} in cache.json: expected {expected}, got {self.description.get(name)!r}"
            )
        self.shards = [shard for shard, _ in sorted(files_in(self.store, "manifest", ".parquet"))]
        if self.shards and self.shards[-1] >= self.num_shards:
            raise DamageError(
                f"{self.store.where(manifest_name(self.shards[-1]))}: expected {self.num_shards} shards by cache.json, "
                "got one of this number; `genrecal verify` says more"
            )
        missing = self.num_shards - len(self.shards)
        complete = "totals" in self.description
        if missing and complete:
            there = set(self.shards)
            first = next(shard for shard in range(self.num_shards) if shard not in there)
            raise DamageError(
                f"{self.store.where(manifest_name(first))}: missing, of a cache that says it is complete "
                f"({missing} of {self.num_shards} manifests); run `genrecal cache` again, it redoes those shards"
            )
        try:
            has_index = complete and self.store.exists(INDEX_FILE)
        except OSError as error:
            raise DamageError(f"{self.store.where(INDEX_FILE)}: {error.strerror or error}; delete it") from None
        self._index = (
            read_index(self.store, num_shards=self.num_shards, num_samples=int(self.description["num_samples"]))
            if has_index
            else index_of(scan(self.store, self.shards))
        )
        self._manifest_of = lru_cache(maxsize=MANIFESTS_HELD)(self._read_manifest)

    def __repr__(self) -> str:
        return f"Cache({self.path!r}, {len(self)} samples, {len(self.shards)} of {self.num_shards} shards)"

    def _read_manifest(self, shard: int) -> "ShardManifest":
        """A shard's manifest, which must be the one that the index was made from."""
        table, facts = read_shard_manifest(self.store, shard)
        expected, got = (self._index.digests[shard], self._index.count(shard)), (str(facts.get(DIGEST)), len(table))
        if expected != got:
            raise DamageError(
                f"{self.store.where(manifest_name(shard))}: expected {DIGEST} and rows {expected} by {INDEX_FILE}, got {got}; "
                "`genrecal verify` says which is wrong"
            )
        return ShardManifest(table, facts)

    @property
    def num_shards(self) -> int:
        """Shards of the whole plan, finished or not."""
        return int(self.description["num_shards"])

    @property
    def input_rows(self) -> np.ndarray:
        """int64 `[n]`: the place of each sample in the data."""
        return self._index.rows

    @property
    def is_complete(self) -> bool:
        return len(self.shards) == self.num_shards

    @property
    def hidden_size(self) -> int:
        """D of the teacher."""
        return int(self.description["hidden_size"])

    @property
    def has_states(self) -> bool:
        """Whether the teacher's answer states are stored, and its head beside them."""
        return bool(self.description["answer_codec"] != "none")

    @property
    def draws(self) -> int:
        """Draws a row of the sampled targets; 0 if there are none."""
        return int(self.description["sampled_targets"])

    @property
    def answers(self) -> AnswerSource:
        """Whose answers these are: the data's, or the teacher's own."""
        return AnswerSource.from_json(self.description["answers"])

    def manifests(self) -> Iterator["ShardManifest"]:
        """The finished shards' manifests, one after another; memory does not grow with their number."""
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(self.shards), READERS):
                yield from pool.map(self._read_manifest, self.shards[start : start + READERS])

    def manifest(self) -> pa.Table:
        """One row per input sample, skipped ones too; see `genrecal.shards.manifest.SCHEMA`. Reads every manifest.

        The whole table is in memory: about 0.5 kB per row. `manifests` gives it shard by shard.
        """
        return pa.concat_tables([SCHEMA.empty_table(), *(manifest.table for manifest in self.manifests())])

    @property
    def cached(self) -> pa.Table:
        """The manifests' rows of this sequence, row i being record i, all in memory."""
        table = self.manifest()
        return table.filter(pc.equal(table.column("status"), CACHED))

    @cached_property
    def shard_facts(self) -> dict[int, dict[str, Any]]:
        """Each finished shard's facts, such as its codecs' fidelity. Reads every manifest."""
        return {manifest.facts["shard"]: manifest.facts for manifest in self.manifests()}

    def skipped(self) -> Iterator[str]:
        """The reasons of the input records that were skipped, in input order."""
        for manifest in self.manifests():
            if manifest.facts[SKIPPED]:
                rows = pc.equal(manifest.table.column("status"), SKIPPED)
                yield from manifest.table.column("reason").filter(rows).to_pylist()

    def arrow_column(self, name: str) -> pa.ChunkedArray:
        """A manifest column over the cached samples; from the index, if it holds that column."""
        if name in INDEX_SCHEMA.names:
            return self._index.column(name).take(pa.array(self._index.rows))
        return self.cached.column(name)

    def column(self, name: str) -> np.ndarray:
        """The same as numpy."""
        column = self.arrow_column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(pa.string())
        return np.asarray(column.to_numpy())

    def head(self, device: str = "cpu") -> FrozenHead:
        """The teacher's frozen head.

        Raises FormatError for a cache without states, DamageError if the file is not the one the cache was made with.
        """
        if not self.has_states:
            raise FormatError(f"{self.path}: no head: the cache holds targets only (`genrecal cache --store targets`)")
        path = self.store.where(HEAD_FILE)
        teacher = self.description.get("teacher")
        expected = teacher.get("head_sha256") if isinstance(teacher, dict) else None
        most = 4 * self.description["head_rows"] * (self.hidden_size + 1) + MAX_HEADER_BYTES
        try:
            if (size := self.store.size(HEAD_FILE)) > most:
                raise DamageError(f"{path}: expected at most {most} bytes, by cache.json, got {size}; {MAKE_AGAIN}")
            file = self.store.local_copy(HEAD_FILE, str(expected))
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise DamageError(f"{path}: {error.strerror or error}; {MAKE_AGAIN}") from None
        if digest != expected:
            raise DamageError(f"{path}: expected sha256 {expected}, got {digest}; {MAKE_AGAIN}")
        head = FrozenHead.load(file, device)
        expected_shape = [self.description["head_rows"], self.hidden_size]
        if list(head.weight.shape) != expected_shape:
            raise DamageError(
                f"{path}: expected a weight of {expected_shape} by cache.json, got {list(head.weight.shape)}; {MAKE_AGAIN}"
            )
        return head

    def __len__(self) -> int:
        return len(self._index.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        shard, place = self._index.place(int(self._index.rows[index]))
        return CachedRecord(self, self._manifest_of(shard).row(place))

    def __iter__(self) -> Iterator["CachedRecord"]:
        return (self[i] for i in range(len(self)))

    def row_of(self, key: str) -> dict[str, Any] | None:
        """The manifest row of an input record, cached or skipped; None if no finished shard has the key."""
        for shard in self._shards_of_key(key):
            manifest = self._manifest_of(shard)
            found = pc.index(manifest.table.column("key"), key).as_py()
            if found >= 0:
                return manifest.row(found)
        return None

    def by_key(self, key: str) -> "CachedRecord":
        """The record of that key. Raises FormatError if there is none, with the reason if it was skipped."""
        row = self.row_of(key)
        if row is None:
            raise FormatError(f"{self.path}: no sample has the key {key!r}")
        if row["status"] == SKIPPED:
            raise FormatError(f"{self.path}: sample {key} was skipped: {row['reason']}")
        return CachedRecord(self, row)

    def _shards_of_key(self, key: str) -> list[int]:
        """The shard where a key must be: a key begins with its record's number in the input, and these ascend."""

        def number(key: str) -> int:
            digits = key.split("-", 1)[0]
            return int(digits) if digits.isdecimal() and len(digits) < 20 else -1

        def begins(shard: int) -> int:
            keys = self._manifest_of(shard).table.column("key")
            return number(keys[0].as_py()) if len(keys) else -1

        after = bisect.bisect_right(self.shards, number(key), key=begins)
        return self.shards[max(after - 1, 0) : after]


@dataclass(frozen=True)
class ShardManifest:
    """A shard's manifest: its rows, and the shard's facts."""

    table: pa.Table
    facts: dict[str, Any]

    @property
    def cached(self) -> pa.Table:
        """The rows of cached samples."""
        return self.table.filter(pc.equal(self.table.column("status"), CACHED))

    def row(self, place: int) -> dict[str, Any]:
        """One row as a dictionary."""
        row: dict[str, Any] = self.table.slice(place, 1).to_pylist()[0]
        return row


@dataclass(frozen=True, repr=False)
class CachedRecord:
    """One sample of a cache; every property reads what it needs from disk, and no more.

    `row` is its manifest row; `of` stands before the key of its sample, where records of several caches meet.
    """

    cache: Cache
    row: dict[str, Any]
    of: str = ""

    def __repr__(self) -> str:
        row = self.row
        return f"CachedRecord({self.key!r}, {row['turns']} turns, {row['images']} images, {row['answer_tokens']} answer tokens)"

    @property
    def key(self) -> str:
        return str(self.row["key"])

    @property
    def has_question(self) -> bool:
        return bool(self.row["has_question"])

    @property
    def images(self) -> list[bytes]:
        """The images' original bytes."""
        return [bytes(data) for data in self._read(self._image_members)]

    @property
    def sample(self) -> Sample:
        """The conversation, its images in memory."""
        members = [self._member(".json"), *self._image_members]
        return self._sample(members, self._read(members))

    def _sample(self, members: list[dict[str, Any]], parts: list[memoryview]) -> Sample:
        images = [
            ImageSource(data=bytes(data), suffix=member["name"].rpartition(".")[2])
            for member, data in zip(members[1:], parts[1:], strict=True)
        ]
        try:
            key = f"{self.of}/{self.key}" if self.of else self.key
            sample = Sample.from_json(key, strict_json(parts[0], MAX_CONVERSATION_BYTES), images)
            if any(index >= len(images) for index in sample.image_indices):
                raise ValueError(f"it names images {sample.image_indices}, of {len(images)}")
            return sample
        except (ValueError, KeyError, TypeError) as error:
            raise DamageError(f"{self._where(members[0])}: not a conversation: {error!r}") from None

    @property
    def answer(self) -> pa.Table:
        """The answer rows as they are stored."""
        return self._table(self._member(".answer.arrow"))

    @property
    def question(self) -> pa.Table | None:
        """The question rows as they are stored; None if this sample's were not cached."""
        return self._table(self._member(".question.arrow")) if self.has_question else None

    def _table(self, member: dict[str, Any]) -> pa.Table:
        return read_table(self._read([member])[0], where=self._where(member))

    def answer_rows(self) -> AnswerRows:
        """The answer rows, their states coded."""
        member = self._member(".answer.arrow")
        return answer_rows(self._table(member), where=self._where(member))

    def question_rows(self) -> QuestionRows | None:
        """The question rows, their states coded; None if this sample's were not cached."""
        if not self.has_question:
            return None
        member = self._member(".question.arrow")
        return question_rows(self._table(member), where=self._where(member))

    def hidden(self) -> np.ndarray:
        """float32 `[R, D]`: the teacher's states over the answer rows, decoded. Raises FormatError if none are stored."""
        return self.answer_rows().hidden

    def question_hidden(self) -> np.ndarray | None:
        """float32 `[R, D]`: the teacher's states over the question rows; None if this sample's were not cached."""
        rows = self.question_rows()
        return None if rows is None else rows.hidden

    def record(self, *, question: bool = True, states: bool = True) -> Record:
        """Everything, the samples tier in one read; without the question tier or the states where an argument is False."""
        members = [self._member(".json"), *self._image_members]
        answer = self._member(".answer.arrow")
        *parts, data = self._read([*members, answer])
        where = self._where(answer)
        return Record(
            sample=self._sample(members, parts),
            answer=answer_rows(read_table(data, where=where, states=states), where=where, states=states),
            question=self.question_rows() if question else None,
        )

    def read(self, member: dict[str, Any]) -> bytes:
        """A member's bytes. Raises DamageError if they are not what the manifest says."""
        return bytes(self._read([member])[0])

    def _read(self, members: list[dict[str, Any]]) -> list[memoryview]:
        """Bytes of members that stand one after another in a tar, in one read.

        Raises DamageError if they are not what the manifest says; nothing is read for places that no tar could have.
        """
        if not members:
            return []
        places = [(member["offset"], member["offset"] + member["size"]) for member in members]
        start, end = places[0][0], places[-1][1]
        flat = [0, *itertools.chain.from_iterable(places)]
        if flat != sorted(flat) or end - start > MAX_SAMPLE_BYTES or len({member["tier"] for member in members}) > 1:
            raise DamageError(
                f"{self._manifest}: from member {members[0]['name']} on: expected members one after another, of "
                f"{MAX_SAMPLE_BYTES} bytes in all, got {places}; `genrecal verify` says more"
            )
        tar = self._tar(members[0])
        try:
            data = memoryview(self.cache.store.read(tar, start, end - start))
        except OSError as error:
            raise DamageError(
                f"{self.cache.store.where(tar)}: {error.strerror or error}; the manifest lists it with sample {self.key}"
            ) from None
        parts = [data[first - start : last - start] for first, last in places]
        for member, part in zip(members, parts, strict=True):
            digest = xxhash.xxh3_64_intdigest(part)
            if len(part) != member["size"] or digest != member["xxh3"]:
                raise DamageError(
                    f"{self._where(member)} at byte {member['offset']}: expected {member['size']} bytes of xxh3 "
                    f"{member['xxh3']:016x}, got {len(part)} bytes of {digest:016x}; "
                    f"delete {self._manifest} and run `genrecal cache` again to redo it"
                )
        return parts

    @property
    def _image_members(self) -> list[dict[str, Any]]:
        others = [self.key + suffix for suffix in (".json", ".answer.arrow", ".question.arrow")]
        members = [member for member in self.row["members"] if member["name"] not in others]
        names = [member["name"] for member in members]
        if len(names) != self.row["images"] or not all(
            name.startswith(f"{self.key}.{number}.") and "/" not in name for number, name in enumerate(names)
        ):
            raise DamageError(
                f"{self._manifest}: sample {self.key}: expected {self.row['images']} "
                f"images as its other members, got {names}"
            )
        return members

    def _member(self, suffix: str) -> dict[str, Any]:
        for member in self.row["members"]:
            if member["name"] == self.key + suffix:
                found: dict[str, Any] = member
                return found
        raise DamageError(f"{self._manifest}: sample {self.key} has no member {self.key}{suffix}")

    def _tar(self, member: dict[str, Any]) -> str:
        if member["tier"] not in TIERS:
            raise DamageError(
                f"{self._manifest}: member {member['name']}: expected a tier of {', '.join(TIERS)}, got {member['tier']!r}"
            )
        return tar_name(member["tier"], self.row["shard"])

    def _where(self, member: dict[str, Any]) -> str:
        return f"{self.cache.store.where(self._tar(member))}: member {member['name']}"

    @property
    def _manifest(self) -> str:
        return self.cache.store.where(manifest_name(self.row["shard"]))


def open_cache(path: "str | os.PathLike[str] | Store") -> Cache:
    """Open a cache, a directory or any fsspec URL, as a sequence of records."""
    return Cache(path)
