"""JSON and CSV files, plain or compressed. Opening one keeps the place of each record, not the records.

The content of a JSON file decides how it is read, not its suffix: an array, `{"data": [...]}`, one value per line, or one
value after another.
"""

import codecs
import csv
import hashlib
import io
import json
import mmap
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
CHUNK = 2**20  # bytes that are unpacked at a time
NO_UTF8 = "not UTF-8 text"
JSON_ERRORS = (ValueError, RecursionError)


@dataclass
class TextFile:
    """One open data file with the place of each record."""

    path: Path
    stream: BinaryIO
    places: np.ndarray  # int64 [records, 3]: first byte, end, line counted from 1
    unread: tuple[str, ...] = ()  # fields beside the list of records

    def __len__(self) -> int:
        return len(self.places)

    def location(self, row: int) -> str:
        """The file and the line where a record begins."""
        return f"{self.path}:{int(self.places[row, 2])}"

    def record(self, row: int) -> Any:
        """One record. Raises SampleError if it is no JSON, DataError if the file cannot be read."""
        start, end, _ = self.places[row].tolist()
        try:
            data = os.pread(self.stream.fileno(), end - start, start)  # by several threads at once
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        return parse_json(data)

    def labels(self) -> Iterator[Any]:
        """All records, or None for a broken one."""
        for row in range(len(self)):
            try:
                yield self.record(row)
            except SampleError:
                yield None

    def sha256(self) -> str:
        """Digest of the file as it is."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @classmethod
    def open(cls, path: Path) -> "TextFile":
        """Find every record's place. Raises DataError for a file that is not UTF-8 text, or an array that breaks off."""
        stream = _plain(path)
        start, places, beside = _encoding_mark(path, stream), array("q"), list[str]()
        is_csv = data_suffix(path).startswith(CSV_SUFFIXES)
        if is_csv:
            stream = spooled(path, _csv_as_json(path, stream, places))
        else:
            places = _json_places(path, stream, start, beside)
        table = np.array(places, np.int64).reshape(-1, 3)
        return (CsvFile if is_csv else cls)(path, stream, table, tuple(beside))


class CsvFile(TextFile):
    """A CSV file, whose rows are JSON objects in a temporary file; in place of a bad row, the reason as a string."""

    def record(self, row: int) -> Any:
        """The row's text by column, without the empty cells. Raises SampleError for a bad row."""
        record = super().record(row)
        if isinstance(record, str):
            raise SampleError(record)
        return record


def data_suffix(path: PurePath) -> str:
    """The suffix that says what a file holds, in lower case, with that of its compression: ".jsonl.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes and suffixes[-1] in COMPRESSIONS else suffixes[-1:])


def _plain(path: Path) -> BinaryIO:
    """The file, or its content in a temporary file if it is compressed."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    return path.open("rb") if compression is None else spooled(path, _unpacked(path, compression))


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
        raise no_room(path, error) from None
    return file


def no_room(path: Path, error: OSError) -> DataError:
    """The error of a temporary folder that is full or missing."""
    return DataError(
        f"{path}: cannot be unpacked into {tempfile.gettempdir()}: {error.strerror or error}; set TMPDIR to another folder"
    )


def _encoding_mark(path: Path, stream: BinaryIO) -> int:
    """The size of UTF-8's byte order mark, in bytes. Raises DataError for UTF-16 and UTF-32."""
    start = stream.read(4)
    stream.seek(0)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start:
        raise DataError(f"{path}: expected UTF-8 text, got UTF-16 or UTF-32; `iconv -f UTF-16 -t UTF-8` converts it")
    return len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0


# ------------------------------------------------------------------------------------------------------------------- JSON


def _json_places(path: Path, stream: BinaryIO, start: int, beside: list[str]) -> "array[int]":
    """First byte, end and line of each record; `beside` gets the names of fields beside the list of records."""
    stream.seek(start)
    first_line = next((line.strip() for line in stream if line.strip()), b"")
    places = None
    if first_line.startswith(b"["):
        places = _array_places(path, _Text(stream, start))
    elif first_line and not _is_json(first_line):
        places = _value_places(_Text(stream, start))
    if places is None:
        places = _line_places(stream, start)
    if first_line.startswith(b"{") and len(places) == 3:
        places = _data_places(_Text(stream, start), beside) or places
    return places


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except JSON_ERRORS:
        return False
    return True


