"""Parquet files and Arrow files of Hugging Face datasets: a record is a row, its pictures bytes in a column.

Parquet is decoded a few rows at a time, going on from where the last reader of a row group stopped, since pages cannot be
entered in the middle; Arrow files are mapped into memory and read in place.
"""

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrecal.errors import DataError, SampleError

TABLE_SUFFIXES = (".parquet", ".arrow")
TURN_COLUMNS = ("conversations", "messages", "texts")
NAME_COLUMNS = ("id", "sample_id", "category")
COLUMNS = (*TURN_COLUMNS, *NAME_COLUMNS, "source", "data_source", "image", "images")
READ_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError)

BLOCK_ROWS = 16  # rows of Parquet that are decoded at once
KEPT_BYTES = 2**27  # of decoded rows behind the newest that a cursor keeps
CURSORS = 8  # row groups that are read at once: of three shards, each perhaps between two groups
STREAM_BYTES = 2**20  # read ahead in each column
WHOLE_DIGEST_BYTES, SLICES, SLICE_BYTES = 2**26, 1024, 2**16


@dataclass
class TableFile:
    """One file with the rows of each of its parts: row groups of Parquet, record batches of Arrow."""

    path: Path
    columns: list[str]
    starts: np.ndarray  # int64 [parts + 1]
    cursors: "Cursors"
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
                block = self.batches[part].slice(place, 1)
            else:
                block = self.cursors.get(self.path, part, self.columns).row(place)
            return _row(block)
        except READ_ERRORS as error:
            raise self._damaged(part, error) from None

    def labels(self) -> Iterator[Any]:
        """The columns that name a record, and no other."""
        columns = [name for name in self.columns if name in NAME_COLUMNS]
        if not columns:
            yield from ({} for _ in range(len(self)))
            return
        for part in range(len(self.starts) - 1):
            try:
                for block in self._blocks(part, columns):
                    for place in range(block.num_rows):
                        try:
                            yield _row(block.slice(place, 1))
                        except SampleError:
                            yield None
            except READ_ERRORS as error:
                raise self._damaged(part, error) from None

    def sha256(self) -> str:
        """Of a file up to 64 MiB as it is; of a larger one, of its size, 1,024 pieces spread over it, and its end."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with self.path.open("rb") as file:
            if size <= WHOLE_DIGEST_BYTES:
                return hashlib.file_digest(file, lambda: digest).hexdigest()
            for start in np.linspace(0, size - SLICE_BYTES, SLICES).astype(np.int64).tolist():
                file.seek(start)
                digest.update(file.read(SLICE_BYTES))
            file.seek(size - 8)
            file.seek(size - min(size, int.from_bytes(file.read(4), "little") + 8))  # Parquet's footer
            digest.update(file.read(WHOLE_DIGEST_BYTES))
        return digest.hexdigest()

    def _blocks(self, part: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if self.batches is not None:
            yield self.batches[part].select(columns)
            return
        with pq.ParquetFile(self.path) as opened:
            yield from opened.iter_batches(row_groups=[part], columns=columns, use_threads=False)

    def _damaged(self, part: int, error: Exception) -> DataError:
        kind = "row group" if self.batches is None else "record batch"
        return DataError(f"{self.path}: {kind} {part} cannot be read: {_words(error)}; copy or download the file again")


def open_table(path: Path, cursors: "Cursors") -> TableFile:
    """Open a `.parquet` or `.arrow` file. Raises DataError if it is none, or has no column of conversations."""
    try:
        return (_open_parquet if path.suffix == ".parquet" else _open_arrow)(path, cursors)
    except READ_ERRORS as error:
        if isinstance(error, DataError):
            raise
        kind = "Parquet" if path.suffix == ".parquet" else "Arrow"
        raise DataError(f"{path}: not a readable {kind} file: {_words(error)}") from None


def _open_parquet(path: Path, cursors: "Cursors") -> TableFile:
    with path.open("rb") as file, pq.ParquetFile(file) as opened:
        groups = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
        return TableFile(path, _columns_of(path, opened.schema_arrow), _starts(path, groups), cursors)


def _open_arrow(path: Path, cursors: "Cursors") -> TableFile:
    source = pa.memory_map(str(path))
    try:
        reader = pa.ipc.open_stream(source)  # as `datasets` writes it
        batches = list(reader)
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(source)
        batches, reader = [file.get_batch(number) for number in range(file.num_record_batches)], file
    columns = _columns_of(path, reader.schema)
    selected = [batch.select(columns) for batch in batches]
    return TableFile(path, columns, _starts(path, [batch.num_rows for batch in batches]), cursors, selected)


def _columns_of(path: Path, schema: pa.Schema) -> list[str]:
    columns = [name for name in COLUMNS if name in schema.names]
    if not set(columns) & set(TURN_COLUMNS):
        raise DataError(
            f"{path}: expected a column {', '.join(TURN_COLUMNS[:-1])} or {TURN_COLUMNS[-1]}; "
            f"its columns are {', '.join(schema.names[:30])}"
        )
    return columns


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
        raise SampleError("not UTF-8 text") from None
    [record] = block.to_pylist()
    return record


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# -------------------------------------------------------------------------------------------------------------- Parquet


class _Cursor:
    """A place in one row group. A row before those that are kept is reached from the group's first row again."""

    def __init__(self, path: Path, group: int, columns: Sequence[str]):
        self.open = partial(_blocks_of_group, path, group, columns)
        self.lock = threading.Lock()
        self._rewind()

    def row(self, row: int) -> pa.RecordBatch:
        """One row of the group, as a block of its own."""
        with self.lock:
            if self.kept and row < self.kept[0][0]:
                self._rewind()
            while row >= self.end:
                self._advance()
            start, block = next((start, block) for start, block in reversed(self.kept) if start <= row)
            return block.slice(row - start, 1)

    def _rewind(self) -> None:
        self.blocks, self.end, self.bytes = self.open(), 0, 0
        self.kept: deque[tuple[int, pa.RecordBatch]] = deque()

    def _advance(self) -> None:
        try:
            block = next(self.blocks)
        except StopIteration:
            raise ValueError(f"it ends after {self.end} rows") from None
        self.kept.append((self.end, block))
        self.end += block.num_rows
        self.bytes += block.nbytes
        while self.bytes > KEPT_BYTES and len(self.kept) > 1:
            self.bytes -= self.kept.popleft()[1].nbytes


def _blocks_of_group(path: Path, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, buffer_size=STREAM_BYTES) as opened:
        yield from opened.iter_batches(BLOCK_ROWS, row_groups=[group], columns=list(columns), use_threads=False)


class Cursors:
    """The cursors used last, of all files of an input; what is decoded is bounded by their number."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last: OrderedDict[tuple[Path, int], _Cursor] = OrderedDict()

    def get(self, path: Path, group: int, columns: Sequence[str]) -> _Cursor:
        """The cursor of a row group; the one that was not asked for the longest goes for a new one."""
        with self.lock:
            cursor = self.last.get((path, group))
            if cursor is None:
                cursor = self.last[path, group] = _Cursor(path, group, columns)
            self.last.move_to_end((path, group))
            if len(self.last) > CURSORS:
                self.last.popitem(last=False)
            return cursor
