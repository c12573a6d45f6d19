"""Arrow IPC files of fixed-width columns, read with a bound: a few bytes cannot ask for gigabytes.

The messages are read one after another, as a stream has them, and each is checked before it is decoded; the footer, which
could name other places, or one place a million times, is not used.
Reference: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

import functools
import json
import math
import operator
import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

MAGIC, END = b"ARROW1", b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of a file, and of its messages
METADATA_KEY = b"genrecal"
MOST_SCHEMA_BYTES = 2**16
MOST_COLUMNS = 64
MOST_BATCHES = 1024
MOST_WIDTH = 2**20  # channels of a state
FREE_BYTES = 2**28  # that any file may take in memory, however small it is
EXPANSION = 32  # bytes in memory that each byte of a file may take besides; states as float32 take 3 (bf16) to 8 (int4)
INT32, UINT32, UINT16, INT64 = (struct.Struct(code) for code in ("<i", "<I", "<H", "<q"))
READ_ERRORS = (
    pa.ArrowException, OSError, EOFError, ValueError, LookupError, TypeError, OverflowError, MemoryError, RecursionError,
    struct.error,
)  # fmt: skip


def read_batches(data: bytes | memoryview) -> tuple[bytes, list[pa.RecordBatch]]:
    """The message that holds an Arrow IPC file's schema, for `schema_of`, and its record batches.

    Raises one of READ_ERRORS for what is no such file, or would take more than it may.
    """
    allowed, rows, taken = allowed_bytes(len(data)), 0, 0
    said, messages = _messages(data)
    schema, row_bytes = schema_of(said), _row_bytes(said)
    batches = []
    for message in messages:
        length, sizes = batch_sizes(message)
        rows, taken = rows + length, taken + sum([raw for _, raw in sizes])
        if rows * row_bytes > allowed or taken > allowed:
            raise ValueError(
                f"{rows} rows of {row_bytes} bytes, {taken} bytes decompressed: over {allowed}, the limit for a file of "
                f"{len(data)} bytes"
            )
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate()
        batches.append(batch)
    return said, batches


# Of the columns, as `RecordBatch.to_struct_array().buffers()` orders them; None for one that is absent.
Buffers = list[Any]


def allowed_bytes(file_bytes: int) -> int:
    """What a file of that size may take in memory, its states as float32 beside its columns."""
    return FREE_BYTES + EXPANSION * file_bytes


def expanded_bytes(schema: pa.Schema) -> int:
    """What a row takes in memory: its columns, and its state as float32. Raises ValueError for other than fixed widths."""
    if len(schema) > MOST_COLUMNS:
        raise ValueError(f"{len(schema)} columns; the limit is {MOST_COLUMNS}")
    row_bits = sum(_bits(field) for field in schema)
    try:
        width = json.loads((schema.metadata or {})[METADATA_KEY])["hidden_size"]
    except (ValueError, LookupError, TypeError, RecursionError):
        width = 0  # nothing can be decoded without it
    if type(width) is not int or not 0 <= width <= MOST_WIDTH:
        raise ValueError(f"hidden_size {width!r} in the metadata; the limit is {MOST_WIDTH}")
    return -(-row_bits // 8) + 4 * width


def _bits(field: pa.Field) -> int:
    """Bits of a column's value in one row."""
    kind, count = field.type, 1
    if isinstance(kind, pa.FixedShapeTensorType):
        kind, count = kind.value_type, math.prod(kind.shape)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"column {field.name!r} of type {field.type}; expected numbers, or tensors of one shape")
    return int(kind.bit_width) * count


def schema_and_batches(data: bytes | memoryview) -> tuple[pa.Schema, Iterator[Any]]:
    """A file's schema, and its record batch messages, nothing of them decompressed."""
    said, messages = _messages(data)
    return schema_of(said), messages


