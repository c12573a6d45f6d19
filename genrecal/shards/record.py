"""One sample's teacher states, in memory and as Arrow IPC files.

Letters used for shapes: R rows, D hidden size of the teacher, k stored logits per row, K draws per row, V head rows.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrecal.errors import DamageError, FormatError
from genrecal.samples import Sample
from genrecal.shards.codecs import Codec, Coded, checked_facts, codec_named, compression_of, decode
from genrecal.shards.strict_json import strict_json

METADATA_KEY = b"genrecal"
MAX_SCHEMA_BYTES = 2**16
MAX_COLUMNS = 64
MAX_BATCHES = 64  # this writer makes one
NO_TARGET = -1  # in memory; null on disk
READ_ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, LookupError, TypeError, OverflowError, MemoryError)
SCALARS = {
    **dict.fromkeys(("turn", "position", "token_id", "target_id", "target_start", "target_end"), pa.int32()),
    **dict.fromkeys(("target_logit", "logsumexp", "entropy"), pa.float32()),
}
TENSORS = {"topk_ids": pa.int32(), "topk_logits": pa.float32(), "sample_ids": pa.int32(), "sample_counts": pa.uint16()}


@dataclass(frozen=True, kw_only=True)
class QuestionRows:
    """The teacher's states over the Q segments, in sequence order.

    turn, position, token_id: int32 `[R]`. states: `[R, D]`, float32 as they were captured, or coded as they were read; None
    where they were not read.
    """

    turn: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    states: np.ndarray | Coded | None

    @property
    def hidden(self) -> np.ndarray:
        """float32 `[R, D]`: the states, decoded on the CPU. Raises FormatError where there are none."""
        if isinstance(self.states, np.ndarray):
            return self.states
        return decode(self.coded.columns, self.coded.facts).numpy()

    @property
    def coded(self) -> Coded:
        """The states as they are stored."""
        if self.states is None:
            raise FormatError(
                "there are no states: they were not read, or not stored (`genrecal cache --store targets`)"
            )
        return Coded.plain(self.states) if isinstance(self.states, np.ndarray) else self.states

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
    states. The states are what the body gave, rounded to bf16; the targets come from the unrounded state.

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


def to_arrow(rows: QuestionRows, codec: Codec | None) -> bytes:
    """Rows -> the bytes of an Arrow IPC file, buffers compressed as the codec says. The same rows give the same bytes.

    Without a codec the states are left out.

    Raises SampleError for states that a codec cannot hold.
    """
    columns: dict[str, pa.Array] = {
        name: pa.array(getattr(rows, name), pa.int32()) for name in ("turn", "position", "token_id")
    }
    facts, compression = None, compression_of("none")
    if codec is not None:
        states = rows.hidden
        columns |= {name: _tensors(values) for name, values in codec.encode(states).items()}
        facts = {METADATA_KEY: json.dumps(codec.facts(states.shape[1]), sort_keys=True)}
        compression = codec.compression
    if isinstance(rows, AnswerRows):
        for name in ("target_id", "target_start", "target_end", "target_logit"):
            columns[name] = pa.array(getattr(rows, name), SCALARS[name], mask=~rows.predicts)
        columns["topk_ids"] = _tensors(rows.topk_ids.astype(np.int32, copy=False))
        columns["topk_logits"] = _tensors(rows.topk_logits.astype(np.float32, copy=False))
        columns["logsumexp"] = pa.array(rows.logsumexp, pa.float32())
        if rows.sampled is not None:
            columns["sample_ids"] = _tensors(rows.sampled.ids.astype(np.int32, copy=False))
            columns["sample_counts"] = _tensors(rows.sampled.counts.astype(np.uint16, copy=False))
            columns["entropy"] = pa.array(rows.sampled.entropy, pa.float32())
    return arrow_file(pa.table(columns).replace_schema_metadata(facts), compression)


def arrow_file(table: pa.Table, compression: str | None) -> bytes:
    """A table as an Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _tensors(values: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


# --------------------------------------------------------------------------------------------------- Arrow file -> rows


def read_table(data: bytes | memoryview, *, where: str, states: bool = True) -> pa.Table:
    """The rows of an `.arrow` member; without the columns of their states if `states` is False.

    Raises DamageError if it is no Arrow IPC file of numbers and tensors.
    """
    buffer = pa.py_buffer(data)
    try:
        file = pa.ipc.open_file(buffer)
        _check_schema(file.schema, file.num_record_batches)
        if not states:
            kept = [i for i, name in enumerate(file.schema.names) if not name.startswith("hidden_")]
            file = pa.ipc.open_file(buffer, options=pa.ipc.IpcReadOptions(included_fields=kept))
        table = file.read_all()
        table.validate()
    except READ_ERRORS as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DamageError(f"{where}: not a readable Arrow file: {reason}") from None
    return table


def _check_schema(schema: pa.Schema, batches: int) -> None:
    """Raises ValueError for what this format has not, before a column is read."""
    if len(schema) > MAX_COLUMNS or batches > MAX_BATCHES:
        raise ValueError(
            f"{len(schema)} columns, {batches} record batches; the limits are {MAX_COLUMNS} and {MAX_BATCHES}"
        )
    for name, kind in zip(schema.names, schema.types, strict=True):
        inner = kind.value_type if isinstance(kind, pa.FixedShapeTensorType) else kind
        if not (pa.types.is_integer(inner) or pa.types.is_floating(inner)):
            raise ValueError(f"column {name!r} of type {kind}; expected numbers, or tensors of one shape")


class _Columns:
    """A table's columns as numpy; `where` is for messages."""

    def __init__(self, table: pa.Table, where: str):
        self.table, self.where = table, where

    def codec(self) -> tuple[Codec, dict[str, Any]]:
        """The codec of the states, and its facts. Raises FormatError for one that is not known, or other facts than its."""
        try:
            facts = strict_json((self.table.schema.metadata or {})[METADATA_KEY], MAX_SCHEMA_BYTES)
        except (KeyError, ValueError) as error:
            raise FormatError(
                f"{self.where}: the Arrow metadata does not give codec and hidden size ({error!r})"
            ) from None
        facts = checked_facts(facts, where=self.where)
        return codec_named(facts["codec"], where=self.where), facts

    def scalars(self, name: str) -> np.ndarray:
        """A column `[R]`. Raises FormatError if it is missing or of another type, DamageError if a value is null."""
        return self._full(name, self._column(name, SCALARS[name])).to_numpy()

    def targets(self, name: str) -> np.ndarray:
        """A column `[R]`, NO_TARGET for null."""
        return np.array(pc.fill_null(self._column(name, SCALARS[name]), NO_TARGET))

    def tensors(self, name: str, kind: pa.DataType, width: int | None = None) -> np.ndarray:
        """A column of tensors `[R, n]`; n is `width`, or free. Raises as `scalars`."""
        found = self._field(name).type
        width = found.shape[0] if width is None and getattr(found, "shape", None) else width or 0
        column = self._full(name, self._column(name, pa.fixed_shape_tensor(kind, [width]))).storage.flatten()
        return self._full(name, column).to_numpy().reshape(-1, width)

    def pair(self, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
        """Two columns of tensors of the same shape."""
        a, b = self.tensors(first, TENSORS[first]), self.tensors(second, TENSORS[second])
        if a.shape != b.shape:
            raise FormatError(
                f"{self.where}: {first} of {list(a.shape)}, {second} of {list(b.shape)}: expected the same"
            )
        return a, b

    @property
    def has_states(self) -> bool:
        """Whether states are stored: they have columns and, in the schema's metadata, a codec."""
        coded = METADATA_KEY in (self.table.schema.metadata or {})
        return coded or any(name.startswith("hidden_") for name in self.table.schema.names)

    def states(self) -> Coded:
        codec, facts = self.codec()
        columns = {
            name: self.tensors(name, pa.from_numpy_dtype(dtype), width)
            for name, (dtype, width) in codec.columns(facts["hidden_size"]).items()
        }
        return Coded(facts=facts, columns=columns)

    def _field(self, name: str) -> pa.Field:
        times = self.table.schema.names.count(name)
        if times != 1:
            raise FormatError(f"{self.where}: column {name} is {f'there {times} times' if times else 'missing'}")
        return self.table.schema.field(name)

    def _column(self, name: str, expected: pa.DataType) -> pa.Array:
        if (got := self._field(name).type) != expected:
            raise FormatError(f"{self.where}: column {name}: expected {_plain(expected)}, got {_plain(got)}")
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def _full(self, name: str, array: pa.Array) -> pa.Array:
        if array.null_count:
            raise DamageError(f"{self.where}: column {name}: expected no nulls, got {array.null_count}")
        return array


def _plain(kind: pa.DataType) -> str:
    """A type as a message names it."""
    return f"{kind.value_type} tensors of {kind.shape}" if isinstance(kind, pa.FixedShapeTensorType) else str(kind)


def question_rows(table: pa.Table, *, where: str) -> QuestionRows:
    """What a `.question.arrow` member holds."""
    columns = _Columns(table, where)
    return QuestionRows(**_places(columns), states=columns.states())


def answer_rows(table: pa.Table, *, where: str, states: bool = True) -> AnswerRows:
    """What an `.answer.arrow` member holds; without its states if `states` is False or none are stored."""
    columns = _Columns(table, where)
    top_ids, top_logits = columns.pair("topk_ids", "topk_logits")
    sampled = None
    if "sample_ids" in table.schema.names:
        ids, counts = columns.pair("sample_ids", "sample_counts")
        sampled = SampledTargets(ids=ids, counts=counts, entropy=columns.scalars("entropy"))
    return AnswerRows(
        **_places(columns),
        states=columns.states() if states and columns.has_states else None,
        **{name: columns.targets(name) for name in ("target_id", "target_start", "target_end", "target_logit")},
        topk_ids=top_ids,
        topk_logits=top_logits,
        logsumexp=columns.scalars("logsumexp"),
        sampled=sampled,
    )


def _places(columns: _Columns) -> dict[str, np.ndarray]:
    return {name: columns.scalars(name) for name in ("turn", "position", "token_id")}
