"""WebDataset tars: a record is `KEY.json` and its pictures `KEY.jpg`, `KEY.0.png` and so on, one after another.

A tar is walked once for the place of each member; members are then read from where they stand, and nothing is extracted.
"""

import hashlib
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from genrecal.errors import DataError, SampleError
from genrecal.samples.fields import IMAGE_SUFFIXES
from genrecal.samples.sample import ImageSource, read_part
from genrecal.samples.shapes import parse_json
from genrecal.samples.sources import MEMBERS, Members, printable

MOST_HEADER_BYTES = 2**20  # of a long name or pax records, which are read whole
MOST_JSON_BYTES = 2**26
BLOCK = 512
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, MemoryError)


@dataclass
class TarFile:
    """One tar with the place of every member of a record, in 24 bytes a member and the length of its key a record."""

    path: Path
    keys: bytes  # one after another
    key_ends: np.ndarray  # int64 [records]
    member_ends: np.ndarray  # int64 [records], of rows of `members`
    members: np.ndarray  # int64 [members, 3]: number of the extension, first byte, bytes
    extensions: list[str]
    digest: str

    def __len__(self) -> int:
        return len(self.key_ends)

    def location(self, row: int) -> str:
        """The tar and the record's key."""
        return f"{self.path}:{self._key(row)}"

    def record(self, row: int) -> Any:
        """The record's JSON, with what stands beside it under MEMBERS. Raises SampleError if it is missing or broken."""
        members = self._members(row)
        record = self._json(row, members)
        if isinstance(record, dict):
            images = self._images(members)
            others = tuple(name for name in members if name not in images and name != "json")
            record[MEMBERS] = Members(key=self._key(row), images=images, others=others)
        return record

    def labels(self) -> Iterator[Any]:
        """The JSON members alone; None for a broken one."""
        for row in range(len(self)):
            try:
                yield self._json(row, self._members(row))
            except SampleError:
                yield None

    def sha256(self) -> str:
        """Of the members' names and sizes and the JSON members' bytes: all but what the pictures show."""
        return self.digest

    def _key(self, row: int) -> str:
        start = int(self.key_ends[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends[row])].decode("utf-8", "surrogateescape")

    def _members(self, row: int) -> dict[str, tuple[int, int]]:
        """First byte and size of each member, by extension."""
        start = int(self.member_ends[row - 1]) if row else 0
        rows = self.members[start : int(self.member_ends[row])].tolist()
        members = {self.extensions[number]: (first, size) for number, first, size in rows}
        if len(members) < len(rows):
            raise SampleError(f"two members of {printable(self._key(row))} have the same extension")
        return members

    def _json(self, row: int, members: dict[str, tuple[int, int]]) -> Any:
        key = printable(self._key(row))
        if "json" not in members:
            raise SampleError(f"no {key}.json beside its other members")
        start, size = members["json"]
        if size > MOST_JSON_BYTES:
            raise SampleError(f"{key}.json of {size} bytes is over the limit of {MOST_JSON_BYTES}")
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


# ------------------------------------------------------------------------------------------------------------- the walk


class _Member(tarfile.TarInfo):
    """A member whose headers are of a bounded size."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in tarfile.REGULAR_TYPES and self.size > MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes; the limit is {MOST_HEADER_BYTES}")
        return cast(tarfile.TarInfo, super()._proc_member(tar))  # type: ignore[misc]


def _walk(path: Path, file: BinaryIO) -> TarFile:
    """Group the members as the webdataset library does: what has the same name up to its first dot, and stands together."""
    size = file.seek(0, 2)
    file.seek(0)
    digest = hashlib.sha256()
    keys, key_ends, member_ends, members = bytearray(), array("q"), array("q"), array("q")
    numbers: dict[str, int] = {}
    current: str | None = None
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every one
            match = re.match(r"((?:.*/|)[^/.]+)\.([^/]*)$", member.name, re.DOTALL)
            if match is None or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
                continue
            key, extension = match[1], match[2].lower()
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"it breaks off in {printable(member.name)}; copy it again")
            if key != current:
                current = key
                keys += key.encode("utf-8", "surrogateescape")
                key_ends.append(len(keys))
                member_ends.append(len(members) // 3)
            members.extend((numbers.setdefault(extension, len(numbers)), member.offset_data, member.size))
            member_ends[-1] += 1
            digest.update(f"{member.name!a} {member.size}\n".encode())
            if extension == "json" and member.size <= MOST_JSON_BYTES:
                file.seek(member.offset_data)
                digest.update(file.read(member.size))
        _check_end(file, tar.offset)
    return TarFile(
        path=path,
        keys=bytes(keys),
        key_ends=np.array(key_ends, np.int64),
        member_ends=np.array(member_ends, np.int64),
        members=np.array(members, np.int64).reshape(-1, 3),
        extensions=list(numbers),
        digest=digest.hexdigest(),
    )


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
