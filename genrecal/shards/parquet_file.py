"""Parquet files, checked before they are decoded: a few bytes cannot ask for gigabytes.

A footer says what pages hold, but what a reader allocates is what each page's own header says, and a run of a million equal
values takes two bytes. So the headers are read here first: Thrift's compact protocol, of which three numbers are used.
References: https://parquet.apache.org/docs/file-format/data-pages/ and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FREE_BYTES = 2**25  # that any file may take in memory, however small it is
EXPANSION = 64  # bytes in memory that each byte of a file may take besides
VALUE_BYTES = 16  # a value's share while it is decoded
MOST_LISTED = 256  # row groups, columns, or anything else that a footer lists
PLAIN_TYPES = ("BOOLEAN", "INT32", "INT64", "FLOAT", "DOUBLE")
ENCODINGS = (0, 2, 3, 8)  # plain, dictionary, runs, dictionary; prefixes of strings (7) would need a bound of their own
PAGES = {5: 2, 7: 2, 8: 4}  # fields of a page header (data, dictionary, data of version 2): where their encoding stands
INT32, DEEPEST = 5, 8  # its number in the compact protocol; structs in each other, of which a page header has three


@contextmanager
def open_parquet(file: BinaryIO, most_footer_bytes: int, **options: Any) -> Iterator[pq.ParquetFile]:
    """A `pyarrow.parquet.ParquetFile` whose footer is not longer than that. `file` is a file to read, seekable."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(8)[:4], "little")
    if length > min(most_footer_bytes, size):
        raise ValueError(f"its footer claims {length} bytes; the limit is {min(most_footer_bytes, size)}")
    with pq.ParquetFile(
        file,
        page_checksum_verification=True,
        thrift_string_size_limit=most_footer_bytes,
        thrift_container_size_limit=MOST_LISTED,
        **options,
    ) as opened:
        yield opened


def read_columns(opened: pq.ParquetFile, file: BinaryIO, names: Sequence[str]) -> pa.Table:
    """These columns of the Parquet file that `file` was opened as.

    Raises ValueError if they would take more memory than a file of its size may.
    """
    allowed = FREE_BYTES + EXPANSION * file.seek(0, io.SEEK_END)
    sums = _column_sums(opened.metadata, file, names)
    wanted = sum(column.bytes + VALUE_BYTES * max(column.values, column.claimed) for column in sums)
    if wanted > allowed:
        raise ValueError(f"its pages would take {wanted} bytes; the limit for a file of its size is {allowed}")
    # Each text may be the longest that its dictionary has; only where that is too much are they counted.
    if sum(column.values * column.longest_bytes for column in sums if column.is_text) > allowed:
        wanted = _counted_text_bytes(opened, file, names, [column.path for column in sums if column.is_text])
        if wanted > allowed:
            raise ValueError(f"its texts would take {wanted} bytes; the limit for a file of its size is {allowed}")
    return opened.read(list(names)).select(list(names))


def _counted_text_bytes(opened: pq.ParquetFile, file: BinaryIO, names: Sequence[str], paths: list[str]) -> int:
    """Bytes of all texts, each as often as it is there, found without making one of them twice."""
    with pq.ParquetFile(file, metadata=opened.metadata, read_dictionary=paths) as coded:
        if not all(_has_no_plain_text(coded.schema_arrow.field(name).type) for name in names):
            raise ValueError("its texts cannot be counted before they are decoded")
        table = coded.read(list(names))
    return sum(_text_bytes(chunk) for column in table.columns for chunk in column.chunks)


