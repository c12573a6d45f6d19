"""JSON and CSV files, plain or compressed. Opening one keeps the place of each record, not the records.

The content of a JSON file decides how it is read, not its suffix: an array, `{"data": [...]}`, one value a line, or one
value after another.
"""

import codecs
import csv
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from genrecal.errors import DataError, SampleError
from genrecal.samples.shapes import parse_json

CSV_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", *CSV_SUFFIXES)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
CHUNK = 2**20  # bytes or characters that are read at a time
LONGEST_LITERAL = 16  # characters of what JSON errors point to the start of, such as -Infinity or \uXXXX
NO_UTF8 = "not UTF-8 text"


@dataclass
class TextFile:
    """One open data file with the byte range and the first line of each record."""

    path: Path
    stream: BinaryIO
    ranges: np.ndarray  # int64 [records, 2]: first byte, end
    lines: np.ndarray  # int64 [records]: 1-based
    unread: tuple[str, ...] = ()  # fields beside the list of records

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
        """Find every record's place. Raises DataError for a file that is not UTF-8 text, or an array that breaks off."""
        stream = _plain(path)
        start, places = _encoding_mark(path, stream), _Places()
        if data_suffix(path).startswith(CSV_SUFFIXES):
            stream = spooled(path, _csv_as_json(path, stream, places))
            return CsvFile(path, stream, *places.arrays())
        places = _json_places(path, stream, start)
        return cls(path, stream, *places.arrays(), tuple(places.unread))


class CsvFile(TextFile):
    """A CSV file, whose rows lie as JSON objects in a temporary file; in place of a bad row, the reason as a string."""

    def record(self, row: int) -> Any:
        """The row's text by column, without the empty cells. Raises SampleError for a bad row."""
        record = super().record(row)
        if isinstance(record, str):
            raise SampleError(record)
        return record


class _Places:
    """Where records are, in 24 bytes a record."""

    def __init__(self) -> None:
        self.ranges, self.lines = array("q"), array("q")
        self.unread: list[str] = []

    def add(self, start: int, end: int, line: int) -> None:
        self.ranges.extend((start, end))
        self.lines.append(line)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.ranges, np.int64).reshape(-1, 2), np.array(self.lines, np.int64)


def data_suffix(path: PurePath) -> str:
    """The suffix that says what a file holds, in lower case, with that of its compression: ".jsonl.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes and suffixes[-1] in COMPRESSIONS else suffixes[-1:])


def _plain(path: Path) -> BinaryIO:
    """The file, or its content in a temporary file if it is compressed: records are read from where they stand."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    return spooled(path, _unpacked(path, compression))


def _unpacked(path: Path, compression: str) -> Iterator[bytes]:
    try:
        with pa.input_stream(str(path), compression=compression) as packed:
            while data := packed.read(CHUNK):
                yield data
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a whole {compression} file: {error}; copy or download it again") from None


def spooled(path: Path, pieces: Iterator[bytes]) -> BinaryIO:
    """The pieces in an unnamed temporary file. Raises DataError if there is no room for them."""
    try:
        file = cast(BinaryIO, tempfile.TemporaryFile())
        for piece in pieces:
            file.write(piece)
        file.seek(0)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be unpacked into {tempfile.gettempdir()}: {error.strerror or error}; set TMPDIR to another folder"
        ) from None
    return file


def _encoding_mark(path: Path, stream: BinaryIO) -> int:
    """How many bytes UTF-8's byte order mark takes. Raises DataError for UTF-16 and UTF-32."""
    start = stream.read(4)
    stream.seek(0)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start:
        raise DataError(f"{path}: expected UTF-8 text, got UTF-16 or UTF-32; `iconv -f UTF-16 -t UTF-8` converts it")
    return len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0


# ------------------------------------------------------------------------------------------------------------------- JSON


def _json_places(path: Path, stream: BinaryIO, start: int) -> _Places:
    """Where the records of a JSON file are, whichever way it is written."""
    places, first = None, _Text(stream, start).skip()
    if first == "[":
        places = _array_places(path, _Text(stream, start))
    elif not _first_line_is_json(stream, start):
        places = _value_places(_Text(stream, start))
    places = places or _line_places(stream, start)
    if first == "{" and len(places.lines) == 1:
        places = _data_places(path, _Text(stream, start)) or places
    return places


def _first_line_is_json(stream: BinaryIO, start: int) -> bool:
    stream.seek(start)
    try:
        json.loads(next((line for line in stream if line.strip()), b""))
    except (ValueError, RecursionError):
        return False
    return True


def _line_places(stream: BinaryIO, start: int) -> _Places:
    """A value on each line, where a broken one costs only itself."""
    places = _Places()
    stream.seek(start)
    for number, line in enumerate(stream, start=1):
        if line.strip():
            places.add(start, start + len(line), number)
        start += len(line)
    return places


def _value_places(text: "_Text") -> _Places | None:
    """One value after another, each over any number of lines; None where they break off."""
    places = _Places()
    try:
        while text.skip():
            text.value()
            places.add(*text.place)
    except (ValueError, RecursionError):
        return None
    return places


