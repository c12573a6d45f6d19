"""A summary of a cache: counts, bytes, what its codecs cost and how well the teacher knows its answers."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrecal.errors import DamageError
from genrecal.samples.survey import Reasons
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.codecs import compression_of
from genrecal.shards.layout import TIERS, shard_name
from genrecal.shards.manifest import SKIPPED
from genrecal.shards.reader import Cache, CachedRecord
from genrecal.shards.record import read_table

COLUMN_RECORDS = 64  # records that the bytes by column are measured on
BINS = 10  # of a histogram
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}
NEAR_CHANCE = 0.01  # a top-1 agreement below this, or below ten times that of a random guess, is near chance
NOT_COLUMNS = "(schema, footer, padding)"
KINDS = {  # of members, by their names; all others are images
    "conversations": r"^[^.]*\.json$",
    "answer states": r"\.answer\.arrow$",
    "question states": r"\.question\.arrow$",
}


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many samples lie between each two neighbouring edges; the last bin includes its upper edge.

    All samples are counted: those whose value is NaN or infinite under `not_finite`.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    not_finite: int = 0


@dataclass(frozen=True, kw_only=True)
class ColumnBytes:
    """A column's buffers in the Arrow files: `bytes` as they are stored, compressed; `raw_bytes` decompressed."""

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
        sampled_targets: draws per row, 0 for none.
        answers: whose they are, and how the teacher wrote them if they are its own.
        skip_reasons: samples by reason; numbers, paths and quoted names in a reason stand as "…", so that similar ones
            count together. skip_examples: the first of each as the manifest has it, `FILE:LINE: why`.
        not_read: fields of the input that were not read, with the number of records that have them.
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
    not_read: dict[str, int]
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


def summarize(cache: Cache, *, column_records: int = COLUMN_RECORDS) -> Summary:
    """Summarize the finished shards of a cache.

    Args:
        column_records: how many records, evenly spread, are read to measure bytes by column; all others are not read.

    Corrupt members among those that are read are named in the warnings.
    """
    costs: dict[str, list[dict[str, Any]]] = {}
    not_read: Counter[str] = Counter()
    reasons, sizes = (
        Reasons(),
        Counter(dict.fromkeys(("conversations", "images", "answer states", "question states"), 0)),
    )
    for manifest in cache.manifests():
        for tier, cost in manifest.facts.get("fidelity", {}).items():
            if cost["rows"]:
                costs.setdefault(tier, []).append(cost)
        for reason in (
            manifest.table.filter(pc.equal(manifest.table.column("status"), SKIPPED)).column("reason").to_pylist()
        ):
            reasons.add(reason or "")
        not_read.update(manifest.facts.get("not_read", {}))
        sizes.update(_member_bytes(manifest.table.column("members")))
    for tier in TIERS:
        tars = cache.store.sizes(tier)
        sizes[f"{tier} tars"] = sum(tars.get(f"{shard_name(shard)}.tar", 0) for shard in cache.shards)
    numbers = ("turns", "images", "question_tokens", "answer_tokens", "entropy", "log_prob", "top1_agreement")
    values = {name: cache.column(name) for name in numbers}
    weights = values["answer_tokens"].astype(np.float64)
    means: dict[str, Any] = {
        name: float(np.average(values[name], weights=weights)) if weights.sum() else math.nan for name in numbers[4:]
    }
    sums: dict[str, Any] = {name: int(values[name].sum()) for name in numbers[:4]}
    description = cache.description
    columns, damage = _measured_columns(cache, column_records)
    return Summary(
        path=cache.path,
        **{name: description[name] for name in ("teacher", "format_version", "hidden_size", "head_rows", "top_k")},
        sampled_targets=cache.draws,
        answers=cache.answers,
        codecs={"answer": description["answer_codec"], "question": description["question_codec"]},
        fidelity={tier: _fidelity(costs[tier]) for tier in sorted(costs)},
        shards=(len(cache.shards), cache.num_shards),
        cached=len(cache),
        skipped=reasons.counts.total(),
        skip_reasons=dict(reasons.counts.most_common()),
        skip_examples=reasons.examples,
        not_read=dict(not_read.most_common()),
        categories=_counts(cache, "category"),
        sources=_counts(cache, "source"),
        **sums,
        with_images=int((values["images"] > 0).sum()),
        with_question=int(cache.column("has_question").sum()),
        bytes={name: size for name, size in sizes.items() if size or name.endswith("tars")},
        columns=columns,
        **means,
        entropy_histogram=histogram(values["entropy"]),
        log_prob_histogram=histogram(values["log_prob"]),
        token_quantiles={name: _quantiles(values[name]) for name in ("question_tokens", "answer_tokens")},
        warnings=(*blind_teacher(means["top1_agreement"], means["log_prob"], description["head_rows"]), *damage),
    )


