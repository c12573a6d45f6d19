"""One sample's teacher states, in memory and as Arrow IPC files.

Letters used for shapes: R rows, D hidden size of the teacher, k stored logits a row, K draws a row, V head rows.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from genrecal.errors import DamageError, FormatError, SampleError
from genrecal.samples import Sample
from genrecal.shards.arrow_file import (
    METADATA_KEY,
    MOST_SCHEMA_BYTES,
    READ_ERRORS,
    Buffers,
    allowed_bytes,
    expanded_bytes,
    read_batches,
    schema_of,
)
from genrecal.shards.codecs import Codec, checked_facts, codec_named
from genrecal.shards.strict_json import strict_json

__all__ = ["METADATA_KEY", "AnswerRows", "QuestionRows", "Record", "answer_rows", "question_rows", "to_arrow"]
NO_TARGET = -1  # in memory; null on disk
TYPES = {
    **dict.fromkeys(("turn", "position", "token_id", "target_id", "target_start", "target_end"), pa.int32()),
    **dict.fromkeys(("target_logit", "logsumexp", "topk_logits", "entropy"), pa.float32()),
    **dict.fromkeys(("topk_ids", "sample_ids"), pa.int32()),
    "sample_counts": pa.uint16(),
    **dict.fromkeys(("hidden_hi", "hidden_lo"), pa.uint8()),
    "hidden_scale": pa.float16(),
}  # of a column's values; the codes' depend on the codec
CODES = {"int8": pa.int8(), "int4": pa.uint8()}
TENSORS = frozenset({
    "topk_ids", "topk_logits", "sample_ids", "sample_counts", "hidden_hi", "hidden_lo", "hidden_q", "hidden_scale"
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuestionRows:
    """The teacher's states over the Q segments, in sequence order.

    turn, position, token_id: int32 `[R]`; hidden: float32 `[R, D]`.
    """

    turn: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    hidden: np.ndarray

    def __len__(self) -> int:
        return len(self.turn)


@dataclass(frozen=True, kw_only=True)
class SampledTargets:
    """K draws with replacement from the teacher's own distribution at each row, temperature 1, as ids and counts.

    ids: int32 `[R, K]`, the distinct ids drawn, rising, then zeros; counts: uint16 `[R, K]`, how often each was drawn, then
    zeros, so that each row adds up to K and counts / K is an unbiased estimate of the distribution. entropy: float32 `[R]`,
    nats, of the whole distribution: exact, not of the draws.
    """

    ids: np.ndarray
    counts: np.ndarray
    entropy: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AnswerRows(QuestionRows):
    """The answer rows: of each turn, the last position of its Q segment and every position of its A segment.

    All but a turn's last row predict the answer token that follows; the last `n_t` rows of a turn are the answer's own
    states. `hidden` is what the body gave (rounded to bf16); the targets come from the unrounded state.

    target_id: int32 `[R]`, NO_TARGET on a turn's last row. target_start, target_end: int32 `[R]`, the bytes of the
    turn's answer text that the target token covers. target_logit: float32 `[R]`, the target's own logit, which may lie
    outside the top k. (All four are null on a turn's last row, on disk.) topk_ids: int32 `[R, k]`, by falling logit.
    topk_logits: float32 `[R, k]`. logsumexp: float32 `[R]`, over all V logits, so that exp(topk_logits - logsumexp) are
    exact probabilities. sampled: None where the cache has no sampled targets.
    """

    target_id: np.ndarray
    target_start: np.ndarray
    target_end: np.ndarray
    target_logit: np.ndarray
    topk_ids: np.ndarray
    topk_logits: np.ndarray
    logsumexp: np.ndarray
    sampled: SampledTargets | None = None

    @property
    def predicts(self) -> np.ndarray:
        """bool `[R]`: the rows that have a target."""
        return self.target_id != NO_TARGET

    @property
    def target_log_prob(self) -> np.ndarray:
        """float32 `[R]`: the teacher's log-probability of each target, nats; meaningless where there is none."""
        return self.target_logit - self.logsumexp


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the cache holds of one sample; `question` is None where the question tier was not asked for."""

    sample: Sample
    answer: AnswerRows
    question: QuestionRows | None

    @property
    def cache(self) -> str:
        """The path of its cache, where several are mixed; else ""."""
        return self.sample.key.rpartition("/")[0]


def row_entropy(log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entropy in nats and tail mass, `[R]` each, of top-k log-probabilities `[R, k]`; the tail counts as one token."""
    probs = np.exp(log_probs)
    tail = np.clip(1 - probs.sum(1), 0, 1)
    return -(probs * log_probs).sum(1) - tail * np.log(np.where(tail > 0, tail, 1)), tail


# --------------------------------------------------------------------------------------------------- rows -> Arrow file


def to_arrow(rows: QuestionRows, codec: Codec) -> bytes:
    """Rows -> the bytes of an Arrow IPC file, buffers compressed as the codec says. The same rows give the same bytes.

    Raises SampleError for states that a codec cannot hold, or that compress so well that a reader would refuse them.
    """
    columns: dict[str, pa.Array] = {
        "turn": pa.array(rows.turn, pa.int32()),
        "position": pa.array(rows.position, pa.int32()),
        "token_id": pa.array(rows.token_id, pa.int32()),
    }
    facts = codec.facts(rows.hidden.shape[1])
    for name, values in codec.encode(rows.hidden, facts).items():
        columns[name] = _tensor_column(values)
    if isinstance(rows, AnswerRows):
        absent = ~rows.predicts
        for name in ("target_id", "target_start", "target_end"):
            columns[name] = pa.array(getattr(rows, name), pa.int32(), mask=absent)
        columns["target_logit"] = pa.array(rows.target_logit, pa.float32(), mask=absent)
        columns["topk_ids"] = _tensor_column(rows.topk_ids.astype(np.int32, copy=False))
        columns["topk_logits"] = _tensor_column(rows.topk_logits.astype(np.float32, copy=False))
        columns["logsumexp"] = pa.array(rows.logsumexp, pa.float32())
        if rows.sampled is not None:
            columns["sample_ids"] = _tensor_column(rows.sampled.ids.astype(np.int32, copy=False))
            columns["sample_counts"] = _tensor_column(rows.sampled.counts.astype(np.uint16, copy=False))
            columns["entropy"] = pa.array(rows.sampled.entropy, pa.float32())
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(facts, sort_keys=True)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec.compression)) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    if (size := len(rows) * expanded_bytes(table.schema)) > allowed_bytes(len(data)):
        raise SampleError(f"{len(rows)} rows, nearly all the same: {size} bytes in a file of {len(data)}")
    return data


