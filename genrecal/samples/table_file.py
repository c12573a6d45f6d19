"""Parquet files and Arrow files of Hugging Face datasets: a record is a row, its pictures bytes in a column.

Parquet pages cannot be entered in the middle, so a row group is decoded once, a few rows at a time, into a temporary file
and read from there; Arrow files are mapped into memory and read in place.
"""

import hashlib
import itertools
import json
import os
import tempfile
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrecal.errors import DataError, GenrecalError, SampleError

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
READ_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError)

NO_UTF8 = "not UTF-8 text"
BLOCK_ROWS = 16  # rows of Parquet that are decoded at once
STREAM_BYTES = 2**20  # read ahead in each column
SPOOLS = 8  # row groups that are kept decoded: three shards are made at once, each perhaps between two groups
SPOOLED = "\0bytes"  # stands for bytes in a row's JSON
WHOLE_DIGEST_BYTES, SLICES, SLICE_BYTES = 2**22, 64, 2**16


@dataclass
class TableFile:
    """One file with the rows of each of its parts: row groups of Parquet, record batches of Arrow."""

    path: Path
    schema: pa.Schema
    starts: np.ndarray  # int64 [parts + 1]
    spools: "Spools"
    batches: Sequence[pa.RecordBatch] | None = None  # of Arrow, in mapped memory

    def __len__(self) -> int:
        return int(self.starts[-1])

    def location(self, row: int) -> str:
        """The file and the row, counted from 0."""
        return f"{self.path} row {row}"

    def record(self, row: int) -> Any:
        """One row. Raises SampleError for text that is no UTF-8, DataError if the file is damaged."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        place = row - int(self.starts[part])
        try:
            if self.batches is not None:
                return _row(self.batches[part].slice(place, 1))
            return self.spools.get(self.path, part).row(place)
        except GenrecalError:
            raise
        except READ_ERRORS as error:
            kind = "row group" if self.batches is None else "record batch"
            raise self._damaged(f"{kind} {part}", error) from None

    def labels(self) -> Iterator[Any]:
        """The columns of texts and numbers, which hold what a record is called by."""
        columns = [
            column.name
            for column in self.schema
            if not (
                pa.types.is_nested(column.type)
                or pa.types.is_binary(column.type)
                or pa.types.is_large_binary(column.type)
            )
        ]
        if not columns:
            yield from ({} for _ in range(len(self)))
            return
        try:
            for block in self._blocks(columns):
                for place in range(block.num_rows):
                    try:
                        yield _row(block.slice(place, 1))
                    except SampleError:
                        yield None
        except READ_ERRORS as error:
            raise self._damaged(f"columns {', '.join(columns)}", error) from None

    def sha256(self) -> str:
        """Of a file up to 4 MiB as it is; of a larger one, of its size, 64 pieces spread over it, and its end."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            if size <= WHOLE_DIGEST_BYTES:
                return hashlib.file_digest(file, "sha256").hexdigest()
            digest = hashlib.sha256(str(size).encode())
            for start in np.linspace(0, size - SLICE_BYTES, SLICES).astype(np.int64).tolist():
                file.seek(start)
                digest.update(file.read(SLICE_BYTES))
            file.seek(size - 8)
            file.seek(size - min(size, int.from_bytes(file.read(4), "little") + 8))  # Parquet's footer
            digest.update(file.read(WHOLE_DIGEST_BYTES))
        return digest.hexdigest()

    def _blocks(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if self.batches is not None:
            yield from (batch.select(columns) for batch in self.batches)
            return
        with pq.ParquetFile(self.path) as opened:
            yield from opened.iter_batches(columns=columns, use_threads=False)

    def _damaged(self, what: str, error: Exception) -> DataError:
        return DataError(f"{self.path}: {what} cannot be read: {_words(error)}; copy or download the file again")


def open_table(path: Path, spools: "Spools") -> TableFile:
    """Open a `.parquet`, `.arrow` or `.feather` file. Raises DataError if it is none."""
    try:
        return (_open_parquet if path.suffix.lower() == ".parquet" else _open_arrow)(path, spools)
    except GenrecalError:
        raise
    except READ_ERRORS as error:
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
        raise DataError(f"{path}: not a readable {kind} file: {_words(error)}") from None


def _open_parquet(path: Path, spools: "Spools") -> TableFile:
    with path.open("rb") as file, pq.ParquetFile(file) as opened:
        groups = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
        return TableFile(path, opened.schema_arrow, _starts(path, groups), spools)


def _open_arrow(path: Path, spools: "Spools") -> TableFile:
    schema, batches = _mapped_batches(path)
    return TableFile(path, schema, _starts(path, [batch.num_rows for batch in batches]), spools, batches)


def _mapped_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """A file's batches in mapped memory; a compressed one is unpacked into a temporary file first."""
    source = pa.memory_map(str(path))
    whole = source.read_buffer()
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(whole))  # as `datasets` writes it
        read = iter(reader)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(pa.BufferReader(whole))
        read = map(reader.get_batch, range(reader.num_record_batches))
    batches = []
    for batch in read:
        buffers = [
            buffer for column in batch.columns for buffer in column.buffers() if buffer is not None and buffer.size
        ]
        if not all(whole.address <= buffer.address < whole.address + whole.size for buffer in buffers):
            break
        batches.append(batch)
    else:
        return reader.schema, batches
    with tempfile.NamedTemporaryFile() as plain:
        with pa.ipc.new_stream(plain, reader.schema) as writer:
            for each in itertools.chain(batches, [batch], read):
                writer.write_batch(each)
        plain.flush()
        return _mapped_batches(Path(plain.name))


