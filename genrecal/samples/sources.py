"""What a record names its images by -> `ImageSource`: paths, base64 in all its forms, bytes, members of a tar."""

import os
import posixpath
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrecal.errors import SampleError
from genrecal.samples.fields import ENTRY_FIELDS, FieldMap, Fields, bare_image, decode_base64, media_name
from genrecal.samples.sample import ImageSource

MAX_PATH = 4096  # characters; a longer one is an image pasted in
DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.IGNORECASE)
Entry = ImageSource | str  # an image at hand, or the path, the address or the member that it is at


def read_entry(value: Any, opened: list[Fields]) -> Entry:
    """One image as a record gives it. Raises SampleError with the reason.

    Args:
        opened: gets the fields of an object that says more of its image.
    """
    kind, name = "", value
    if isinstance(value, dict):
        fields = Fields(value, ENTRY_FIELDS, "image.", FieldMap())
        data, name, kind = fields.take("data"), fields.take("name"), str(fields.take("media_type", ""))
        opened.append(fields)
        value = name if data is None else data
        if data is not None:
            kind = kind or (Path(name).suffix if isinstance(name, str) else "")
        elif isinstance(name, dict):
            return read_entry(name, opened)
    if isinstance(value, ImageSource):
        return value
    if isinstance(value, bytes):
        return ImageSource(data=value, suffix=_suffix(kind))
    if not isinstance(value, str) or not value:
        raise SampleError(f"expected an image path, got {'nothing' if value == '' else type(value).__name__}")
    if value.startswith("data:") or value is not name:
        return _base64_image(value, kind)
    if data := bare_image(value):
        return ImageSource(data=data, suffix="img")
    if len(value) > MAX_PATH:
        raise SampleError(f"image {value[:40]!r} of {len(value)} characters: expected a path, or an image as base64")
    return value


def _base64_image(text: str, kind: str) -> ImageSource:
    if text.startswith("data:"):
        head, comma, rest = text.partition(",")
        match = DATA_URI.fullmatch(urllib.parse.unquote(head) + comma)
        if match is None or not (match["type"] or "image/").lower().startswith(("image/", "application/octet-stream")):
            raise SampleError(f"image {text[:40]!r}: expected a path or data:image/TYPE;base64,...")
        text, kind = urllib.parse.unquote(rest), kind or match["type"] or ""
    try:
        return ImageSource(
            data=decode_base64(text), suffix=_suffix(kind.rpartition("/")[2].replace("octet-stream", ""))
        )
    except ValueError as error:
        raise SampleError(f"inline image is not valid base64: {error}") from None


def _suffix(kind: str) -> str:
    kind = re.sub(r"[^a-z0-9]", "", kind.lower())
    return {"jpeg": "jpg", "": "img"}.get(kind, kind)


def open_entries(entries: Sequence[Entry], root: Path | str, members: "Members | None") -> list[ImageSource]:
    """The images of all entries of a record. Raises SampleError with the reason for one that is not there."""
    if members is not None:
        return members.find(entries)
    return [entry if isinstance(entry, ImageSource) else _file(entry, root) for entry in entries]


def _file(name: str, root: Path | str) -> ImageSource:
    if (kind := media_name(name)) and kind != "an image":
        raise SampleError(f"image {name[:200]} is {kind}, which is not read")
    if name.lower().startswith("file:"):
        plain = re.sub("^file:(//(localhost(?=/))?)?", "", name, flags=re.IGNORECASE)
        decoded = urllib.parse.unquote(plain)
        name = decoded if _exists(Path(root, decoded)) or not _exists(Path(root, plain)) else plain
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", name):
        raise SampleError(f"image {name} is a web address; download it first, genrecal reads local images")
    if isinstance(root, str) and not os.path.isabs(name):
        protocol, _, folder = root.partition("://")
        url = f"{protocol}://{posixpath.normpath(f'{folder}/{name}')}"
        return ImageSource(url=url, suffix=_suffix(Path(name).suffix))
    path = Path(root, name)
    if not _exists(path):
        raise SampleError(f"image {path} does not exist")
    return ImageSource(path=path, suffix=_suffix(path.suffix))


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise SampleError(f"image {path}: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------------ members of a tar

MEMBERS = "\0members"  # where a tar's record holds what stands beside its JSON


@dataclass(frozen=True, kw_only=True)
class Members:
    """What stands beside a record's JSON in a tar: its images, numbered ones in order, and the names of all else."""

    key: str
    images: Mapping[str, ImageSource]
    others: tuple[str, ...]

    def find(self, entries: Sequence[Entry]) -> list[ImageSource]:
        """The members that entries name. Nothing outside the tar is read.

        Entries that name no member of the record stand for its members in order, if they are as many: tars are often
        packed with the JSON as it was beside the loose files.
        """
        names = [entry for entry in entries if isinstance(entry, str)]
        if len(names) < len(entries):
            if names:
                raise SampleError("images inside the JSON and beside it in one list")
            return [entry for entry in entries if isinstance(entry, ImageSource)]
        base = self.key.rpartition("/")[2]
        known = {
            f"{prefix}{n}": image for n, image in self.images.items() for prefix in ("", f"{base}.", f"{self.key}.")
        }
        found = [known.get(name) or known.get(name.rpartition("/")[2]) for name in names]
        if not any(found) and len(found) == len(self.images):
            return list(self.images.values())
        for name, image in zip(names, found, strict=True):
            if image is None:
                shown = ", ".join(self.images) or "no image"
                raise SampleError(f"image {name} is none of the members of {printable(self.key)}: {shown}")
        return [image for image in found if image is not None]

    def not_read(self, read: Sequence[ImageSource]) -> list[str]:
        """The members that are none of these images."""
        return [*(name for name, image in self.images.items() if image not in read), *self.others]


def printable(text: str) -> str:
    """A name of a member's as it may stand in a message or a cache: half characters as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
