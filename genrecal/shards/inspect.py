"""What a cache holds: a summary, one record, or an SQL query, each as a frozen dataclass of plain values.

`summarize` and `run_sql` are here, `describe_record` is in inspect_record.py, what a terminal shows in inspect_text.py.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrecal.errors import DamageError, UsageError
from genrecal.samples.survey import Reasons
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.arrow_file import READ_ERRORS, batch_sizes, schema_and_batches
from genrecal.shards.inspect_record import MEASURED, RecordDescription, describe_record, find_record, save_images
from genrecal.shards.layout import TIERS, shard_name
from genrecal.shards.manifest import SCHEMA, SKIPPED
from genrecal.shards.reader import Cache, CachedRecord

__all__ = [
    "RecordDescription", "SqlResult", "Summary", "describe_record", "find_record", "plain_json", "run_sql",
    "save_images", "summarize",
]  # fmt: skip

COLUMN_RECORDS = 64  # records that the bytes by column are measured on
BINS = 10  # of a histogram
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}
SQL_SETTINGS = {
    "memory_limit": "'4GiB'",  # beside the manifests, which DuckDB reads where they are
    "temp_directory": "''",  # or what is over it would go into the working directory
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "enable_external_access": "false",
}
NEAR_CHANCE = 0.01  # a top-1 agreement below this, or below ten times that of a blind guess, is near chance
NOT_COLUMNS = "(schema, footer, padding)"


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many samples lie between each two neighbouring edges; the last bin has its upper edge in it.

    All samples are counted: those whose value is NaN or infinite under `not_finite`.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    not_finite: int = 0


@dataclass(frozen=True, kw_only=True)
class ColumnBytes:
    """A column's buffers in the Arrow files: `bytes` as they stand there, compressed; `raw_bytes` decompressed."""

    name: str
    bytes: int
    raw_bytes: int


@dataclass(frozen=True, kw_only=True)
class MeasuredColumns:
    """Bytes by column of one kind of Arrow file, summed over `records` of the `of_records` that the cache has.

    The columns' bytes add up to the size of those files; what belongs to no column is in the last entry.
    """

    records: int
    of_records: int
    rows: int
    columns: tuple[ColumnBytes, ...]