def _starts(path: Path, lengths: Sequence[int]) -> np.ndarray:
    if any(length < 0 for length in lengths):
        raise DataError(f"{path}: not a readable file: a part of {min(lengths)} rows")
    return np.cumsum([0, *lengths], dtype=np.int64)


def _row(block: pa.RecordBatch) -> Any:
    """A block of one row -> its record. Raises SampleError for text that is no UTF-8."""
    try:
        block.validate(full=True)  # a mapped file may hold anything; texts of Parquet are not checked when decoded
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        raise SampleError(NO_UTF8) from None
    [record] = _records(block)
    return record


def _records(block: pa.RecordBatch) -> list[dict[str, Any]]:
    """A block's rows; what is of the hub's type Json() is unpacked, in whatever depth, as `datasets` does it."""
    return [
        {name: _unpacked(value, block.schema.field(name).type) for name, value in row.items()}
        for row in block.to_pylist()
    ]


def _unpacked(value: Any, kind: pa.DataType) -> Any:
    if value is None or "arrow.json" not in str(kind):
        return value
    if isinstance(kind, pa.JsonType):
        found = json.loads(value)
        return found if isinstance(found, (str, list, dict)) else value  # `datasets` writes the text "42" as 42
    if pa.types.is_struct(kind):
        return {name: _unpacked(item, kind.field(name).type) for name, item in value.items()}
    return [_unpacked(item, kind.value_type) for item in value]


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# -------------------------------------------------------------------------------------------------------------- Parquet


class Spools:
    """The row groups of an input's Parquet files that were asked for last, each decoded once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last: OrderedDict[tuple[Path, int], _Spool] = OrderedDict()

    def get(self, path: Path, group: int) -> "_Spool":
        """A row group's rows. One is decoded at a time; the one that was not asked for the longest goes for a new one."""
        with self.lock:
            if (path, group) not in self.last:
                while len(self.last) >= SPOOLS:
                    self.last.popitem(last=False)
                self.last[path, group] = _Spool(path, group)
            self.last.move_to_end((path, group))
            return self.last[path, group]


class _Spool:
    """The rows of one row group in an unnamed temporary file: of each row its pictures, then the rest as JSON."""

    def __init__(self, path: Path, group: int):
        self.file = tempfile.TemporaryFile()
        places = array("q")
        for record in _records_of_group(path, group):
            text = json.dumps(self._packed(record), default=str).encode()
            places.extend((self._write(text), len(text)))
        self.places = np.array(places, np.int64).reshape(-1, 2)  # of each row's JSON: first byte, size

    def row(self, row: int) -> Any:
        """One row. Raises SampleError for text that is no UTF-8."""
        record = self._unpacked(json.loads(self._read(*self.places[row].tolist())))
        if isinstance(record, str):
            raise SampleError(record)
        return record

    def _packed(self, value: Any) -> Any:
        if isinstance(value, bytes):
            return {SPOOLED: [self._write(value), len(value)]}
        if isinstance(value, dict):
            return {name: self._packed(item) for name, item in value.items()}
        return [self._packed(item) for item in value] if isinstance(value, list) else value

    def _unpacked(self, value: Any) -> Any:
        if isinstance(value, dict):
            if SPOOLED in value:
                return self._read(*value[SPOOLED])
            return {name: self._unpacked(item) for name, item in value.items()}
        return [self._unpacked(item) for item in value] if isinstance(value, list) else value

    def _write(self, data: bytes) -> int:
        try:
            start = self.file.tell()
            self.file.write(data)
            self.file.flush()
            return start
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: no room for the pictures of a Parquet row group: {error.strerror}; set TMPDIR to a "
                f"folder that holds {SPOOLS} of them"
            ) from None

    def _read(self, start: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, start)


def _records_of_group(path: Path, group: int) -> Iterator[Any]:
    """Its rows; in place of one with text that is no UTF-8, the reason."""
    with pq.ParquetFile(path, buffer_size=STREAM_BYTES, pre_buffer=False) as opened:
        for block in opened.iter_batches(BLOCK_ROWS, row_groups=[group], use_threads=False):
            try:
                yield from _records(block)
            except UnicodeDecodeError:
                yield from (_row_or_reason(block.slice(place, 1)) for place in range(block.num_rows))


def _row_or_reason(block: pa.RecordBatch) -> Any:
    try:
        return _records(block)[0]
    except UnicodeDecodeError:
        return NO_UTF8
