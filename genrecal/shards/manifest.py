"""The manifest: one Parquet file a shard, one row an input sample. Its existence is the commit mark of the shard."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genrecal.errors import DamageError
from genrecal.shards.layout import DIGEST as DIGEST
from genrecal.shards.layout import FORMAT_VERSION, TIERS, json_digest
from genrecal.shards.strict_json import strict_json

CACHED, SKIPPED = "cached", "skipped"
METADATA_KEY = b"genrecal"
MAX_FACTS_BYTES = 2**20
READ_ERRORS = (
    OSError, LookupError, ValueError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError,
    pa.ArrowException,
)  # fmt: skip

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
    facts = shard_facts | {DIGEST: content_digest(table, shard_facts)}
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(facts, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def content_digest(table: pa.Table, facts: dict[str, Any]) -> str:
    """XXH3-64, in hex, of all that a manifest says: its facts and its rows as JSON with sorted keys."""
    said = [{name: value for name, value in facts.items() if name != DIGEST}, table.select(SCHEMA.names).to_pylist()]
    return json_digest(said)


def read_manifest(data: bytes, *, where: str) -> tuple[pa.Table, dict[str, Any]]:
    """One shard's table and its shard-level facts, from the file's bytes.

    Raises DamageError if it cannot be read, or is no manifest. Pages are checked against their checksums. The facts
    are those of this format version, or of one whose `format_version` says so.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as opened:
            facts = strict_json((opened.metadata.metadata or {})[METADATA_KEY], MAX_FACTS_BYTES)
            table = opened.read(SCHEMA.names).cast(SCHEMA).replace_schema_metadata(None)
        table.validate(full=True)
        _check_facts(facts, table)
    except READ_ERRORS as error:
        raise DamageError(
            f"{where}: not a readable manifest: {error}; delete it and run `genrecal cache` again"
        ) from None
    return table, facts


def _check_facts(facts: Any, table: pa.Table) -> None:
    """Raises ValueError or TypeError for facts that do not fit the table, and for nulls where there are none."""
    if not isinstance(facts, dict):
        raise TypeError(f"its metadata is {facts!r}, not an object")
    if facts["format_version"] != FORMAT_VERSION:
        return
    for names, kind in ((("shard", "rows", "cached", "skipped"), int), (("codecs", "sha256"), dict)):
        for name in names:
            if type(facts[name]) is not kind:
                raise TypeError(f"{name} is {facts[name]!r}, not of type {kind.__name__}")
    numbers = {f"not_read {name!r}": count for name, count in facts.get("not_read", {}).items()}
    for tier, cost in facts.get("fidelity", {}).items():
        numbers |= {
            f"fidelity of {tier}: {name}": cost[name] for name in ("rows", "kl_mean", "kl_p99", "top1_agreement")
        }
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}, not a number of 0 or more")
    if facts["rows"] != len(table):
        raise ValueError(f"expected {facts['rows']} rows, got {len(table)}")
    members = table.column("members").combine_chunks().flatten()
    columns = {name: table.column(name) for name in ("key", "status", "shard", "members")}
    cached = table.filter(pc.equal(table.column("status"), CACHED))
    columns |= {f"{name} of cached samples": cached.column(name) for name in SCHEMA.names if name != "reason"}
    for name, column in (columns | {f"members.{part.name}": members.field(part.name) for part in MEMBER}).items():
        if column.null_count:
            raise ValueError(f"column {name} has nulls")
    tiers = set(facts["sha256"])
    if not tiers <= set(TIERS) or not set(members.field("tier").unique().to_pylist()) <= tiers:
        raise ValueError(f"expected members and sha256 of the tiers {', '.join(TIERS)}, got others")
    if other := set(table.column("shard").unique().to_pylist()) - {facts["shard"]}:
        raise ValueError(f"rows of shard {sorted(other)[0]} in the manifest of shard {facts['shard']}")