@dataclass(frozen=True, kw_only=True)
class TierFidelity:
    """What a codec cost, over all shards: means over the rows measured, and the worst shard's 99th percentile (nats)."""

    rows: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts over a cache's finished shards; bytes as they are on disk.

    Args:
        fidelity: what the codecs cost, by tier; a tier whose codec is lossless is not there.
        shards: finished, planned.
        sampled_targets: draws a row, 0 for none.
        answers: whose they are, and how the teacher wrote them if they are its own.
        skip_reasons: samples by reason; numbers, paths and quoted names in a reason stand as "…", so like ones count
            together. skip_examples: the first of each as the manifest has it, `FILE:LINE: why`.
        images: of all samples; with_images: samples that have some.
        columns: bytes by Arrow column, under "answer" and "question", measured on records evenly spread over the cache.
        entropy, log_prob: nats, means over the answer tokens; top1_agreement: a share of them.
        entropy_histogram, log_prob_histogram: of the samples' own means.
        token_quantiles: lengths of samples under "question_tokens" and "answer_tokens", by name of QUANTILES.
        warnings: what looks wrong.
    """

    path: str
    teacher: dict[str, Any]
    format_version: int
    hidden_size: int
    head_rows: int
    top_k: int
    sampled_targets: int
    answers: AnswerSource
    codecs: dict[str, str]
    fidelity: dict[str, TierFidelity]
    shards: tuple[int, int]
    cached: int
    skipped: int
    skip_reasons: dict[str, int]
    skip_examples: dict[str, str]
    categories: dict[str, int]
    sources: dict[str, int]
    turns: int
    images: int
    with_images: int
    question_tokens: int
    answer_tokens: int
    with_question: int
    bytes: dict[str, int] = field(default_factory=dict)
    columns: dict[str, MeasuredColumns] = field(default_factory=dict)
    entropy: float
    log_prob: float
    top1_agreement: float
    entropy_histogram: Histogram
    log_prob_histogram: Histogram
    token_quantiles: dict[str, dict[str, int]]
    warnings: tuple[str, ...]


@dataclass
class _Read:
    """What one pass over the manifests adds up."""

    fidelity: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    reasons: Reasons = field(default_factory=Reasons)
    skipped: int = 0
    bytes: Counter[str] = field(default_factory=Counter)


def _read_manifests(cache: Cache) -> _Read:
    read = _Read()
    for manifest in cache.manifests():
        for tier, values in manifest.facts.get("fidelity", {}).items():
            if values["rows"]:
                read.fidelity.setdefault(tier, []).append(values)
        skipped = manifest.table.filter(pc.equal(manifest.table.column("status"), SKIPPED))
        read.skipped += len(skipped)
        for reason in skipped.column("reason").to_pylist():
            read.reasons.add(reason or "")
        read.bytes.update(_member_bytes(manifest.table.column("members")))
    return read


def _fidelity(measured: dict[str, list[dict[str, Any]]]) -> dict[str, TierFidelity]:
    return {
        tier: TierFidelity(
            rows=sum(shard["rows"] for shard in shards),
            kl_mean=_over_rows(shards, "kl_mean"),
            kl_p99=max(shard["kl_p99"] for shard in shards),
            top1_agreement=_over_rows(shards, "top1_agreement"),
        )
        for tier, shards in sorted(measured.items())
    }


def _over_rows(shards: list[dict[str, Any]], name: str) -> float:
    return float(np.average([shard[name] for shard in shards], weights=[shard["rows"] for shard in shards]))


def summarize(cache: Cache, *, column_records: int = COLUMN_RECORDS) -> Summary:
    """A true summary of a cache; what is not finished is not counted.

    Args:
        column_records: how many records, evenly spread, are read to measure bytes by column; all others are not read.

    Raises DamageError for a manifest without numbers for what it says is cached. Damaged members among those that are
    read are named in the warnings.
    """
    _check_measured(cache)
    read = _read_manifests(cache)
    weights = cache.column("answer_tokens").astype(np.float64)

    def total(name: str) -> int:
        return int(cache.column(name).sum())

    def over_tokens(name: str) -> float:
        return float(np.average(cache.column(name), weights=weights)) if weights.sum() else float("nan")

    description = cache.description
    columns, damage = _measured_columns(cache, column_records)
    top1_agreement, log_prob = over_tokens("top1_agreement"), over_tokens("log_prob")
    blind = blind_teacher(top1_agreement, log_prob, description["head_rows"])
    return Summary(
        path=cache.path,
        teacher=description["teacher"],
        format_version=description["format_version"],
        hidden_size=description["hidden_size"],
        head_rows=description["head_rows"],
        top_k=description["top_k"],
        sampled_targets=cache.draws,
        answers=cache.answers,
        codecs={"answer": description["answer_codec"], "question": description["question_codec"]},
        fidelity=_fidelity(read.fidelity),
        shards=(len(cache.shards), cache.num_shards),
        cached=len(cache),
        skipped=read.skipped,
        skip_reasons=dict(read.reasons.counts.most_common()),
        skip_examples=read.reasons.examples,
        categories=_counts(cache, "category"),
        sources=_counts(cache, "source"),
        turns=total("turns"),
        images=total("images"),
        with_images=int((cache.column("images") > 0).sum()),
        question_tokens=total("question_tokens"),
        answer_tokens=total("answer_tokens"),
        with_question=int(cache.column("has_question").sum()),
        bytes=_bytes(cache, read.bytes),
        columns=columns,
        entropy=over_tokens("entropy"),
        log_prob=log_prob,
        top1_agreement=top1_agreement,
        entropy_histogram=histogram(cache.column("entropy")),
        log_prob_histogram=histogram(cache.column("log_prob")),
        token_quantiles={name: _quantiles(cache.column(name)) for name in ("question_tokens", "answer_tokens")},
        warnings=(*blind, *damage),
    )


def _check_measured(cache: Cache) -> None:
    for name in MEASURED:
        missing = cache.arrow_column(name).null_count
        if missing:
            raise DamageError(
                f"{cache.store.where('manifest')}: {missing} of the {len(cache)} cached samples have no {name}; "
                "`genrecal verify` says which shards are damaged"
            )


def histogram(values: np.ndarray, bins: int = BINS) -> Histogram:
    """Counts in `bins` equal steps from the least finite value to the largest; one bin if they are all the same."""
    finite = values[np.isfinite(values)].astype(np.float64)
    rest = int(len(values) - len(finite))
    if not len(finite):
        return Histogram(edges=(), counts=(), not_finite=rest)
    low, high = float(finite.min()), float(finite.max())
    if low == high:
        return Histogram(edges=(low, high), counts=(len(finite),), not_finite=rest)
    counts, edges = np.histogram(finite, bins=bins, range=(low, high))
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()), not_finite=rest)


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths that occur: at least that share of the samples is no longer."""
    if not len(lengths):
        return {}
    values = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(QUANTILES, values, strict=True)}