def _array_places(path: Path, text: "_Text") -> _Places | None:
    """The elements of a JSON array; None where the array, whole or broken, is the first line of several."""
    places = _Places()
    text.take("[")
    first_line = text.line
    try:
        _add_elements(text, places)
    except (ValueError, RecursionError) as error:
        if text.line == first_line and text.has_more_lines():
            return None
        raise DataError(
            f"{path}:{text.line}: the JSON array breaks off in record {len(places.lines) + 1}: "
            f"{getattr(error, 'msg', error)}; mend the file, or write one record a line, where only the broken line is lost"
        ) from None
    one_line = text.line == first_line
    if rest := text.skip():
        if one_line and text.line > first_line:
            return None
        raise DataError(f"{path}:{text.line}: expected nothing after the JSON array's end, got {rest!r}; mend the file")
    return places


def _data_places(path: Path, text: "_Text") -> _Places | None:
    """The elements of the list `data` of the file's only object; None if it has no such list."""
    places = _Places()
    try:
        text.take("{")
        while text.skip(",") != "}":
            name = text.value()
            text.take(":")
            if name == "data" and text.skip() == "[":
                text.take("[")
                if text.skip() != "{":
                    return None
                _add_elements(text, places)
            else:
                text.value()
                places.unread.append(name)
    except (ValueError, RecursionError):
        return None
    return places if len(places.lines) else None


def _add_elements(text: "_Text", places: _Places) -> None:
    """The elements up to the array's end, which is taken too."""
    while text.skip(",") != "]":
        text.value()
        places.add(*text.place)
    text.take("]")


class _Text:
    """A stream's text, decoded a piece at a time, with the byte and the line that is read next.

    Raises ValueError or RecursionError for what is no JSON; bytes that are no UTF-8 are left to whoever reads the record.
    """

    def __init__(self, stream: BinaryIO, start: int):
        stream.seek(start)
        self.stream, self.byte, self.line = stream, start, 1
        self.text, self.at = "", 0
        self.place = (start, start, 1)  # of the value that was read last: first byte, end, line
        self._decoder, self._parser = codecs.getincrementaldecoder("utf-8")("surrogateescape"), json.JSONDecoder()

    def skip(self, characters: str = "") -> str:
        """Go past white space and these characters; the next character, or "" at the end."""
        while True:
            self._go_to(re.compile(rf"[ \t\r\n{characters}]*").match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def take(self, character: str) -> None:
        """Go past this one, and white space before it."""
        if (found := self.skip()) != character:
            raise ValueError(f"expected {character!r}, got {found!r}")
        self._go_to(self.at + 1)

    def value(self) -> Any:
        """The next JSON value."""
        self.skip()
        while True:
            try:
                value, end = self._parser.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_LITERAL
                if cut_off and self._read_on():
                    continue
                raise
            if end == len(self.text) and self._read_on():
                continue  # a number may go on
            start, line = self.byte, self.line
            self._go_to(end)
            self.place = (start, self.byte, line)
            return value

    def has_more_lines(self) -> bool:
        """Whether anything stands on a later line."""
        self.stream.seek(self.byte)
        self.stream.readline()
        return any(line.strip() for line in self.stream)

    def _go_to(self, at: int) -> None:
        passed, self.at = self.text[self.at : at], at
        self.byte += len(passed.encode("utf-8", "surrogateescape"))
        self.line += passed.count("\n")

    def _read_on(self) -> bool:
        """Read as much again as there is, so that a long value is not parsed too often; False at the end."""
        data = self.stream.read(max(CHUNK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + self._decoder.decode(data, final=not data), 0
        return bool(data)


# -------------------------------------------------------------------------------------------------------------------- CSV


def _csv_as_json(path: Path, stream: BinaryIO, places: _Places) -> Iterator[bytes]:
    """The rows as JSON; `places` gets where they come to stand, and their first lines."""
    csv.field_size_limit(sys.maxsize)  # an image in base64 is one cell
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    first = text.readline()
    text.seek(0)
    marks = "\t,;" if data_suffix(path).startswith(".tsv") else ",;\t"
    rows = csv.reader(text, delimiter=next((mark for mark in marks if mark in first), ","), strict=True)
    end, line = 0, 1
    try:
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise DataError(f"{path}: two columns of one name: {', '.join(names)}; rename one")
        line = rows.line_num + 1
        for cells in rows:
            if cells:
                data = json.dumps(_csv_record(names, cells)).encode()
                places.add(end, end + len(data), line)
                end += len(data)
                yield data
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: no CSV from here on: {error}; expected cells with quotes, commas or line breaks to be in double "
            "quotes, with each quote in them doubled, as spreadsheets and `csv.writer` write them"
        ) from None


def _csv_record(names: list[str], cells: list[str]) -> dict[str, str] | str:
    """A row's record, or why it has none."""
    if len(cells) != len(names):
        return f"a CSV row of {len(cells)} cells under a header of {len(names)}"
    if padded := next((cell for cell in cells if re.fullmatch(r'\s+".*"\s*', cell, re.DOTALL)), None):
        return f"a CSV cell with a space before its quotes, which are then part of its text: {padded[:40]!r}"
    try:
        "".join([*names, *cells]).encode()
    except UnicodeEncodeError:
        return NO_UTF8
    return {name: cell for name, cell in zip(names, cells, strict=True) if cell}