def _has_no_plain_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return True
    if kind.num_fields:
        return all(_has_no_plain_text(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_primitive(kind))


def _text_bytes(array: pa.Array) -> int:
    """The bytes of an array's texts, each as often as it is there."""
    if pa.types.is_dictionary(array.type):
        return int(pc.sum(pc.binary_length(array.dictionary).take(array.indices).cast(pa.int64())).as_py() or 0)
    if pa.types.is_struct(array.type):
        return sum(_text_bytes(array.field(i)) for i in range(array.type.num_fields))
    return _text_bytes(array.flatten()) if array.type.num_fields else 0


# ------------------------------------------------------------------------------------------------------------------ pages


@dataclass
class _ColumnSums:
    """What the pages of a column hold: bytes decompressed, values (a dictionary's too), and the longest dictionary.

    `claimed` is the number of values that the footer says, which a reader makes room for.
    """

    path: str
    is_text: bool
    claimed: int = 0
    bytes: int = 0
    values: int = 0
    longest_bytes: int = 0


def _column_sums(metadata: pq.FileMetaData, file: BinaryIO, names: Sequence[str]) -> list[_ColumnSums]:
    """Of each leaf of these columns, by its pages' headers. Raises ValueError for what the format does not have."""
    if (metadata.created_by or "").lower().startswith("parquet-mr"):
        raise ValueError("written by parquet-mr, of which some versions' pages are longer than they say")
    sums: dict[str, _ColumnSums] = {}
    file_bytes = file.seek(0, io.SEEK_END)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            path = column.path_in_schema
            if path.partition(".")[0] not in names:
                continue
            is_text = column.physical_type == "BYTE_ARRAY"
            if not is_text and column.physical_type not in PLAIN_TYPES:
                raise ValueError(f"column {path} of type {column.physical_type}")
            start = column.data_page_offset
            if column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            size = column.total_compressed_size
            if start < 0 or size < 0 or column.num_values < 0 or start + size > file_bytes:
                raise ValueError(f"column {path}: {column.num_values} values, {size} bytes at {start}")
            entry = sums.setdefault(path, _ColumnSums(path, is_text))
            entry.claimed += column.num_values
            file.seek(start)
            _add_pages(entry, file.read(size))
    return list(sums.values())


def _add_pages(sums: _ColumnSums, chunk: bytes) -> None:
    """Add the pages that stand one after another in a column chunk."""
    at = 0
    try:
        while at < len(chunk):
            header, at = _struct(chunk, at, 0)
            raw, size = header[2], header[3]
            places = [place for place in PAGES if place in header]
            if raw < 0 or size < 0 or len(places) > 1:
                raise ValueError(f"column {sums.path}: a page of {size} bytes, {raw} decompressed")
            at += size
            sums.bytes += raw
            for place in places:
                page = header[place]
                if page[1] < 0 or page[PAGES[place]] not in ENCODINGS:
                    raise ValueError(f"column {sums.path}: {page[1]} values in encoding {page[PAGES[place]]}")
                sums.values += page[1]
                if place == 7:
                    sums.longest_bytes = max(sums.longest_bytes, raw)
    except (LookupError, TypeError):
        raise ValueError(f"column {sums.path}: a page header that cannot be read") from None
    if at > len(chunk):
        raise ValueError(f"column {sums.path}: a page that is longer than its column")


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """A struct's int32 and struct fields by number, and where it ends. Raises IndexError where the data ends before it."""
    if depth > DEEPEST:
        raise ValueError(f"a page header of more than {DEEPEST} levels")
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, at = _integer(data, at)
        value, at = _value(data, at, kind & 15, depth)
        if value is not None:
            fields[number] = value
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """A field's value if it is an int32 or a struct, else None; and where it ends."""
    if kind in (1, 2):  # true and false, which are no more than their type
        return None, at
    if kind == 3:  # a byte
        return None, at + 1
    if kind in (4, 5, 6):
        value, at = _integer(data, at)
        return value if kind == INT32 else None, at
    if kind == 7:  # a float64
        return None, at + 8
    if kind == 8:  # bytes
        length, at = _varint(data, at)
        return None, at + length
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise ValueError(f"a page header with a field of type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a page header with a number of more than 64 bits")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """A signed number, which stands as 2 n or -2 n - 1."""
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