def _fidelity(shards: list[dict[str, Any]]) -> TierFidelity:
    weights = [shard["rows"] for shard in shards]
    means: dict[str, Any] = {
        name: np.average([shard[name] for shard in shards], weights=weights) for name in ("kl_mean", "top1_agreement")
    }
    return TierFidelity(
        rows=sum(weights),
        kl_p99=max(shard["kl_p99"] for shard in shards),
        **{name: float(mean) for name, mean in means.items()},
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
            f"log-probability {log_prob:.3f} nats per token is below {uniform:.3f}, a guess among all {head_rows} tokens"
        )
    if top1_agreement < max(NEAR_CHANCE, 10 * chance):
        found.append(f"top-1 agreement {top1_agreement:.2%} is near chance ({chance:.2%})")
    if found:
        yield f"the teacher does not know these answers: wrong weights, template or images? {'; '.join(found)}"


def _counts(cache: Cache, name: str) -> dict[str, int]:
    """Samples by a text column's value, the most frequent first."""
    counted = cache.arrow_column(name).value_counts()
    values, counts = counted.field("values").to_pylist(), counted.field("counts").to_pylist()
    return dict(sorted(zip(values, counts, strict=True), key=lambda entry: -entry[1]))


# ----------------------------------------------------------------------------------------------------------------- bytes


def _member_bytes(column: pa.ChunkedArray) -> dict[str, int]:
    """Bytes of a manifest's members by what they are."""
    members = pc.list_flatten(column)
    names, sizes = pc.struct_field(members, "name"), pc.struct_field(members, "size")
    found = {
        kind: pc.sum(sizes.filter(pc.match_substring_regex(names, pattern))).as_py() or 0
        for kind, pattern in KINDS.items()
    }
    return found | {"images": (pc.sum(sizes).as_py() or 0) - sum(found.values())}


def _measured_columns(cache: Cache, num_records: int) -> tuple[dict[str, MeasuredColumns], list[str]]:
    """Bytes by column over records spread evenly over the cache, and a warning if some of them cannot be read."""
    there = set(cache.store.names("questions"))  # the tier may have been deleted, which is no damage
    tars = [shard for shard in cache.shards if f"{shard_name(shard)}.tar" in there]
    with_question = np.flatnonzero(cache.column("has_question").astype(bool) & np.isin(cache.column("shard"), tars))
    measured, damage, tried = {}, [], 0
    for kind, candidates in (("answer", np.arange(len(cache))), ("question", with_question)):
        sums: dict[str, np.ndarray] = {}
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
                sums[column.name] = sums.get(column.name, np.zeros(2, int)) + [column.bytes, column.raw_bytes]
        if sums:
            sums[NOT_COLUMNS] = sums.pop(NOT_COLUMNS)  # last
            measured[kind] = MeasuredColumns(
                records=num_read,
                of_records=len(candidates),
                rows=num_rows,
                columns=tuple(
                    ColumnBytes(name=name, bytes=int(n), raw_bytes=int(raw)) for name, (n, raw) in sums.items()
                ),
            )
    warning = f"{len(damage)} of the {tried} files read to measure columns are corrupt: {damage[0]}" if damage else ""
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
    compression = compression_of(record.cache.description[f"{kind}_codec"])
    return arrow_column_bytes(record.read(member), compression, where=f"sample {record.key}: member {name}")


def arrow_column_bytes(data: bytes, compression: str | None, *, where: str) -> tuple[list[ColumnBytes], int]:
    """Bytes by column of an Arrow IPC file, and its rows. Raises DamageError for a file that cannot be read.

    Each buffer is compressed alone, so a column is measured by writing it alone, compressed as the file is.
    """
    table = read_table(data, where=where)
    columns = [
        ColumnBytes(name=name, bytes=_body_bytes(part, compression), raw_bytes=_body_bytes(part, None))
        for name, part in ((name, table.select([name])) for name in table.column_names)
    ]
    rest = len(data) - sum(column.bytes for column in columns)
    return [*columns, ColumnBytes(name=NOT_COLUMNS, bytes=rest, raw_bytes=rest)], table.num_rows


def _body_bytes(table: pa.Table, compression: str | None) -> int:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sum(message.body.size for message in pa.ipc.MessageReader.open_stream(sink.getvalue()) if message.body)
