"""Parquet files and Arrow files of Hugging Face datasets: a record is a row, its images bytes in a column.

Uncompressed Arrow data are mapped into memory and read in place. Parquet pages cannot be entered in the middle, so a row
group is written once as Arrow to a temporary file, a few rows at a time, and mapped too.
"""

import contextlib
import hashlib
import itertools
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrecal.errors import DataError, GenrecalError, SampleError
from genrecal.samples.text_file import NO_UTF8, no_room

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
READ_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError)

BLOCK_ROWS = 16  # rows of Parquet that are decoded at once
STREAM_BYTES = 2**20  # read ahead in each column
MAX_GROUPS = 8  # row groups that are kept decoded: three shards are made at once, each perhaps between two groups
WHOLE_DIGEST_BYTES, SLICES, SLICE_BYTES = 2**22, 64, 2**16


@dataclass
class TableFile:
    """One file with the rows of each of its parts: row groups of Parquet, record batches of Arrow."""

    path: Path
    schema: pa.Schema
    starts: np.ndarray  # int64 [parts + 1]
    groups: "RowGroups"
    batches: Sequence[pa.RecordBatch] | None = None  # of Arrow, in mapped memory

    def __len__(self) -> int:
        return int(self.starts[-1])

    def location(self, row: int) -> str:
        """The file and the row, counted from 0."""
        return f"{self.path} row {row}"

    def record(self, row: int) -> Any:
        """One row. Raises SampleError for text that is no UTF-8, DataError if the file is corrupt."""
        part = _part(self.starts, row)
        place = row - int(self.starts[part])
        kind = "row group" if self.batches is None else "record batch"
        with _named(f"{self.path}: {kind} {part} cannot be read", "; copy or download the file again"):
            if self.batches is not None:
                return _row(self.batches[part], place, mapped=True)
            batches, starts = self.groups.get(self.path, part)
            block = _part(starts, place)
            return _row(batches[block], place - int(starts[block]))

    def labels(self) -> Iterator[Any]:
        """The columns of texts and numbers, which hold what a record is called by."""
        types = pa.types
        columns = [
            column.name
            for column in self.schema
            if not any(test(column.type) for test in (types.is_nested, types.is_binary, types.is_large_binary))
        ]
        if not columns:
            yield from ({} for _ in range(len(self)))
            return
        with _named(f"{self.path}: columns {', '.join(columns)} cannot be read", "; copy or download the file again"):
            for block in self._blocks(columns):
                for place in range(block.num_rows):
                    try:
                        yield _row(block, place, mapped=self.batches is not None)
                    except SampleError:
                        yield None

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


def open_table(path: Path, groups: "RowGroups") -> TableFile:
    """Open a `.parquet`, `.arrow` or `.feather` file. Raises DataError if it is none."""
    is_parquet = path.suffix.lower() == ".parquet"
    with _named(f"{path}: not a readable {'Parquet' if is_parquet else 'Arrow'} file"):
        if not is_parquet:
            schema, batches = _mapped_batches(path)
            return TableFile(path, schema, _starts(batch.num_rows for batch in batches), groups, batches)
        with path.open("rb") as file, pq.ParquetFile(file) as opened:
            rows = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
            return TableFile(path, opened.schema_arrow, _starts(rows), groups)


@contextlib.contextmanager
def _named(what: str, advice: str = "") -> Iterator[None]:
    """Raise DataError in place of what pyarrow raises for a corrupt file."""
    try:
        yield
    except GenrecalError:
        raise
    except READ_ERRORS as error:
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{what}: {words}{advice}") from None


class RowGroups:
    """The row groups of Parquet files that were asked for last, each decoded once; one is decoded at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last: OrderedDict[tuple[Path, int], tuple[list[pa.RecordBatch], np.ndarray]] = OrderedDict()

    def get(self, path: Path, group: int) -> tuple[list[pa.RecordBatch], np.ndarray]:
        """A row group's batches in mapped memory, and the first row of each."""
        with self.lock:
            if (path, group) not in self.last:
                while len(self.last) >= MAX_GROUPS:
                    self.last.popitem(last=False)
                with pq.ParquetFile(path, buffer_size=STREAM_BYTES, pre_buffer=False) as opened:
                    blocks = opened.iter_batches(BLOCK_ROWS, row_groups=[group], use_threads=False)
                    _, batches = _spooled(path, opened.schema_arrow, blocks)
                self.last[path, group] = batches, _starts(batch.num_rows for batch in batches)
            self.last.move_to_end((path, group))
            return self.last[path, group]


def _mapped_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """A file's batches in mapped memory; those of a compressed one in that of a temporary file."""
    source = pa.memory_map(str(path))
    whole = source.read_buffer()
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(whole))  # as `datasets` writes it
        read = iter(reader)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(pa.BufferReader(whole))
        read = map(reader.get_batch, range(reader.num_record_batches))
    batches: list[pa.RecordBatch] = []
    for batch in read:
        buffers = [
            buffer for column in batch.columns for buffer in column.buffers() if buffer is not None and buffer.size
        ]
        if not all(whole.address <= buffer.address < whole.address + whole.size for buffer in buffers):
            return _spooled(path, reader.schema, itertools.chain(batches, [batch], read))
        batches.append(batch)
    return reader.schema, batches


def _spooled(path: Path, schema: pa.Schema, blocks: Iterable[pa.RecordBatch]) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """The blocks in an unnamed temporary file that is mapped. Raises DataError if there is no room for them."""
    try:
        plain = tempfile.NamedTemporaryFile()
    except OSError as error:
        raise no_room(path, error) from None
    with plain:
        with pa.ipc.new_stream(plain, schema) as writer:
            for block in blocks:
                try:
                    writer.write_batch(block)
                except OSError as error:
                    raise no_room(path, error) from None
        plain.flush()
        return _mapped_batches(Path(plain.name))


def _starts(lengths: Iterable[int]) -> np.ndarray:
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    if np.any(np.diff(starts) < 0):
        raise ValueError("a part of fewer than 0 rows")
    return starts


def _part(starts: np.ndarray, row: int) -> int:
    """The part that holds a row."""
    return int(np.searchsorted(starts, row, side="right")) - 1


def _row(block: pa.RecordBatch, place: int, *, mapped: bool = False) -> dict[str, Any]:
    """One row; what has the hub's type Json() is unpacked, in whatever depth, as `datasets` does it.

    Raises SampleError for text that is no UTF-8.
    """
    one = block.slice(place, 1)
    try:
        if mapped:  # a file that pyarrow did not decode may hold anything
            one.validate(full=True)
        [row] = one.to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        if "utf" not in str(error).lower():
            raise
        raise SampleError(NO_UTF8) from None
    return {name: _unpacked(value, block.schema.field(name).type) for name, value in row.items()}


def _unpacked(value: Any, kind: pa.DataType) -> Any:
    if value is None or "arrow.json" not in str(kind):
        return value
    if isinstance(kind, pa.JsonType):
        found = json.loads(value)
        return found if isinstance(found, (str, list, dict)) else value  # `datasets` writes the text "42" as 42
    if pa.types.is_struct(kind):
        return {name: _unpacked(item, kind.field(name).type) for name, item in value.items()}
    return [_unpacked(item, kind.value_type) for item in value]
