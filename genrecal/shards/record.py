"""One sample's teacher states, in memory and as Arrow IPC files.

Letters used for shapes: R rows, D hidden size of the teacher, k stored logits a row, K draws a row, V head rows.
"""

import functools
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrecal.errors import DamageError, FormatError, SampleError
from genrecal.samples import Sample
from genrecal.shards.arrow_file import (
    METADATA_KEY,
    MOST_SCHEMA_BYTES,
    READ_ERRORS,
    allowed_bytes,
    expanded_bytes,
    read_arrow,
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


def read_table(data: bytes | memoryview, *, where: str) -> pa.Table:
    """The Arrow table of an `.arrow` member, nothing decoded. Raises DamageError if it is not one."""
    try:
        return read_arrow(data)
    except READ_ERRORS as error:
        raise DamageError(f"{where}: not a readable Arrow file: {error}") from None


def decode_hidden(table: pa.Table, *, where: str) -> np.ndarray:
    """float32 `[R, D]` of a table, through the codec that its metadata names."""
    try:
        facts = strict_json((table.schema.metadata or {})[METADATA_KEY], MOST_SCHEMA_BYTES)
    except (KeyError, ValueError) as error:
        raise FormatError(f"{where}: the Arrow metadata does not say codec and hidden size ({error!r})") from None
    codec = codec_named(checked_facts(facts, where=where)["codec"], where=where)
    types = TYPES | {"hidden_q": CODES.get(codec.name)}
    columns = {name: tensor(table, name, types[name], where=where, width=True) for name in codec.columns}
    return codec.decode(columns, facts)


def tensor(table: pa.Table, name: str, kind: pa.DataType, *, where: str, width: bool = False) -> np.ndarray:
    """A column without nulls as numpy: `[R]`, or with `width` the `[R, n]` of a fixed-shape tensor column.

    Raises FormatError if it is missing or its values are not of that kind.
    """
    column = _column(table, name, kind, where=where, width=width)
    if column.null_count:
        raise DamageError(f"{where}: column {name}: expected a value in every row, got {column.null_count} nulls")
    if not width:
        return np.asarray(column.to_numpy(zero_copy_only=False))
    if not len(column):
        return np.empty((0, *column.type.shape), column.type.value_type.to_pandas_dtype())
    return np.asarray(column.to_numpy_ndarray())


def _column(table: pa.Table, name: str, kind: pa.DataType, *, where: str, width: bool = False) -> pa.Array:
    """A column as one array."""
    if table.column_names.count(name) != 1:
        times = table.column_names.count(name)
        raise FormatError(f"{where}: column {name} is {f'there {times} times' if times else 'missing'}")
    column = table.column(name)
    got = column.type
    if width and isinstance(got, pa.FixedShapeTensorType) and len(got.shape) == 1:
        got = got.value_type if got == pa.fixed_shape_tensor(got.value_type, got.shape) else got
    elif width:
        kind = f"tensors of one dimension of {kind}"
    if got != kind:
        raise FormatError(f"{where}: column {name}: expected {kind}, got {got}")
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def question_rows(table: pa.Table, *, where: str) -> QuestionRows:
    """Decode a `.question.arrow` table."""
    names = ("turn", "position", "token_id")
    return QuestionRows(
        **{name: tensor(table, name, TYPES[name], where=where) for name in names},
        hidden=decode_hidden(table, where=where),
    )


@functools.lru_cache(maxsize=8)
def _no_target(kind: pa.DataType) -> pa.Scalar:
    return pa.scalar(NO_TARGET, kind)


def _filled(column: pa.Array) -> np.ndarray:
    """A column's values, NO_TARGET for null."""
    return np.asarray(pc.call_function("coalesce", [column, _no_target(column.type)]).to_numpy(zero_copy_only=False))


def answer_rows(table: pa.Table, *, where: str) -> AnswerRows:
    """Decode an `.answer.arrow` table."""
    plain, stored = ("turn", "position", "token_id", "logsumexp"), ("topk_ids", "topk_logits")
    nullable = ("target_id", "target_start", "target_end", "target_logit")
    targets = {name: _filled(_column(table, name, TYPES[name], where=where)) for name in nullable}
    top = {name: tensor(table, name, TYPES[name], where=where, width=True) for name in stored}
    if top["topk_ids"].shape != top["topk_logits"].shape:
        shapes = [list(top[name].shape) for name in stored]
        raise FormatError(f"{where}: topk_ids of {shapes[0]}, topk_logits of {shapes[1]}: expected the same")
    sampled = None
    if "sample_ids" in table.column_names:
        sampled = SampledTargets(
            ids=tensor(table, "sample_ids", TYPES["sample_ids"], where=where, width=True),
            counts=tensor(table, "sample_counts", TYPES["sample_counts"], where=where, width=True),
            entropy=tensor(table, "entropy", TYPES["entropy"], where=where),
        )
        if sampled.ids.shape != sampled.counts.shape:
            shapes = [list(sampled.ids.shape), list(sampled.counts.shape)]
            raise FormatError(f"{where}: sample_ids of {shapes[0]}, sample_counts of {shapes[1]}: expected the same")
    return AnswerRows(
        **{name: tensor(table, name, TYPES[name], where=where) for name in plain},
        **top,
        **targets,
        sampled=sampled,
        hidden=decode_hidden(table, where=where),
    )
