"""Input formats -> `Sample`: LLaVA conversation json and chat-messages jsonl, with local images.

A record of either shape may stand in either container (`.json` array, `.jsonl`, either compressed as `.zst`), so the
container is told by the file and the shape by the record. Records are parsed when asked for: opening a file of a million
conversations keeps their offsets, not their objects.
"""

import base64
import functools
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard
from PIL import Image, ImageOps, UnidentifiedImageError

from genrecal.errors import DataError, SampleError

IMAGE_TAG = "<image>"
# What is decoded, by Pillow's names: other formats come with programs (EPS runs Ghostscript), or hold many pictures.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
LONGEST_PATH = 4096  # characters; a longer one is a picture pasted in without its data: prefix
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """One image of a sample: a file, or bytes already in memory. Bytes are passed on as they are, never re-encoded."""

    path: Path | None = None
    data: bytes | None = None
    suffix: str = "jpg"

    def read(self) -> bytes:
        """The encoded image bytes. Raises SampleError when the file cannot be read."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise SampleError(f"image {self.path}: {error.strerror or error}") from None


@dataclass(frozen=True)
class ImageRef:
    """Where an image stands in a message: the index into `Sample.images`."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of one side: `role` is system, user or assistant; `parts` are texts and images in reading order."""

    role: str
    parts: tuple[str | ImageRef, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation: user and assistant turns in alternation, perhaps after one system message.

    `key` names the sample in a cache: its place in the input and its id, so it is the same in every run over the same
    files. It holds no dot and no slash.
    """

    key: str
    sample_id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()
    category: str = ""
    source: str = ""
    location: str = ""

    @property
    def answers(self) -> tuple[str, ...]:
        """The assistant's texts, turn by turn."""
        return tuple(message.text for message in self.messages if message.role == "assistant")

    @property
    def image_indices(self) -> list[int]:
        """The images in reading order."""
        return [part.index for message in self.messages for part in message.parts if isinstance(part, ImageRef)]

    def to_json(self) -> dict[str, Any]:
        """The sample without its image bytes, as `KEY.json` holds it."""
        return {
            "sample_id": self.sample_id,
            "category": self.category,
            "source": self.source,
            "messages": [
                {
                    "role": message.role,
                    "content": [
                        {"type": "text", "text": part}
                        if isinstance(part, str)
                        else {"type": "image", "index": part.index}
                        for part in message.parts
                    ],
                }
                for message in self.messages
            ],
        }

    @classmethod
    def from_json(cls, key: str, content: dict[str, Any], images: Sequence[ImageSource]) -> "Sample":
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for content that `to_json` would not give."""
        messages = tuple(
            Message(role=message["role"], parts=tuple(_stored_part(part) for part in message["content"]))
            for message in content["messages"]
        )
        names = {name: content[name] for name in ("sample_id", "category", "source")}
        for name, value in (*names.items(), *(("role", message.role) for message in messages)):
            if not isinstance(value, str) or (name == "role" and value not in ROLES.values()):
                raise ValueError(f"{name} {value!r}")
        return cls(key=key, messages=messages, images=tuple(images), location=key, **names)


def _stored_part(part: dict[str, Any]) -> str | ImageRef:
    """A part of a message as `KEY.json` has it."""
    if part["type"] == "text" and isinstance(part["text"], str):
        return part["text"]
    if part["type"] == "image" and type(part["index"]) is int and part["index"] >= 0:
        return ImageRef(part["index"])
    raise ValueError(f"a part of type {part['type']!r} that is none")


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """An input record that is no sample, with where it stands and why. It keeps its place and its key."""

    key: str
    sample_id: str
    location: str
    reason: str
    category: str = ""
    source: str = ""


def open_image(data: bytes) -> Image.Image:
    """A picture whose pixels are not decoded yet. Raises one of Pillow's many errors."""
    return Image.open(io.BytesIO(data), formats=_known_formats())


@functools.lru_cache(maxsize=1)
def _known_formats() -> tuple[str, ...]:
    Image.init()  # not every Pillow has AVIF
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def decode_image(data: bytes, max_pixels: int = 178_956_970) -> Image.Image:
    """Encoded bytes -> RGB picture, turned as its EXIF orientation says (both sides must see the same picture).

    Of an animation the first frame, of a multi-page file the first page; transparency is dropped, not blended.
    Raises SampleError for bytes that are no image of IMAGE_FORMATS, or one of more than `max_pixels` (Pillow's own bomb
    limit).
    """
    try:
        image = open_image(data)
        if image.width * image.height > max_pixels:
            raise SampleError(
                f"image of {image.width} x {image.height} pixels is over the limit of {max_pixels} pixels"
            )
        upright = _upright(image)
        if upright.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion makes all but the darkest white
            upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
        return upright.convert("RGB")
    except SampleError:
        raise
    except UnidentifiedImageError:  # its own words hold a memory address, and a reason must be the same in every run
        formats = ", ".join(IMAGE_FORMATS)
        raise SampleError(f"image cannot be decoded: of no format that is read here ({formats})") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split())) or type(error).__name__
        raise SampleError(f"image cannot be decoded: {reason}") from None


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say; as it is where they cannot be read, as every viewer shows it."""
    image.load()  # damaged pixels are no matter of the EXIF data
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


# ---------------------------------------------------------------------------------------------------- record -> Sample


def make_key(index: int, sample_id: str) -> str:
    """Place in the input, then what of the id a file name can hold."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", sample_id).strip("-")[:48]
    return f"{index:08d}-{slug}" if slug else f"{index:08d}"


