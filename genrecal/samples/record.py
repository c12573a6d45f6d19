"""A record of any container -> `Sample`: LLaVA (`conversations`), chat (`messages`) or question and answer pairs (`texts`)."""

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrecal.errors import SampleError
from genrecal.samples.sample import ROLES, ImageRef, ImageSource, Message, Sample

IMAGE_TAG = "<image>"
LONGEST_PATH = 4096  # characters; a longer one is a picture pasted in without its data: prefix


def parse_json(data: bytes) -> Any:
    """A record's UTF-8 JSON. Raises SampleError if it is none.

    Half a surrogate pair is refused: such text has no UTF-8, so nothing could tokenise or store it.
    """
    try:
        text = data.decode("utf-8")
        record = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # JSON or UTF-8 errors, numbers of thousands of digits
        raise SampleError(f"broken JSON: {error}") from None
    return record


def make_key(index: int, sample_id: str) -> str:
    """Place in the input, then what of the id a file name can hold."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", sample_id).strip("-")[:48]
    return f"{index:08d}-{slug}" if slug else f"{index:08d}"


def parse_record(record: Any, *, index: int, location: str, image_root: Path) -> Sample:
    """One record -> Sample. Raises SampleError with the reason.

    Args:
        record: fields as JSON gives them; a picture may also be an `ImageSource`, or bytes as tables hold them.
        index: its place in the input.
        location: the same, for people.
        image_root: where relative paths start.
    """
    if not isinstance(record, dict):
        raise SampleError(f"expected a record (a JSON object), got {type(record).__name__}")
    turns = record_turns(record)
    if not isinstance(turns, list) or not turns:
        raise SampleError("expected a non-empty list under 'conversations' (LLaVA) or 'messages' (chat)")
    images = [_image_source(entry, image_root) for entry in listed_images(record)]
    builder = _MessageBuilder(images=images, image_root=image_root, inline=not images)
    messages = builder.place_unreferenced([builder.message(turn) for turn in turns])
    _check_turns(messages)
    return Sample(
        messages=tuple(messages),
        images=tuple(images),
        given_answers=(),
        location=location,
        **record_names(record, index=index),
    )


def record_turns(record: dict[str, Any]) -> Any:
    """The turns; those of `texts` (a list of `user` and `assistant` texts) in the form of the others."""
    turns, pairs = _first(record, "conversations", "messages"), record.get("texts")
    if turns is not None or not isinstance(pairs, list):
        return turns
    if not all(isinstance(pair, dict) for pair in pairs):
        raise SampleError("expected each entry of 'texts' to be an object with 'user' and 'assistant'")
    return [{"role": role, "content": pair.get(role)} for pair in pairs for role in ("user", "assistant")]


def record_names(record: Any, *, index: int) -> dict[str, str]:
    """How a record is called and counted; one that is none has its place in the input for a name."""
    record = record if isinstance(record, dict) else {}
    sample_id = _first(record, "id", "sample_id")
    name = "" if sample_id is None else str(sample_id)
    return {
        "key": make_key(index, name),
        "sample_id": name,
        "category": str(record.get("category") or ""),
        "source": str(record.get("source") or record.get("data_source") or _source_of_texts(record) or ""),
    }


def _source_of_texts(record: dict[str, Any]) -> Any:
    pairs = record.get("texts")
    return pairs[0].get("source") if isinstance(pairs, list) and pairs and isinstance(pairs[0], dict) else None


def _first(record: dict[str, Any], *names: str) -> Any:
    """The first of these fields that is there and not null (tables exported as json hold every field in every row)."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def listed_images(record: dict[str, Any]) -> list[Any]:
    """The entries of the pictures that stand beside the turns."""
    listed = _first(record, "image", "images")
    if listed is None or listed == "":
        return []
    if isinstance(listed, dict) and all(value is None for value in listed.values()):
        return []  # so some writers of tables mark a row without a picture
    return list(listed) if isinstance(listed, list) else [listed]


def part_image(part: Any) -> Any:
    """The entry of the picture that a part of a message carries; None if it carries none."""
    return _first(part, "image", "image_url", "path", "url") if isinstance(part, dict) else None


def image_path(entry: Any) -> Any:
    """What an entry names its picture by."""
    return _first(entry, "url", "path", "image") if isinstance(entry, dict) else entry


def _image_source(entry: Any, image_root: Path) -> ImageSource:
    data = entry.get("bytes") if isinstance(entry, dict) else entry
    if isinstance(data, ImageSource):
        return data
    entry = image_path(entry)
    if isinstance(data, bytes):
        return ImageSource(data=data, suffix=_suffix(Path(entry).suffix if isinstance(entry, str) else ""))
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
    return ImageSource(path=path, suffix=_suffix(path.suffix))


def _suffix(kind: str) -> str:
    kind = re.sub(r"[^a-z0-9]", "", kind.lower())
    return {"jpeg": "jpg", "": "img"}.get(kind, kind)


@dataclass
class _MessageBuilder:
    """Turns -> messages, handing out the record's images in reading order."""

    images: list[ImageSource]
    image_root: Path
    inline: bool  # no list of images beside the turns: parts may carry their own
    used: int = 0  # places so far

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
            entry = part_image(part)
            if entry is not None and self.inline:
                self.images.append(_image_source(entry, self.image_root))
            elif type(part.get("index")) is int:
                return self._numbered_image(part["index"])
            return self._next_image()
        raise SampleError(f"expected parts of type 'text' or 'image', got {kind!r}")

    def _next_image(self) -> ImageRef:
        if self.used >= len(self.images):
            raise SampleError(f"more image places than the {len(self.images)} images of the record")
        self.used += 1
        return ImageRef(self.used - 1)

    def _numbered_image(self, index: int) -> ImageRef:
        """The place of a part that says which picture of the list it is; parts are in the list's order as a rule."""
        if index != self.used:
            raise SampleError(f"an image part of index {index} in place {self.used}; expected the order of the images")
        return self._next_image()

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