def _line_places(stream: BinaryIO, start: int) -> "array[int]":
    """One value per line, where a broken one costs only itself."""
    places = array("q")
    stream.seek(start)
    for number, line in enumerate(stream, start=1):
        if line.strip():
            places.extend((start, start + len(line), number))
        start += len(line)
    return places


def _value_places(text: "_Text") -> "array[int] | None":
    """One value after another, each over any number of lines; None where they break off."""
    places = array("q")
    try:
        while text.skip():
            text.value(places)
    except JSON_ERRORS:
        return None
    return places


def _array_places(path: Path, text: "_Text") -> "array[int] | None":
    """The elements of a JSON array; None where the array, whole or broken, is the first line of several."""
    places = array("q")
    text.take("[")
    first_line = text.line
    try:
        text.elements(places)
    except JSON_ERRORS as error:
        if text.line == first_line and text.has_more_lines():
            return None
        raise DataError(
            f"{path}:{text.line}: the JSON array breaks off in record {len(places) // 3 + 1}: "
            f"{getattr(error, 'msg', error)}; mend the file, or write one record per line, where only the broken line is lost"
        ) from None
    one_line = text.line == first_line
    if rest := text.skip():
        if one_line and text.line > first_line:
            return None
        raise DataError(f"{path}:{text.line}: expected nothing after the JSON array's end, got {rest!r}; mend the file")
    return places


def _data_places(text: "_Text", beside: list[str]) -> "array[int] | None":
    """The elements of the list `data` of the file's only object; None if it has no such list."""
    places, names = array("q"), []
    try:
        text.take("{")
        while text.skip(",") != "}":
            name = text.value()
            text.take(":")
            if name == "data" and text.skip() == "[":
                text.take("[")
                if text.skip() != "{":
                    return None
                text.elements(places)
            else:
                text.value()
                names.append(name.encode("latin-1").decode("utf-8", "replace"))
    except JSON_ERRORS:
        return None
    if places:
        beside += names
    return places or None


class _Text:
    """A file's JSON with one character per byte (Latin-1), so that places in the text are places in the file.

    Raises ValueError or RecursionError for what is no JSON; bytes that are no UTF-8 are left to whoever reads the record.
    """

    def __init__(self, stream: BinaryIO, start: int):
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self.text = str(data, "latin-1")
        self.at, self.line = start, 1
        self._parser = json.JSONDecoder()

    def skip(self, characters: str = "") -> str:
        """Move past white space and these characters; the next character, or "" at the end."""
        self._move(re.compile(rf"[ \t\r\n{characters}]*").match(self.text, self.at).end())  # type: ignore[union-attr]
        return self.text[self.at : self.at + 1]

    def take(self, character: str) -> None:
        """Move past white space and this character."""
        if (found := self.skip()) != character:
            raise ValueError(f"expected {character!r}, got {found!r}")
        self._move(self.at + 1)

    def value(self, places: "array[int] | None" = None) -> Any:
        """The next JSON value, whose place is added to `places`."""
        self.skip()
        start, line = self.at, self.line
        value, end = self._parser.raw_decode(self.text, start)
        self._move(end)
        if places is not None:
            places.extend((start, end, line))
        return value

    def elements(self, places: "array[int]") -> None:
        """The elements up to the array's end, and the end."""
        while self.skip(",") != "]":
            self.value(places)
        self.take("]")

    def has_more_lines(self) -> bool:
        """Whether a later line has any content."""
        return re.compile(r"\n[ \t\r\n]*[^ \t\r\n]").search(self.text, self.at) is not None

    def _move(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at


# -------------------------------------------------------------------------------------------------------------------- CSV


def _csv_as_json(path: Path, stream: BinaryIO, places: "array[int]") -> Iterator[bytes]:
    """The rows as JSON; `places` gets the place of each in it, and its line in the file."""
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
                places.extend((end, end + len(data), line))
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
