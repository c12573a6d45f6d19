"""Parquet files, checked before they are decoded: a few bytes cannot ask for gigabytes.

A footer says what pages hold, but what a reader allocates is what each page's own header says, and a run of a million equal
values takes two bytes. So the headers are read here first: Thrift's compact protocol, of which a few numbers are used.
References: https://parquet.apache.org/docs/file-format/data-pages/ and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FREE_BYTES = 2**25  # that any file may take in memory, however small it is
EXPANSION = 64  # bytes in memory that each byte of a file may take besides
VALUE_BYTES = 16  # a value's share while it is decoded
MOST_LISTED = 256  # row groups, columns, or anything else that a footer lists
PLAIN_TYPES, BYTE_ARRAY = (0, 1, 2, 4, 5), 6  # boolean, int32, int64, float, double; texts
ENCODINGS = (0, 2, 3, 8)  # plain, dictionary, runs, dictionary; prefixes of strings (7) would need a bound of their own
PAGES = {5: 2, 7: 2, 8: 4}  # fields of a page header (data, dictionary, data of version 2): where their encoding stands
INT16, INT32, INT64, FLOAT64, BYTES, LIST, STRUCT = 4, 5, 6, 7, 8, 9, 12  # kinds of fields in the compact protocol
MOST_REMEMBERED_BYTES = 2**16  # of a footer
DEEPEST, MOST_STRUCTS = 16, 2**17  # of a footer or of a column's page headers
Fields = dict[tuple[int, int], Any]


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
    sums = _column_sums(file, names)
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


def _column_sums(file: BinaryIO, names: Sequence[str]) -> list[_ColumnSums]:
    """Of each leaf of these columns, by its pages' headers. Raises ValueError for what the format does not have.

    The footer is read here as well: asked for a column's place, pyarrow ends the process where its facts contradict.
    """
    file_bytes = file.seek(0, io.SEEK_END)
    footer = _footer(file, file_bytes)
    if footer.get((6, BYTES), b"").lower().startswith(b"parquet-mr"):
        raise ValueError("written by parquet-mr, of which some versions' pages are longer than they say")
    sums: dict[str, _ColumnSums] = {}
    try:
        for group in footer[4, LIST]:
            for chunk in group[1, LIST]:
                column = chunk[3, STRUCT]
                path = b".".join(column[3, LIST]).decode()
                if path.partition(".")[0] in names:
                    _add_column(sums, path, column, file, file_bytes)
    except (LookupError, TypeError):
        raise ValueError("its footer does not say where the columns stand") from None
    return list(sums.values())


def _footer(file: BinaryIO, file_bytes: int) -> Fields:
    file.seek(max(0, file_bytes - 8))
    length = int.from_bytes(file.read(8)[:4], "little")
    file.seek(max(0, file_bytes - 8 - length))
    footer = file.read(length)
    return _parsed(footer) if length <= MOST_REMEMBERED_BYTES else _parse(footer)


def _parse(footer: bytes) -> Fields:
    try:
        return _Compact(footer).struct()
    except IndexError:
        raise ValueError("a footer that cannot be read") from None


_parsed = lru_cache(maxsize=16)(
    _parse
)  # a file's columns are read one by one, and each asks for its footer; nobody changes it


def _add_column(sums: dict[str, _ColumnSums], path: str, column: Fields, file: BinaryIO, file_bytes: int) -> None:
    """Add the pages of one column chunk, of which these are the facts."""
    kind = column[1, INT32]
    is_text = kind == BYTE_ARRAY
    if not is_text and kind not in PLAIN_TYPES:
        raise ValueError(f"column {path} of type {kind}")
    values, size, start = (column[number, INT64] for number in (5, 7, 9))
    dictionary = column.get((11, INT64))
    if dictionary:
        start = min(start, dictionary)
    if start < 0 or size < 0 or values < 0 or start + size > file_bytes:
        raise ValueError(f"column {path}: {values} values, {size} bytes at {start}")
    entry = sums.setdefault(path, _ColumnSums(path, is_text))
    entry.claimed += values
    file.seek(start)
    _add_pages(entry, file.read(size))


def _add_pages(sums: _ColumnSums, chunk: bytes) -> None:
    """Add the pages that stand one after another in a column chunk."""
    source = _Compact(chunk)
    try:
        while source.at < len(chunk):
            header = source.struct()
            raw, size = header[2, INT32], header[3, INT32]
            places = [place for place in PAGES if (place, STRUCT) in header]
            if raw < 0 or size < 0 or len(places) > 1:
                raise ValueError(f"column {sums.path}: a page of {size} bytes, {raw} decompressed")
            source.at += size
            sums.bytes += raw
            for place in places:
                page = header[place, STRUCT]
                values, encoding = page[1, INT32], page[PAGES[place], INT32]
                if values < 0 or encoding not in ENCODINGS:
                    raise ValueError(f"column {sums.path}: {values} values in encoding {encoding}")
                sums.values += values
                if place == 7:
                    sums.longest_bytes = max(sums.longest_bytes, raw)
    except (LookupError, TypeError):
        raise ValueError(f"column {sums.path}: a page header that cannot be read") from None
    if source.at > len(chunk):
        raise ValueError(f"column {sums.path}: a page that is longer than its column")


class _Compact:
    """Structs in Thrift's compact protocol. Reading raises IndexError where the data ends before a struct does.

    A struct is a dict of its fields by number and kind: whole numbers, bytes, structs, and lists of the last two. Others
    are passed over, as a reader does with a field of another kind than it knows.
    """

    def __init__(self, data: bytes):
        self.data, self.at, self.structs = data, 0, 0

    def struct(self, depth: int = 0) -> Fields:
        self.structs += 1
        if depth > DEEPEST or self.structs > MOST_STRUCTS:
            raise ValueError(f"more than {DEEPEST} structs in each other, or {MOST_STRUCTS} in all")
        fields: Fields = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._integer()
            kind &= 15
            value = None if kind in (1, 2) else self._value(kind, depth)  # true and false are no more than their kind
            if value is not None:
                fields[number, kind] = value
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):  # in a list, true and false take a byte
            self.at += 1
        elif kind in (INT16, INT32, INT64):
            return self._integer()
        elif kind == FLOAT64:
            self.at += 8
        elif kind == BYTES:
            length = self._varint()
            self.at += length
            return self.data[self.at - length : self.at]
        elif kind == LIST:
            return self._list(depth)
        elif kind == STRUCT:
            return self.struct(depth + 1)
        else:
            raise ValueError(f"a field of kind {kind}")
        return None

    def _list(self, depth: int) -> list[Any] | None:
        head = self._byte()
        count, kind = head >> 4, head & 15
        if count == 15:
            count = self._varint()
        if count > MOST_LISTED:
            raise ValueError(f"a list of {count}; the limit is {MOST_LISTED}")
        values = [self._value(kind, depth) for _ in range(count)]
        return values if kind in (BYTES, STRUCT) else None

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        """A signed number, which stands as 2 n or -2 n - 1."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