def blind_teacher(top1_agreement: float, log_prob: float, head_rows: int) -> Iterator[str]:
    """A warning if the teacher does no better on the answers than one that never saw them."""
    uniform, chance = -math.log(head_rows), 1 / head_rows
    found = []
    if log_prob < uniform:
        found.append(
            f"log-probability {log_prob:.3f} nats a token is below {uniform:.3f}, a guess among all {head_rows} tokens"
        )
    if top1_agreement < max(NEAR_CHANCE, 10 * chance):
        found.append(f"top-1 agreement {top1_agreement:.2%} is near chance ({chance:.2%})")
    if found:
        yield f"the teacher does not know these answers: wrong weights, template or images? {'; '.join(found)}"


# ----------------------------------------------------------------------------------------------------------------- bytes


KINDS = {
    "conversations": r"^[^.]*\.json$",
    "answer states": r"\.answer\.arrow$",
    "question states": r"\.question\.arrow$",
}


def _member_bytes(column: pa.ChunkedArray) -> Counter[str]:
    """Bytes of a manifest's members by what they are; what is of no other kind is an image."""
    members = pc.list_flatten(column)
    names, sizes = pc.struct_field(members, "name"), pc.struct_field(members, "size").to_numpy()
    found: Counter[str] = Counter(images=int(sizes.sum()))
    for kind, pattern in KINDS.items():
        matches = np.asarray(pc.match_substring_regex(names, pattern).to_numpy(), bool)
        found[kind] = int(sizes[matches].sum())
        found["images"] -= found[kind]
    return found


def _bytes(cache: Cache, members: Counter[str]) -> dict[str, int]:
    """Bytes by what they are: images, conversations, answer states, question states, and the tars as files."""
    found = dict(members)
    for tier in TIERS:
        sizes = cache.store.sizes(tier)
        found[f"{tier} tars"] = sum(sizes.get(f"{shard_name(shard)}.tar", 0) for shard in cache.shards)
    order = ("conversations", "images", "answer states", "question states", *(f"{tier} tars" for tier in TIERS))
    return {name: found.get(name, 0) for name in order if found.get(name) or name.endswith("tars")}


def _counts(cache: Cache, name: str) -> dict[str, int]:
    """Samples by a text column's value, the most frequent first."""
    counted = cache.arrow_column(name).value_counts()
    values, counts = counted.field("values").to_pylist(), counted.field("counts").to_pylist()
    return dict(sorted(zip(values, counts, strict=True), key=lambda entry: -entry[1]))


def _measured_columns(cache: Cache, num_records: int) -> tuple[dict[str, MeasuredColumns], list[str]]:
    """Bytes by column over records spread evenly over the cache, and a warning if some of them cannot be read."""
    rows = np.arange(len(cache))
    # The question tier may have been deleted, which is no damage.
    there = set(cache.store.names("questions"))
    tars = [shard for shard in cache.shards if f"{shard_name(shard)}.tar" in there]
    with_question = np.flatnonzero(cache.column("has_question").astype(bool) & np.isin(cache.column("shard"), tars))
    measured, damage, tried = {}, [], 0
    for kind, candidates in (("answer", rows), ("question", with_question)):
        sums: dict[str, list[int]] = {}
        num_read = num_rows = 0
        for index in _spread(candidates, num_records):
            tried += 1
            try:
                columns, length = _record_columns(cache[int(index)], kind)
            except DamageError as error:
                damage.append(str(error))
                continue
            num_read, num_rows = num_read + 1, num_rows + length
            for column in columns:
                entry = sums.setdefault(column.name, [0, 0])
                entry[0] += column.bytes
                entry[1] += column.raw_bytes
        rest = sums.pop(NOT_COLUMNS, None)
        if num_read and rest is not None:
            sums[NOT_COLUMNS] = rest
            measured[kind] = MeasuredColumns(
                records=num_read,
                of_records=len(candidates),
                rows=num_rows,
                columns=tuple(ColumnBytes(name=name, bytes=n, raw_bytes=raw) for name, (n, raw) in sums.items()),
            )
    warning = f"{len(damage)} of the {tried} files read to measure columns are damaged: {damage[0]}" if damage else ""
    return measured, [warning] if warning else []


