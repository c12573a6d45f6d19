"""What a sample is: one conversation with its images, wherever it was read from."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrecal.errors import SampleError
from genrecal.files import read_url

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """One image of a sample: a file, a part of a file (of a tar), a file behind a URL, or bytes already in memory.

    The bytes are passed on as they are, never re-encoded.

    Args:
        start, size: of the part, in bytes; without `size` the whole file.
    """

    path: Path | None = None
    url: str | None = None
    data: bytes | None = field(default=None, repr=False)
    suffix: str = "jpg"
    start: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The encoded image bytes. Raises SampleError when the file cannot be read, StorageError when its store fails."""
        if self.data is not None:
            return self.data
        if self.url is not None:
            try:
                return read_url(self.url)
            except FileNotFoundError:
                raise SampleError(f"image {self.url} does not exist") from None
        assert self.path is not None
        try:
            return self.path.read_bytes() if self.size is None else read_part(self.path, self.start, self.size)
        except OSError as error:
            raise SampleError(f"image {self.path}: {error.strerror or error}") from None


def read_part(path: Path, start: int, size: int) -> bytes:
    """These bytes of a file. Raises OSError, also if the file ends before them."""
    with path.open("rb") as file:
        data = os.pread(file.fileno(), size, start)
    if len(data) < size:
        raise OSError(f"ends before byte {start + size}")
    return data


@dataclass(frozen=True)
class ImageRef:
    """Where an image stands in a message: the index into `Sample.images`."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of one side.

    Args:
        role: system, user or assistant.
        parts: texts and images in reading order.
        target: False for an assistant turn that is context only: it is rendered as part of the next question.
        reasoning: what an assistant thought before the answer, which templates render in their own way or leave out.
    """

    role: str
    parts: tuple[str | ImageRef, ...]
    target: bool = True
    reasoning: str = ""

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def is_target(self) -> bool:
        """Whether this is an answer to learn."""
        return self.role == "assistant" and self.target


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation: user and assistant turns in alternation, perhaps after one system message, up to the last target.

    `key` names the sample in a cache: its place in the input and its id, so it is the same in every run over the same
    files. It holds no dot and no slash. `given_answers` are the input's, turn by turn, where a teacher wrote those in
    `messages`; else empty. `unread` says what of the record is in none of these, each as in "a field 'tools'"; a cache does
    not keep it.
    """

    key: str
    sample_id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()
    given_answers: tuple[str, ...] = ()
    category: str = ""
    source: str = ""
    location: str = ""
    unread: tuple[str, ...] = field(default=(), compare=False)

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts of the target turns: the assistant's but those that are context only."""
        return tuple(self.messages[place].text for place in self.target_places)

    @property
    def target_places(self) -> list[int]:
        """Where in `messages` the target turns stand."""
        return [place for place, message in enumerate(self.messages) if message.is_target]

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
            **({"given_answers": list(self.given_answers)} if self.given_answers else {}),
            "messages": [
                {
                    "role": message.role,
                    **({} if message.target else {"target": False}),
                    **({"reasoning_content": message.reasoning} if message.reasoning else {}),
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
            Message(
                role=message["role"],
                parts=tuple(_stored_part(part) for part in message["content"]),
                target=message.get("target", True),
                reasoning=message.get("reasoning_content", ""),
            )
            for message in content["messages"]
        )
        names = {name: content[name] for name in ("sample_id", "category", "source")}
        for name, value in (*names.items(), *(("role", message.role) for message in messages)):
            if not isinstance(value, str) or (name == "role" and value not in ROLES):
                raise ValueError(f"{name} {value!r}")
        for message in messages:
            if type(message.target) is not bool or not isinstance(message.reasoning, str):
                raise ValueError(f"target {message.target!r}, reasoning_content {message.reasoning!r}")
        given = content.get("given_answers", [])
        if not isinstance(given, list) or not all(isinstance(answer, str) for answer in given):
            raise ValueError("given_answers that are no list of texts")
        return cls(key=key, messages=messages, images=tuple(images), given_answers=tuple(given), location=key, **names)


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