def parse_record(record: Any, *, index: int, location: str, image_root: Path) -> Sample:
    """One LLaVA (`conversations`) or chat (`messages`) record -> Sample. Raises SampleError with the reason."""
    if not isinstance(record, dict):
        raise SampleError(f"expected a record (a JSON object), got {type(record).__name__}")
    turns = _first(record, "conversations", "messages")
    if not isinstance(turns, list) or not turns:
        raise SampleError("expected a non-empty list under 'conversations' (LLaVA) or 'messages' (chat)")
    images = [_image_source(entry, image_root) for entry in _listed_images(record)]
    builder = _MessageBuilder(images=images, image_root=image_root, inline=not images)
    messages = builder.place_unreferenced([builder.message(turn) for turn in turns])
    _check_turns(messages)
    return Sample(messages=tuple(messages), images=tuple(images), location=location, **_names(record, index=index))


def _names(record: dict[str, Any], *, index: int) -> dict[str, str]:
    """How a record is called and counted."""
    sample_id = _first(record, "id")
    name = "" if sample_id is None else str(sample_id)
    return {
        "key": make_key(index, name),
        "sample_id": name,
        "category": str(record.get("category") or ""),
        "source": str(record.get("source") or record.get("data_source") or ""),
    }


def _first(record: dict[str, Any], *names: str) -> Any:
    """The first of these fields that is there and not null (tables exported as json hold every field in every row)."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def _listed_images(record: dict[str, Any]) -> list[Any]:
    listed = _first(record, "image", "images")
    if listed is None or listed == "":
        return []
    return list(listed) if isinstance(listed, list) else [listed]


def _image_source(entry: Any, image_root: Path) -> ImageSource:
    if isinstance(entry, dict):
        entry = _first(entry, "url", "path", "image")
    if not isinstance(entry, str):
        raise SampleError(f"expected an image path, got {type(entry).__name__}")
    if match := re.match(r"data:image/([\w.+-]+)(?:;[\w.=+-]+)*;base64,", entry):
        try:
            data = base64.b64decode(entry[match.end() :], validate=True)
        except ValueError as error:
            raise SampleError(f"inline image is not valid base64: {error}") from None
        return ImageSource(data=data, suffix=_suffix(match[1]))
    if re.match(r"https?://", entry):
        raise SampleError(f"image {entry} is a web address; download it first, genrecal reads local images")
    if entry.startswith("data:") or len(entry) > LONGEST_PATH:
        raise SampleError(
            f"image {entry[:40]!r} of {len(entry)} characters: expected a path or data:image/TYPE;base64,..."
        )
    path = image_root / entry.removeprefix("file://")
    try:
        found = path.is_file()
    except OSError as error:
        raise SampleError(f"image {path}: {error.strerror}") from None
    if not found:
        raise SampleError(f"image {path} does not exist")
    return ImageSource(path=path, suffix=_suffix(path.suffix.lstrip(".")))


def _suffix(kind: str) -> str:
    kind = re.sub(r"[^a-z0-9]", "", kind.lower())
    return {"jpeg": "jpg", "": "img"}.get(kind, kind)


@dataclass
class _MessageBuilder:
    """Turns -> messages, handing out the record's images in reading order."""

    images: list[ImageSource]
    image_root: Path
    inline: bool  # no list of images beside the turns: parts may carry their own
    used: int = 0

    def message(self, turn: Any) -> Message:
        if not isinstance(turn, dict):
            raise SampleError(f"expected each turn to be an object, got {type(turn).__name__}")
        name = _first(turn, "from", "role")
        if not isinstance(name, str) or name not in ROLES:
            raise SampleError(f"unknown role {name!r}; expected one of {', '.join(sorted(ROLES))}")
        content = _first(turn, "value", "content")
        role = ROLES[name]
        if isinstance(content, str):
            parts = self._tagged_text(content) if role == "user" else [content]
        elif isinstance(content, list):
            parts = [self._part(part) for part in content]
        else:
            raise SampleError(f"a turn of {name!r} has no text: expected a string or a list of parts")
        return Message(role=role, parts=tuple(part for part in parts if part != ""))

    def _tagged_text(self, text: str) -> list[str | ImageRef]:
        """Split at `<image>`; the newline that LLaVA data puts beside a tag is the tag's, not the question's."""
        pieces = text.split(IMAGE_TAG)
        parts: list[str | ImageRef] = []
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            piece = piece if number == 0 else piece.removeprefix("\n")
            parts.append(piece if last else piece.removesuffix("\n"))
            if not last:
                parts.append(self._next_image())
        return parts

    def _part(self, part: Any) -> str | ImageRef:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise SampleError("a text part has no string under 'text'")
            return str(part["text"])
        if kind in ("image", "image_url"):
            entry = _first(part, "image", "image_url", "path", "url")
            if entry is not None and self.inline:
                self.images.append(_image_source(entry, self.image_root))
            return self._next_image()
        raise SampleError(f"expected parts of type 'text' or 'image', got {kind!r}")

    def _next_image(self) -> ImageRef:
        if self.used >= len(self.images):
            raise SampleError(f"more image places than the {len(self.images)} images of the record")
        self.used += 1
        return ImageRef(self.used - 1)

    def place_unreferenced(self, messages: list[Message]) -> list[Message]:
        """Images that no tag places stand before the first question, as LLaVA trainers do; some but not all is an error."""
        if self.used == len(self.images):
            return messages
        if self.used:
            raise SampleError(f"{len(self.images)} images but {self.used} image places")
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise SampleError("no user turn to hold the image")
        refs = tuple(ImageRef(i) for i in range(len(self.images)))
        messages[first] = Message(role="user", parts=refs + messages[first].parts)
        return messages


