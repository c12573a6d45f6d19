"""Open a cache and read records by byte range, each checked against the checksum that its manifest holds."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from genrecal.errors import DamageError, FormatError
from genrecal.samples import ImageSource, Sample
from genrecal.shards.head import HEAD_FILE, FrozenHead
from genrecal.shards.layout import FORMAT_VERSION, TEACHER_FOLDER, TIERS, manifest_path, read_cache_json, tar_path
from genrecal.shards.manifest import CACHED, SCHEMA, SKIPPED, read_manifest
from genrecal.shards.record import AnswerRows, QuestionRows, Record, answer_rows, question_rows, read_table

MAKE_AGAIN = "delete cache.json and the head, and run `genrecal cache` again: finished shards are kept"


class Cache(Sequence["CachedRecord"]):
    """The cached samples of a cache directory, in input order; skipped ones are in `manifest()` only.

    Opening reads `cache.json` and the manifests; a record's bytes are read when it is asked for them.
    Raises FormatError for a directory that is no cache or of a version or codec that is not known, DamageError for
    manifests that cannot be read or are missing from a cache that says it is complete.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.description = read_cache_json(self.path)
        for name in ("num_shards", "hidden_size"):
            if type(self.description.get(name)) is not int or self.description[name] < 0:
                raise FormatError(
                    f"{self.path}: {name} in cache.json: expected a number, got {self.description.get(name)!r}"
                )
        files = {int(file.stem): file for file in self.path.glob("manifest/[0-9]*.parquet") if file.stem.isdecimal()}
        self.shards = sorted(files)
        if self.shards and self.shards[-1] >= self.num_shards:
            raise DamageError(
                f"{files[self.shards[-1]]}: expected {self.num_shards} shards by cache.json, got one of this number; "
                "`genrecal verify` says more"
            )
        missing = self.num_shards - len(self.shards)
        if missing and "totals" in self.description:
            first = next(shard for shard in range(self.num_shards) if shard not in files)
            raise DamageError(
                f"{manifest_path(self.path, first)}: missing, of a cache that says it is complete "
                f"({missing} of {self.num_shards} manifests); run `genrecal cache` again, it redoes those shards"
            )
        parts = [read_manifest(files[shard]) for shard in self.shards]
        self.shard_facts = {shard: facts for shard, (_, facts) in zip(self.shards, parts, strict=True)}
        for shard, facts in self.shard_facts.items():
            if facts["format_version"] != FORMAT_VERSION:
                raise FormatError(
                    f"{files[shard]}: format version {facts['format_version']!r}; "
                    f"this genrecal reads version {FORMAT_VERSION}"
                )
            if facts["shard"] != shard:
                raise DamageError(
                    f"{files[shard]}: expected the manifest of shard {shard}, got that of shard {facts['shard']}; "
                    "delete it and run `genrecal cache` again"
                )
        tables = [table for table, _ in parts]
        self._manifest = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        status = np.asarray(self._manifest.column("status").to_numpy(zero_copy_only=False))
        self._rows = np.flatnonzero(status == CACHED)

    @property
    def num_shards(self) -> int:
        """Shards of the whole plan, finished or not."""
        return int(self.description["num_shards"])

    @property
    def is_complete(self) -> bool:
        return len(self.shards) == self.num_shards

    @property
    def hidden_size(self) -> int:
        """D of the teacher."""
        return int(self.description["hidden_size"])

    @property
    def teacher_folder(self) -> Path:
        """The teacher's config, tokenizer and processor files."""
        return self.path / TEACHER_FOLDER

    def manifest(self) -> pa.Table:
        """One row per input sample, skipped ones too; see `genrecal.shards.manifest.SCHEMA`."""
        return self._manifest

    @cached_property
    def cached(self) -> pa.Table:
        """The manifest's rows of this sequence, row i being record i."""
        return self._manifest.take(pa.array(self._rows))

    def column(self, name: str) -> np.ndarray:
        """A manifest column over the cached samples, as numpy."""
        return np.asarray(self.cached.column(name).to_numpy(zero_copy_only=False))

    def head(self, device: str = "cpu") -> FrozenHead:
        """The teacher's frozen head. Raises DamageError if the file is not the one the cache was made with."""
        path = self.path / HEAD_FILE
        teacher = self.description.get("teacher")
        expected = teacher.get("head_sha256") if isinstance(teacher, dict) else None
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamageError(f"{path}: {error.strerror}; {MAKE_AGAIN}") from None
        if digest != expected:
            raise DamageError(f"{path}: expected sha256 {expected}, got {digest}; {MAKE_AGAIN}")
        return FrozenHead.load(self.path, device)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = int(self._rows[index])
        return CachedRecord(self, self._manifest.slice(row, 1).to_pylist()[0])

    def __iter__(self) -> Iterator["CachedRecord"]:
        return (self[i] for i in range(len(self)))

    def by_key(self, key: str) -> "CachedRecord":
        """The record of that key. Raises FormatError if there is none, with the reason if it was skipped."""
        rows = np.flatnonzero(np.asarray(self._manifest.column("key").to_numpy(zero_copy_only=False)) == key)
        if not len(rows):
            raise FormatError(f"{self.path}: no sample has the key {key!r}")
        row = self._manifest.slice(int(rows[0]), 1).to_pylist()[0]
        if row["status"] == SKIPPED:
            raise FormatError(f"{self.path}: sample {key} was skipped: {row['reason']}")
        return CachedRecord(self, row)


