"""`.json` arrays and `.jsonl`, either compressed as `.zst`. Opening a file keeps its records' offsets, not the records."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from genrecal.errors import DataError, SampleError
from genrecal.samples.record import parse_json

TEXT_SUFFIXES = (".json", ".jsonl", ".json.zst", ".jsonl.zst")


@dataclass
class TextFile:
    """One open data file with the byte range and the first line of each record."""

    path: Path
    stream: BinaryIO
    ranges: np.ndarray  # int64 [records, 2]: first byte, end
    lines: np.ndarray  # int64 [records]: 1-based

    def __len__(self) -> int:
        return len(self.ranges)

    def location(self, row: int) -> str:
        """Where a record begins."""
        return f"{self.path}:{int(self.lines[row])}"

    def record(self, row: int) -> Any:
        """One record. Raises SampleError if it is no JSON, DataError if the file cannot be read."""
        start, end = (int(value) for value in self.ranges[row])
        try:
            data = os.pread(self.stream.fileno(), end - start, start)  # by several threads at once
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        return parse_json(data)

    def labels(self) -> Iterator[Any]:
        """Of every record what it is called by: here the record itself, or None for a broken one."""
        for row in range(len(self)):
            try:
                yield self.record(row)
            except SampleError:
                yield None

    def sha256(self) -> str:
        """Of the file as it is."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @classmethod
    def open(cls, path: Path) -> "TextFile":
        """Find every record's place. Raises DataError for a file that is none of these, or an array that breaks off."""
        suffixes = "".join(path.suffixes[-2:]) if path.suffix == ".zst" else path.suffix
        stream: BinaryIO = path.open("rb")
        if path.suffix == ".zst":
            stream = _decompressed(path, stream)
        starts_array = suffixes in (".json", ".json.zst") and stream.read(4096).lstrip()[:1] == b"["
        stream.seek(0)
        index = _index_array if starts_array else _index_lines
        ranges, lines = index(path, stream)
        return cls(path, stream, np.array(ranges, np.int64).reshape(-1, 2), np.array(lines, np.int64))


def _decompressed(path: Path, stream: BinaryIO) -> BinaryIO:
    """Unpack into an unnamed temporary file: records are then read by offset, like any other file's."""
    plain = tempfile.TemporaryFile()
    decompressor, frame = zstandard.ZstdDecompressor(), None
    try:
        while data := stream.read(1 << 20):
            while data:  # a file may be several frames, one after another
                frame = frame or decompressor.decompressobj()
                plain.write(frame.decompress(data))
                data = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: not a readable zstd file: {error}") from None
    if frame is not None:
        raise DataError(f"{path}: the zstd file breaks off before its end; copy or download it again")
    plain.seek(0)
    return plain


def _index_lines(path: Path, stream: BinaryIO) -> tuple[list[tuple[int, int]], list[int]]:
    ranges: list[tuple[int, int]] = []
    lines: list[int] = []
    offset = 0
    for number, line in enumerate(stream, start=1):
        if line.strip():
            ranges.append((offset, offset + len(line)))
            lines.append(number)
        offset += len(line)
    return ranges, lines


def _index_array(path: Path, stream: BinaryIO) -> tuple[list[tuple[int, int]], list[int]]:
    """Find each element of a JSON array with the standard parser, so that a bad record can be named by its line."""
    try:
        text = stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from None
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    ranges: list[tuple[int, int]] = []
    lines: list[int] = []
    at = text.index("[") + 1
    byte, line, counted = 0, 1, 0
    while True:
        match = space.match(text, at)
        at = match.end() if match else at
        if text[at : at + 1] == "]":
            if rest := text[at + 1 :].strip():
                raise DataError(
                    f"{path}: expected nothing after the JSON array's end, got {rest[:40]!r}; mend the file"
                )
            return ranges, lines
        line += text.count("\n", counted, at)
        byte += len(text[counted:at].encode())
        counted = at
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{line}: the JSON array breaks off in record {len(lines) + 1}: {getattr(error, 'msg', error)}; "
                "mend the file, or write one record a line as .jsonl, where only the broken line is lost"
            ) from None
        ranges.append((byte, byte + len(text[at:end].encode())))
        lines.append(line)
        at = end