def _check_turns(messages: list[Message]) -> None:
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            raise SampleError(f"turn {number + 1} is of role {message.role!r}, expected {expected!r} (turns alternate)")
        if expected == "assistant" and any(isinstance(part, ImageRef) for part in message.parts):
            raise SampleError(f"turn {number + 1}: an assistant turn holds an image")
        if expected == "assistant" and not message.text.strip():
            raise SampleError(f"turn {number + 1}: empty answer")
    if not any(message.role == "assistant" for message in turns):
        raise SampleError("no assistant turn")
    if turns[-1].role != "assistant":
        raise SampleError("the last user turn has no answer")


# ------------------------------------------------------------------------------------------------------------ containers


@dataclass
class SampleSet(Sequence[Sample | BadRecord]):
    """All records of one or more files in order; indexing parses one record and checks that its images exist.

    A record that is no sample comes back as a `BadRecord`, so every input record keeps its place and its key.
    """

    files: list["_RecordFile"]
    image_root: Path | None = None
    limit: int | None = None
    _starts: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0] + [len(file) for file in self.files])

    def __len__(self) -> int:
        total = int(self._starts[-1])
        return total if self.limit is None else min(total, self.limit)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, row = self.files[number], int(index - self._starts[number])
        location = f"{file.path}:{file.line(row)}"
        record: Any = {}
        try:
            try:
                record = _parse_json(file.text(row))
            except (ValueError, RecursionError) as error:  # JSON or UTF-8 errors, numbers of thousands of digits
                raise SampleError(f"broken JSON: {error}") from None
            return parse_record(record, index=index, location=location, image_root=self.image_root or file.path.parent)
        except SampleError as error:
            known = record if isinstance(record, dict) else {}
            return BadRecord(location=location, reason=str(error), **_names(known, index=index))

    def __iter__(self) -> Iterator[Sample | BadRecord]:
        return (self[i] for i in range(len(self)))


def open_samples(
    paths: Sequence[Path | str], *, image_root: Path | str | None = None, limit: int | None = None
) -> SampleSet:
    """Open `.json`, `.jsonl`, `.json.zst` or `.jsonl.zst` files as one sequence of samples.

    Relative image paths are taken from `image_root`, or else from the folder of their file. Raises DataError for a file
    that cannot be read, holds nothing, or is a JSON array that breaks off (its later records cannot be found).
    """
    files = [_RecordFile.open(Path(path)) for path in paths]
    if not sum(len(file) for file in files):
        raise DataError(f"no records in {', '.join(str(path) for path in paths)}")
    return SampleSet(files=files, image_root=Path(image_root) if image_root else None, limit=limit)


@dataclass
class _RecordFile:
    """One open data file with the byte range and the first line of each record."""

    path: Path
    stream: BinaryIO
    ranges: np.ndarray  # int64 [records, 2]: first byte, end
    lines: np.ndarray  # int64 [records]: 1-based

    def __len__(self) -> int:
        return len(self.ranges)

    def line(self, row: int) -> int:
        return int(self.lines[row])

    def text(self, row: int) -> str:
        start, end = (int(value) for value in self.ranges[row])
        try:
            data = os.pread(self.stream.fileno(), end - start, start)  # by several threads at once
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        return data.decode("utf-8")

    @classmethod
    def open(cls, path: Path) -> "_RecordFile":
        suffixes = "".join(path.suffixes[-2:]) if path.suffix == ".zst" else path.suffix
        if suffixes not in (".json", ".jsonl", ".json.zst", ".jsonl.zst"):
            raise DataError(f"{path}: expected a .json, .jsonl, .json.zst or .jsonl.zst file, got {path.name!r}")
        try:
            stream: BinaryIO = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None
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


def _parse_json(text: str) -> Any:
    """json.loads that refuses half a surrogate pair: such text has no UTF-8, so nothing could tokenise or store it."""
    record = json.loads(text)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(record, ensure_ascii=False).encode()
    return record


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