def _messages(data: bytes | memoryview) -> tuple[bytes, Iterator[Any]]:
    """The schema's message, and those of the record batches."""
    if len(data) < 16 or data[:6] != MAGIC or data[-6:] != MAGIC:
        raise ValueError(f"it does not begin and end with {MAGIC.decode()}")
    source = pa.BufferReader(data)
    source.seek(8)  # the magic word and padding
    message = pa.ipc.read_message(source)
    if message.type != "schema" or message.metadata.size > MOST_SCHEMA_BYTES or (message.body or b""):
        raise ValueError(f"a {message.type} of {message.metadata.size} bytes where its schema should be")
    return bytes(data[8 : source.tell()]), _batches(source)


@functools.lru_cache(maxsize=64)  # all files of a cache have the same two schemas
def schema_of(message: bytes) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(message))


@functools.lru_cache(maxsize=64)
def _row_bytes(message: bytes) -> int:
    return expanded_bytes(schema_of(message))


def _batches(source: pa.BufferReader) -> Iterator[Any]:
    count = 0
    while True:
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            return
        count += 1
        if message.type != "record batch" or count > MOST_BATCHES:
            raise ValueError(f"a {message.type} as message {count}; expected record batches, at most {MOST_BATCHES}")
        yield message


def batch_sizes(message: Any) -> tuple[int, list[tuple[int, int]]]:
    """A record batch message's rows, and of each buffer the bytes as they stand there and decompressed.

    A compressed buffer begins with its length when decompressed (int64; -1: it is not), which is what Arrow allocates.
    """
    said = memoryview(message.metadata)
    length, starts, sizes = _record_batch(said)
    body = memoryview(message.body or b"")
    if length < 0:
        raise ValueError(f"a record batch of {length} rows")
    if sizes and (min(starts) < 0 or min(sizes) < 0 or max(map(operator.add, starts, sizes)) > len(body)):
        raise ValueError(f"a buffer that is not within its body of {len(body)} bytes")
    expanded = [_expanded(body, *place) for place in zip(starts, sizes, strict=True)] if _is_compressed(said) else sizes
    return length, list(zip(sizes, expanded, strict=True))


def _expanded(body: memoryview, start: int, size: int) -> int:
    if not size:
        return 0
    (raw,) = INT64.unpack_from(body, start)
    raw = size - 8 if raw == -1 else raw
    if raw < 0:
        raise ValueError(f"a buffer of {raw} bytes when decompressed")
    return int(raw)


def _record_batch(message: memoryview) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """A record batch message's rows, and its buffers' starts in its body and their sizes.

    Reads the fields that it needs of the flatbuffer: Message.header -> RecordBatch.length, .buffers.
    """
    batch = _header(message)
    length = _field_at(message, batch, 0)
    vector = _follow(message, _field_at(message, batch, 2))
    count = _number(message, UINT32, vector)
    if 16 * count > len(message):  # before a format of that length is made of it
        raise ValueError(f"{count} buffers in a message of {len(message)} bytes")
    numbers = struct.unpack_from(f"<{2 * count}q", message, vector + 4)
    return _number(message, INT64, length) if length else 0, numbers[::2], numbers[1::2]


def _is_compressed(message: memoryview) -> bool:
    """Whether a record batch message's buffers are: whether RecordBatch.compression is there."""
    return bool(_field_at(message, _header(message), 3))


def _header(message: memoryview) -> int:
    return _follow(message, _field_at(message, _number(message, UINT32, 0), 2))


def _field_at(message: memoryview, table: int, index: int) -> int:
    """Where a table's field stands; 0 if it is absent."""
    vtable = table - _number(message, INT32, table)
    entry = 4 + 2 * index
    offset = _number(message, UINT16, vtable + entry) if entry < _number(message, UINT16, vtable) else 0
    return table + offset if offset else 0


def _follow(message: memoryview, at: int) -> int:
    return at + _number(message, UINT32, at)


def _number(message: memoryview, code: struct.Struct, at: int) -> int:
    if at < 0:
        raise ValueError(f"offset {at} in a message")
    value: int = code.unpack_from(message, at)[0]
    return value
