"""WebDataset tars: a record is `KEY.json` and its images `KEY.jpg`, `KEY.0.png` and so on, one after another.

A tar is walked once for the place of each record; members are then read from where they stand, and nothing is extracted.
"""

import hashlib
import itertools
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from genrecal.errors import DataError, SampleError
from genrecal.samples.fields import IMAGE_SUFFIXES
from genrecal.samples.sample import ImageSource, read_part
from genrecal.samples.shapes import parse_json
from genrecal.samples.sources import MEMBERS, Members, printable

MAX_JSON_BYTES = 2**26
BLOCK = 512
TAR_ERRORS = (
    tarfile.TarError,
    StopIteration,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RecursionError,
    MemoryError,
)


@dataclass
class TarFile:
    """One tar with the place of each record's first member."""

    path: Path
    starts: np.ndarray  # int64 [records], in bytes
    digest: str

    def __len__(self) -> int:
        return len(self.starts)

    def location(self, row: int) -> str:
        """The tar and the record's key."""
        return f"{self.path}:{next(self._headers(row))[0]}"

    def record(self, row: int) -> Any:
        """The record's JSON, with what stands beside it under MEMBERS. Raises SampleError if it is missing or broken."""
        key, members = self._members(row)
        record = self._json(key, members)
        if isinstance(record, dict):
            images = self._images(members)
            others = tuple(name for name in members if name not in images and name != "json")
            record[MEMBERS] = Members(key=key, images=images, others=others)
        return record

    def labels(self) -> Iterator[Any]:
        """The JSON members alone; None for a broken one."""
        for row in range(len(self)):
            try:
                yield self._json(*self._members(row))
            except SampleError:
                yield None

    def sha256(self) -> str:
        """Of the members' names and sizes and the JSON members' bytes: all but what the images show."""
        return self.digest

    def _headers(self, row: int) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        """Key, extension and header of each of a record's members."""
        try:
            with self.path.open("rb") as file:
                file.seek(int(self.starts[row]))
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    found = _regular_members(tar)
                    first = next(found)
                    yield first
                    yield from itertools.takewhile(lambda header: header[0] == first[0], found)
        except TAR_ERRORS as error:
            raise DataError(f"{self.path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None

    def _members(self, row: int) -> tuple[str, dict[str, tuple[int, int]]]:
        """A record's key; and by extension the first byte and the size of each member."""
        headers = list(self._headers(row))
        members = {extension: (member.offset_data, member.size) for _, extension, member in headers}
        if len(members) < len(headers):
            raise SampleError(f"two members of {printable(headers[0][0])} have the same extension")
        return headers[0][0], members

    def _json(self, key: str, members: dict[str, tuple[int, int]]) -> Any:
        key = printable(key)
        if "json" not in members:
            raise SampleError(f"no {key}.json beside its other members")
        start, size = members["json"]
        if size > MAX_JSON_BYTES:
            raise SampleError(f"{key}.json of {size} bytes is over the limit of {MAX_JSON_BYTES}")
        try:
            record = parse_json(read_part(self.path, start, size))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if isinstance(record, dict) and record.get("id") is None and record.get("sample_id") is None:
            record["id"] = key
        return record

    def _images(self, members: dict[str, tuple[int, int]]) -> dict[str, ImageSource]:
        """By extension, numbered ones in the order of their numbers."""
        names = [name for name in members if _kind(name) in IMAGE_SUFFIXES]
        sources = {}
        for name in sorted(names, key=_numbers_by_value):
            start, size = members[name]
            sources[name] = ImageSource(path=self.path, suffix=_kind(name), start=start, size=size)
        return sources

    @classmethod
    def open(cls, path: Path) -> "TarFile":
        """Walk a tar. Raises DataError if it breaks off or is none."""
        try:
            with path.open("rb") as file:
                return _walk(path, file)
        except TAR_ERRORS as error:
            raise DataError(f"{path}: not a readable tar: {getattr(error, 'strerror', None) or error}") from None


def _kind(extension: str) -> str:
    return {"jpeg": "jpg", "jpe": "jpg"}.get(kind := extension.rpartition(".")[2].lower(), kind)


def _numbers_by_value(name: str) -> list[Any]:
    """So that 2.jpg comes before 10.jpg."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name)]


def _regular_members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension and header of each file whose name has both, as the webdataset library splits names."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep every one
        match = re.match(r"((?:.*/|)[^/.]+)\.([^/]*)$", member.name, re.DOTALL)
        if match and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None:
            yield match[1], match[2].lower(), member


def _walk(path: Path, file: BinaryIO) -> TarFile:
    """Group the members as the webdataset library does: what has the same key and stands together."""
    size = file.seek(0, 2)
    file.seek(0)
    digest, starts, current = hashlib.sha256(), array("q"), None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for key, extension, member in _regular_members(tar):
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"it breaks off in {printable(member.name)}; copy it again")
            if key != current:
                current = key
                starts.append(member.offset)
            digest.update(f"{member.name!a} {member.size}\n".encode())
            if extension == "json" and member.size <= MAX_JSON_BYTES:
                file.seek(member.offset_data)
                digest.update(file.read(member.size))
        _check_end(file, tar.offset)
    return TarFile(path, np.array(starts, np.int64), digest.hexdigest())


def _check_end(file: BinaryIO, offset: int) -> None:
    """A tar ends with zeros. The library takes anything it does not understand for the end."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise tarfile.ReadError(f"it breaks off at byte {offset}, without the mark of a tar's end; copy it again")
    while block:
        if block.count(0) < len(block):
            raise tarfile.ReadError(f"something that is no member follows byte {offset} (two tars in one file?)")
        block = file.read(2**20)
