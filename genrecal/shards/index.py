"""`index.parquet`: what the manifests say of every sample, in one file, so that a large cache opens without them.

It holds the manifests' columns that are asked of all samples at once (lengths, categories, measurements) and a digest of
each manifest. Keys, reasons and members stay in the manifests, which are read when a record of their shard is.
It is made when a cache is finished, from the manifests alone; without it the manifests are read.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genrecal.errors import DamageError, FormatError
from genrecal.shards.layout import (
    DIGEST,
    FORMAT_VERSION,
    manifest_name,
    read_raw_cache_json,
    sealed,
    write_cache_json,
)
from genrecal.shards.manifest import (
    CACHED,
    METADATA_KEY,
    READ_ERRORS,
    SKIPPED,
    read_manifest,
)
from genrecal.shards.storage import Store
from genrecal.shards.strict_json import strict_json

INDEX_FILE = "index.parquet"
ROW_GROUP = 2**20
MAX_FACTS_BYTES = 2**26  # it holds a digest of each manifest, twice
AGAIN = "delete it and run `genrecal cache` again: finished shards are kept"
BLOCK_SHARDS = 512  # manifests whose rows are held as they are read, before they are joined
READERS = 16  # manifests read at once; a remote store answers them side by side
COUNTS = ("turns", "images", "question_tokens", "answer_tokens")
TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("cached", pa.bool_()),
        ("category", TEXT),
        ("source", TEXT),
        ("turns", pa.int32()),
        ("images", pa.int32()),
        ("question_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("entropy", pa.float32()),
        ("log_prob", pa.float32()),
        ("top1_agreement", pa.float32()),
        ("has_question", pa.bool_()),
    ]
)


class Index:
    """Columns over all input records, in input order.

    Args:
        read_column: name -> its values.
        digests: `content_xxh3` of each shard's manifest, by shard.
    """

    def __init__(self, read_column: Callable[[str], pa.ChunkedArray], digests: dict[int, str]):
        self.column, self.digests = read_column, digests
        numbers = np.fromiter(digests, np.int64, len(digests))
        self.shard = np.asarray(read_column("shard").to_numpy())
        self.rows = np.flatnonzero(np.asarray(read_column("cached").to_numpy()))  # of the cached samples
        if np.any(np.diff(self.shard) < 0) or not np.isin(self.shard[:1], numbers).all():
            raise ValueError("its shards are not in order")
        self._numbers, self._starts = numbers, np.searchsorted(self.shard, numbers)

    def place(self, row: int) -> tuple[int, int]:
        """A record's shard, and its row in that shard's manifest."""
        shard = int(self.shard[row])
        return shard, row - int(self._starts[np.searchsorted(self._numbers, shard)])

    def count(self, shard: int) -> int:
        """Records of a shard."""
        number = int(np.searchsorted(self._numbers, shard))
        end = self._starts[number + 1] if number + 1 < len(self._starts) else len(self.shard)
        return int(end - self._starts[number])


class Scan:
    """What the index takes of the manifests, gathered shard by shard in memory that does not grow with their keys.

    digests: `content_xxh3` of each manifest, by shard. totals: sums of cached and skipped records.
    """

    def __init__(self) -> None:
        self.digests: dict[int, str] = {}
        self.totals: Counter[str] = Counter()
        self._blocks: list[pa.Table] = []
        self._tables: list[pa.Table] = []

    def add(self, columns: pa.Table, facts: dict[str, Any]) -> None:
        """Take a shard's index columns (`index_columns`) and its manifest's facts, in the shards' order."""
        self.digests[facts["shard"]] = str(facts.get(DIGEST))
        self.totals.update({status: facts[status] for status in (CACHED, SKIPPED)})
        self._tables.append(columns)
        if len(self._tables) == BLOCK_SHARDS:
            self._blocks, self._tables = [*self._blocks, _joined(self._tables)], []

    @property
    def table(self) -> pa.Table:
        """All shards' columns, in the types of SCHEMA."""
        return _joined([*self._blocks, *self._tables])


def scan(store: Store, shards: Sequence[int]) -> Scan:
    """Read these shards' manifests, several at once, and keep what the index needs.

    Raises DamageError, or FormatError for a version that is not known.
    """

    def read(shard: int) -> tuple[pa.Table, dict[str, Any]]:
        table, facts = read_shard_manifest(store, shard)
        return index_columns(table), facts

    found = Scan()
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(shards), BLOCK_SHARDS):
            for columns, facts in pool.map(read, shards[start : start + BLOCK_SHARDS]):
                found.add(columns, facts)
    return found