@dataclass(frozen=True)
class CachedRecord:
    """One sample of a cache; every property reads what it needs from disk, and no more.

    `row` is its manifest row as a dict.
    """

    cache: Cache
    row: dict[str, Any]

    @property
    def key(self) -> str:
        return str(self.row["key"])

    @property
    def has_question(self) -> bool:
        return bool(self.row["has_question"])

    @property
    def images(self) -> list[bytes]:
        """The pictures' original bytes."""
        return [self.read(member) for member in self._image_members]

    @property
    def sample(self) -> Sample:
        """The conversation, its pictures in memory."""
        member = self._member(".json")
        images = [
            ImageSource(data=self.read(image), suffix=image["name"].rpartition(".")[2]) for image in self._image_members
        ]
        try:
            return Sample.from_json(self.key, json.loads(self.read(member)), images)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, DamageError):
                raise
            raise DamageError(f"{self._where(member)}: not a conversation: {error!r}") from None

    @property
    def answer(self) -> pa.Table:
        """The answer rows as they are stored."""
        member = self._member(".answer.arrow")
        return read_table(self.read(member), where=self._where(member))

    @property
    def question(self) -> pa.Table | None:
        """The question rows as they are stored; None if this sample's were not cached."""
        if not self.has_question:
            return None
        member = self._member(".question.arrow")
        return read_table(self.read(member), where=self._where(member))

    def answer_rows(self) -> AnswerRows:
        """The answer rows, decoded."""
        return answer_rows(self.answer, where=self._where(self._member(".answer.arrow")))

    def question_rows(self) -> QuestionRows | None:
        """The question rows, decoded; None if this sample's were not cached."""
        table = self.question
        return None if table is None else question_rows(table, where=self._where(self._member(".question.arrow")))

    def hidden(self) -> np.ndarray:
        """float32 `[R, D]`: the teacher's states over the answer rows."""
        return self.answer_rows().hidden

    def question_hidden(self) -> np.ndarray | None:
        """float32 `[R, D]`: the teacher's states over the question rows; None if this sample's were not cached."""
        rows = self.question_rows()
        return None if rows is None else rows.hidden

    def record(self, *, question: bool = True) -> Record:
        """Everything, decoded; without the question tier's bytes being read if `question` is False."""
        return Record(
            sample=self.sample, answer=self.answer_rows(), question=self.question_rows() if question else None
        )

    def read(self, member: dict[str, Any]) -> bytes:
        """A member's bytes. Raises DamageError if they are not what the manifest says."""
        if member["tier"] not in TIERS:
            raise DamageError(
                f"{manifest_path(self.cache.path, self.row['shard'])}: member {member['name']}: expected a tier of "
                f"{', '.join(TIERS)}, got {member['tier']!r}"
            )
        path = tar_path(self.cache.path, member["tier"], self.row["shard"])
        try:
            status = path.stat()
            there = 0 <= member["offset"] <= member["offset"] + member["size"] <= status.st_size
            size = member["size"] if there else 0
            file = _open(str(path), status.st_ino, status.st_mtime_ns)
            data = os.pread(file.fileno(), size, member["offset"] if there else 0)
        except OSError as error:
            raise DamageError(f"{path}: {error.strerror}; the manifest lists it with sample {self.key}") from None
        if len(data) != member["size"] or xxhash.xxh3_64_intdigest(data) != member["xxh3"]:
            raise DamageError(
                f"{path}: member {member['name']} at byte {member['offset']}: expected {member['size']} bytes of xxh3 "
                f"{member['xxh3']:016x}, got {len(data)} bytes of {xxhash.xxh3_64_intdigest(data):016x}; "
                f"delete {manifest_path(self.cache.path, self.row['shard'])} and run `genrecal cache` again to redo it"
            )
        return data

    @property
    def _image_members(self) -> list[dict[str, Any]]:
        others = [self.key + suffix for suffix in (".json", ".answer.arrow", ".question.arrow")]
        members = [member for member in self.row["members"] if member["name"] not in others]
        names = [member["name"] for member in members]
        if len(names) != self.row["images"] or not all(
            name.startswith(f"{self.key}.{number}.") and "/" not in name for number, name in enumerate(names)
        ):
            raise DamageError(
                f"{manifest_path(self.cache.path, self.row['shard'])}: sample {self.key}: expected {self.row['images']} "
                f"images as its other members, got {names}"
            )
        return members

    def _member(self, suffix: str) -> dict[str, Any]:
        name = self.key + suffix
        for member in self.row["members"]:
            if member["name"] == name:
                return dict(member)
        raise DamageError(
            f"{manifest_path(self.cache.path, self.row['shard'])}: sample {self.key} has no member {name}"
        )

    def _where(self, member: dict[str, Any]) -> str:
        return f"{tar_path(self.cache.path, member['tier'], self.row['shard'])}: member {member['name']}"


@lru_cache(maxsize=64)
def _open(path: str, inode: int, modified: int) -> BinaryIO:
    """The few most recent tars stay open: a shuffling window touches only that many.

    A file that was replaced under its name has another inode or time, and is opened anew.
    """
    return open(path, "rb", buffering=0)


def open_cache(path: str | Path) -> Cache:
    """Open a cache directory as a sequence of records."""
    return Cache(path)