def _tensor_column(values: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


# --------------------------------------------------------------------------------------------------- Arrow file -> rows


class Layout:
    """An Arrow schema, and what was found good in it: every file of a cache has one of two, so each is looked at once."""

    def __init__(self, schema: pa.Schema):
        self.schema, self.names = schema, frozenset(schema.names)
        self._columns: dict[str, tuple[int, int, int, np.dtype]] = {}
        counts = [len(pa.nulls(0, kind).buffers()) for kind in schema.types]
        self._buffers = [1, *(1 + total for total in accumulate(counts))]  # of a batch as a struct, whose own is first
        self._codec: tuple[Codec, dict[str, Any]] | None = None

    def column(self, name: str, where: str) -> tuple[int, int, int, np.dtype]:
        """The first and the last of its buffers, its values a row (0 if it is no tensor) and their type.

        Raises FormatError for a column that is not there, or not as it should be.
        """
        return self._columns.get(name) or self._columns.setdefault(name, self._look(name, where))

    def _look(self, name: str, where: str) -> tuple[int, int, int, np.dtype]:
        times = self.schema.names.count(name)
        if times != 1:
            raise FormatError(f"{where}: column {name} is {f'there {times} times' if times else 'missing'}")
        kind = CODES[self.codec(where)[0].name] if name == "hidden_q" else TYPES[name]
        place, width = self.schema.names.index(name), 0
        got, expected = self.schema.types[place], kind
        if name in TENSORS and isinstance(got, pa.FixedShapeTensorType) and len(got.shape) == 1:
            (width,) = got.shape
            got = got.value_type if got == pa.fixed_shape_tensor(got.value_type, got.shape) else got
        elif name in TENSORS:
            expected = f"tensors of one dimension of {kind}"
        if got != expected:
            raise FormatError(f"{where}: column {name}: expected {expected}, got {got}")
        return self._buffers[place], self._buffers[place + 1] - 1, width, np.dtype(kind.to_pandas_dtype())

    def codec(self, where: str) -> tuple[Codec, dict[str, Any]]:
        """The codec of the states, and its facts. Raises FormatError for one that is not known, or other facts than its."""
        if self._codec is None:
            try:
                facts = strict_json((self.schema.metadata or {})[METADATA_KEY], MOST_SCHEMA_BYTES)
            except (KeyError, ValueError) as error:
                raise FormatError(
                    f"{where}: the Arrow metadata does not say codec and hidden size ({error!r})"
                ) from None
            facts = checked_facts(facts, where=where)
            self._codec = codec_named(facts["codec"], where=where), facts
        return self._codec


@lru_cache(maxsize=64)
def _layout(message: bytes) -> Layout:
    return Layout(schema_of(message))


@dataclass(frozen=True)
class Stored:
    """Rows as an Arrow file has them, nothing decoded: how many, and the buffers of their columns."""

    layout: Layout
    rows: int
    buffers: Buffers

    @classmethod
    def of_batches(cls, layout: Layout, batches: list[pa.RecordBatch]) -> "Stored":
        if len(batches) > 1:  # a stranger's file: this writer makes one batch
            batches = pa.Table.from_batches(batches).combine_chunks().to_batches()
        # All in one call: for a short record, asking for one column after another takes longer than its decoding.
        return (
            cls(layout, batches[0].num_rows, batches[0].to_struct_array().buffers()) if batches else cls(layout, 0, [])
        )


def read_stored(data: bytes | memoryview, *, where: str) -> Stored:
    """The rows of an `.arrow` member. Raises DamageError if it is not one."""
    message, batches = _read_batches(data, where)
    return Stored.of_batches(_layout(message), batches)


def read_table(data: bytes | memoryview, *, where: str) -> pa.Table:
    """The same as an Arrow table."""
    message, batches = _read_batches(data, where)
    return pa.Table.from_batches(batches, schema_of(message))


def _read_batches(data: bytes | memoryview, where: str) -> tuple[bytes, list[pa.RecordBatch]]:
    try:
        return read_batches(data)
    except READ_ERRORS as error:
        raise DamageError(f"{where}: not a readable Arrow file: {error}") from None


class _Columns:
    """Stored rows' columns as numpy; `where` is for messages."""

    def __init__(self, rows: Stored | pa.Table, where: str):
        if isinstance(rows, pa.Table):
            rows = Stored.of_batches(Layout(rows.schema), [_from_its_start(batch) for batch in rows.to_batches()])
        self.layout, self.where, self._rows, self._buffers = rows.layout, where, rows.rows, rows.buffers

    def values(self, name: str) -> np.ndarray:
        """A column without nulls: `[R]`, or `[R, n]` of fixed-shape tensors.

        Raises FormatError if it is missing or not as it should be, DamageError if a value is null.
        """
        values, nulls = self._column(name)
        if nulls is not None:
            raise DamageError(f"{self.where}: column {name}: expected a value in every row, got {len(nulls)} nulls")
        return values

    def targets(self, name: str) -> np.ndarray:
        """A column `[R]`, NO_TARGET for null."""
        values, nulls = self._column(name)
        if nulls is not None:
            values = values.copy()
            values[nulls] = NO_TARGET
        return values

    def _column(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """All its values, and the rows that have none. From its buffers: pyarrow's own ways to numpy take much longer."""
        first, last, width, dtype = self.layout.column(name, self.where)
        rows = self._rows
        shape, size = ((rows, width), rows * width) if name in TENSORS else (rows, rows)
        if not size:
            return np.empty(shape, dtype), None
        values = np.frombuffer(self._buffers[last], dtype, size).reshape(shape)
        if width and (nulls := self._nulls(first + 1, size)) is not None:
            raise DamageError(f"{self.where}: column {name}: expected a number in every place, got {len(nulls)} nulls")
        return values, self._nulls(first, rows)

    def _nulls(self, number: int, count: int) -> np.ndarray | None:
        """Where a buffer of valid bits, which stands only where there may be nulls, has zeros; None if nowhere."""
        bits = self._buffers[number]
        nulls = None if bits is None else _unset(bytes(bits), count)
        return None if nulls is None or not len(nulls) else nulls


def _from_its_start(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows in buffers that begin with them; those of a slice do not."""
    if any(column.offset for column in batch.columns):
        return pa.ipc.read_record_batch(batch.serialize(), batch.schema)
    return batch


@lru_cache(maxsize=4)  # a record's four columns of targets lack the same rows
def _unset(bits: bytes, count: int) -> np.ndarray:
    """Which of the first `count` bits are 0."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:count] == 0)


def question_rows(rows: Stored | pa.Table, *, where: str) -> QuestionRows:
    """Decode what a `.question.arrow` member holds."""
    columns = _Columns(rows, where)
    plain = {name: columns.values(name) for name in ("turn", "position", "token_id")}
    return QuestionRows(**plain, hidden=_states(columns))


def answer_rows(rows: Stored | pa.Table, *, where: str) -> AnswerRows:
    """Decode what an `.answer.arrow` member holds."""
    columns = _Columns(rows, where)
    top_ids, top_logits = _pair(columns, "topk_ids", "topk_logits")
    sampled = None
    if "sample_ids" in columns.layout.names:
        ids, counts = _pair(columns, "sample_ids", "sample_counts")
        sampled = SampledTargets(ids=ids, counts=counts, entropy=columns.values("entropy"))
    plain = {name: columns.values(name) for name in ("turn", "position", "token_id", "logsumexp")}
    targets = {name: columns.targets(name) for name in ("target_id", "target_start", "target_end", "target_logit")}
    top = {"topk_ids": top_ids, "topk_logits": top_logits}
    return AnswerRows(**plain, **targets, **top, sampled=sampled, hidden=_states(columns))


def _states(columns: _Columns) -> np.ndarray:
    codec, facts = columns.layout.codec(columns.where)
    return codec.decode({name: columns.values(name) for name in codec.columns}, facts)


def _pair(columns: _Columns, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of tensors of the same shape."""
    pair = columns.values(first), columns.values(second)
    if pair[0].shape != pair[1].shape:
        shapes = [list(values.shape) for values in pair]
        raise FormatError(f"{columns.where}: {first} of {shapes[0]}, {second} of {shapes[1]}: expected the same")
    return pair