def index_of(scanned: Scan) -> Index:
    """The index of what was scanned, in memory."""
    return Index(scanned.table.column, scanned.digests)


def index_bytes(scanned: Scan) -> bytes:
    """The index file of a finished cache. The same manifests give the same bytes."""
    facts = {"format_version": FORMAT_VERSION, "manifests": list(scanned.digests.values())}
    table = scanned.table.replace_schema_metadata({METADATA_KEY: json.dumps(facts, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, row_group_size=ROW_GROUP)
    return sink.getvalue().to_pybytes()


def totals_of(scanned: Scan) -> dict[str, int]:
    """The sums that `cache.json` holds of a finished cache."""
    table = scanned.table
    return dict(scanned.totals) | {name: int(pc.sum(table.column(name)).as_py() or 0) for name in COUNTS}


def index_columns(manifest: pa.Table) -> pa.Table:
    """The index's columns of one manifest."""
    cached = pc.equal(manifest.column("status"), CACHED)
    names = [name for name in SCHEMA.names if name != "cached"]
    return manifest.select(names).append_column("cached", cached).select(SCHEMA.names).combine_chunks()


def _joined(tables: list[pa.Table]) -> pa.Table:
    if not tables:
        return SCHEMA.empty_table()
    return pa.concat_tables([table.cast(SCHEMA) for table in tables]).unify_dictionaries().combine_chunks()


def read_index(store: Store, *, num_shards: int, num_samples: int | None) -> Index:
    """The index file; columns are read when they are asked for. Raises DamageError if it is not this cache's."""
    digests = index_digests(store)
    try:
        index = Index(lambda name: _read_column(store, name), digests)
        num_rows = len(index.shard)
        if len(digests) != num_shards or (num_samples is not None and num_rows != num_samples):
            raise ValueError(f"expected {num_samples} records in {num_shards} shards, got {num_rows} in {len(digests)}")
        return index
    except READ_ERRORS as error:
        raise DamageError(f"{store.where(INDEX_FILE)}: not this cache's index: {error}; {AGAIN}") from None


def index_digests(store: Store) -> dict[int, str]:
    """The manifests' digests by shard, as the index file has them. Raises DamageError if it is not readable."""
    try:
        with store.open(INDEX_FILE) as file, pq.ParquetFile(file) as opened:
            facts = strict_json((opened.metadata.metadata or {})[METADATA_KEY], MAX_FACTS_BYTES)
            return dict(enumerate(map(str, facts["manifests"])))
    except READ_ERRORS as error:
        raise DamageError(f"{store.where(INDEX_FILE)}: not this cache's index: {error}; {AGAIN}") from None


def complete_cache(store: Store, num_shards: int) -> None:
    """Write the index and the totals of a cache whose shards are all finished; any number of workers may do it."""
    scanned = scan(store, range(num_shards))
    index, description = index_bytes(scanned), read_raw_cache_json(store)
    totals = {"totals": totals_of(scanned), "index_sha256": hashlib.sha256(index).hexdigest()}
    if sealed(description | totals) == description and store.exists(INDEX_FILE) and store.read(INDEX_FILE) == index:
        return
    store.write(INDEX_FILE, index)
    write_cache_json(store, description | totals)


def _read_column(store: Store, name: str) -> pa.ChunkedArray:
    options = {"read_dictionary": [name]} if SCHEMA.field(name).type == TEXT else {}
    try:
        with store.open(INDEX_FILE) as file, pq.ParquetFile(file, page_checksum_verification=True, **options) as opened:
            return opened.read([name]).column(name).cast(SCHEMA.field(name).type)
    except READ_ERRORS as error:
        raise DamageError(f"{store.where(INDEX_FILE)}: column {name} cannot be read: {error}; {AGAIN}") from None


def read_shard_manifest(store: Store, shard: int) -> tuple[pa.Table, dict[str, Any]]:
    """A shard's manifest.

    Raises DamageError if it is missing, unreadable or another shard's, FormatError if it has another format version.
    """
    name = manifest_name(shard)
    try:
        data = store.read(name)
    except OSError as error:
        raise DamageError(f"{store.where(name)}: {error.strerror or error}; run `genrecal cache` again") from None
    table, facts = read_manifest(data, where=store.where(name))
    if facts["format_version"] != FORMAT_VERSION:
        raise FormatError(
            f"{store.where(name)}: format version {facts['format_version']!r}; "
            f"this genrecal reads version {FORMAT_VERSION}"
        )
    if facts["shard"] != shard:
        raise DamageError(
            f"{store.where(name)}: expected the manifest of shard {shard}, got that of shard {facts['shard']}; "
            "delete it and run `genrecal cache` again"
        )
    return table, facts