def _spread(candidates: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the candidates, evenly spaced, the first and the last among them; always the same ones."""
    if len(candidates) <= count:
        return candidates
    return candidates[np.linspace(0, len(candidates) - 1, count).round().astype(np.int64)]


def _record_columns(record: CachedRecord, kind: str) -> tuple[list[ColumnBytes], int]:
    """Bytes by column of a record's `kind` file, and its rows."""
    name = f"{record.key}.{kind}.arrow"
    member = next((member for member in record.row["members"] if member["name"] == name), None)
    if member is None:
        raise DamageError(f"sample {record.key} has no member {name} in its manifest")
    try:
        return arrow_column_bytes(record.read(member))
    except READ_ERRORS as error:
        if isinstance(error, DamageError):
            raise
        raise DamageError(f"sample {record.key}: member {name}: not a readable Arrow file: {error}") from None


def arrow_column_bytes(data: bytes) -> tuple[list[ColumnBytes], int]:
    """Bytes by column of an Arrow IPC file, from the sizes of its buffers in its messages, and its rows.

    Nothing is decompressed.
    """
    schema, batches = schema_and_batches(data)
    # Arrow writes a column's buffers one after another, nested ones behind their parent's, as Array.buffers() has them.
    owners = [name for name, kind in zip(schema.names, schema.types, strict=True) for _ in pa.nulls(0, kind).buffers()]
    sums = {name: [0, 0] for name in schema.names}
    num_rows = counted = 0
    for message in batches:
        length, sizes = batch_sizes(message)
        if len(sizes) != len(owners):
            raise ValueError(f"{len(sizes)} buffers for columns that have {len(owners)}")
        num_rows += length
        for owner, (size, raw) in zip(owners, sizes, strict=True):
            sums[owner][0] += size
            sums[owner][1] += raw
            counted += size
    columns = [ColumnBytes(name=name, bytes=size, raw_bytes=raw) for name, (size, raw) in sums.items()]
    rest = len(data) - counted
    return [*columns, ColumnBytes(name=NOT_COLUMNS, bytes=rest, raw_bytes=rest)], num_rows


# ------------------------------------------------------------------------------------------------------------------- SQL


@dataclass(frozen=True, kw_only=True)
class SqlResult:
    """A query's rows; `types` are DuckDB's names. Equal column names are told apart: `n`, `n_1`."""

    columns: tuple[str, ...]
    types: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One object a row, as `--json` prints them."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class _ManifestStream:
    """The manifests as an Arrow stream, begun anew for each scan of a query, so that they are never all in memory."""

    cache: Cache
    damage: list[DamageError] = field(default_factory=list)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            for manifest in self.cache.manifests():
                yield from manifest.table.to_batches()
        except DamageError as error:  # Arrow would wrap it into its own message, with the traceback
            self.damage.append(error)
            raise

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        batches = self._batches()
        return pa.RecordBatchReader.from_batches(SCHEMA, batches).__arrow_c_stream__(requested_schema)


def run_sql(cache: Cache, query: str) -> SqlResult:
    """Run a DuckDB query over the manifest, all input records, as the table `manifest`; nothing else can be reached.

    It cannot read or write files, load extensions, change these settings or take more than 4 GiB.

    Raises UsageError if DuckDB is not installed, or with DuckDB's message if it cannot run the query.
    """
    try:
        import duckdb
    except ImportError:
        raise UsageError(
            "--sql needs DuckDB, which is not installed: `pip install duckdb`, or genrecal with its extra `report`"
        ) from None
    with duckdb.connect(":memory:") as connection:
        manifest = _ManifestStream(cache)
        connection.register("manifest", manifest)
        for setting, value in SQL_SETTINGS.items():
            connection.execute(f"SET {setting} = {value}")
        connection.execute("SET lock_configuration = true")
        try:
            result = connection.execute(query)
            if result is None or result.description is None:
                raise UsageError(f"--sql {query!r}: expected a query, such as SELECT count(*) FROM manifest")
            described = [(str(column[0]), str(column[1])) for column in result.description]
            rows = tuple(result.fetchall())
        except duckdb.Error as error:
            if manifest.damage:
                raise manifest.damage[0] from None
            message = re.split(r"\n+LINE \d|\nTraceback", str(error))[0]
            raise UsageError(f"--sql: {message}; the table is `manifest`") from None
    names: list[str] = []
    for name, _ in described:
        count = 0
        while (unique := f"{name}_{count}" if count else name) in names:
            count += 1
        names.append(unique)
    return SqlResult(columns=tuple(names), types=tuple(kind for _, kind in described), rows=rows)


def plain_json(value: Any) -> Any:
    """What JSON can hold: NaN and infinities become null, and what JSON has no word for becomes text."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "backslashreplace")
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
