"""The manifest: one Parquet file a shard, one row an input sample. Its existence is the commit mark of the shard."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from genrecal.errors import DamageError

CACHED, SKIPPED = "cached", "skipped"
METADATA_KEY = b"genrecal"

MEMBER = pa.struct(
    [
        ("name", pa.string()),
        ("tier", pa.string()),  # samples or questions
        ("offset", pa.int64()),  # of the member's first byte in its tar
        ("size", pa.int64()),
        ("xxh3", pa.uint64()),  # xxh3-64 of the member's bytes
    ]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("sample_id", pa.string()),
        ("status", pa.string()),  # cached or skipped
        ("reason", pa.string()),  # why skipped, with the file and line
        ("shard", pa.int32()),
        ("members", pa.list_(MEMBER)),
        ("category", pa.string()),
        ("source", pa.string()),
        ("turns", pa.int32()),
        ("images", pa.int32()),
        ("question_tokens", pa.int32()),  # the teacher's
        ("answer_tokens", pa.int32()),  # the teacher's, end-of-turn tokens included; = rows that have a target
        ("entropy", pa.float32()),  # mean over rows with a target, nats; the tail beyond the top k counted as one token
        ("log_prob", pa.float32()),  # mean log-probability of the given answer's tokens, nats
        ("top1_agreement", pa.float32()),  # share of rows whose most probable token is the given one
        ("has_question", pa.bool_()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where one file of a sample stands in its shard's tar."""

    name: str
    tier: str
    offset: int
    size: int
    xxh3: int


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One input sample; see SCHEMA for the columns' meaning. A skipped one has no members and null measurements."""

    key: str
    sample_id: str
    status: str
    reason: str | None = None
    shard: int
    members: list[Member] = field(default_factory=list)
    category: str = ""
    source: str = ""
    turns: int | None = None
    images: int | None = None
    question_tokens: int | None = None
    answer_tokens: int | None = None
    entropy: float | None = None
    log_prob: float | None = None
    top1_agreement: float | None = None
    has_question: bool | None = None


def manifest_bytes(rows: Sequence[ManifestRow], shard_facts: dict[str, Any]) -> bytes:
    """The Parquet file of one shard, with shard-level facts in its metadata. The same rows give the same bytes."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(shard_facts, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_manifest(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """One shard's table and its shard-level facts. Raises DamageError if it cannot be read."""
    try:
        table = pq.read_table(path)
        facts = json.loads((table.schema.metadata or {})[METADATA_KEY])
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DamageError(
            f"{path}: not a readable manifest: {error}; delete it and run `genrecal cache` again"
        ) from None
    return table, facts
