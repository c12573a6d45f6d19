"""A record of any container and shape -> `Sample`.

Its turns are brought into one form (`shapes`) and become messages in which each image has a place; then the places get
their images. What was not read on the way is refused, counted, or known to say nothing (`fields`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrecal.errors import SampleError
from genrecal.samples.fields import (
    IGNORE,
    PART_FIELDS,
    RECORD_FIELDS,
    ROLE_NAMES,
    TOOL_ROLES,
    TURN_FIELDS,
    FieldMap,
    Fields,
    has_content,
    media_name,
)
from genrecal.samples.sample import ImageRef, ImageSource, Message, Sample
from genrecal.samples.shapes import from_json, turns_of
from genrecal.samples.sources import MEMBERS, Entry, Members, open_entries, read_entry
from genrecal.samples.tags import LIKE_A_TAG, VIDEO_TAG, Tag, first_image_tag, split_tags

NO_FIELDS = FieldMap()
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
REASONING_PARTS = ("thinking", "reasoning")


def make_key(index: int, sample_id: str) -> str:
    """Place in the input, then what of the id a file name can hold."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", sample_id).strip("-")[:48]
    return f"{index:08d}-{slug}" if slug else f"{index:08d}"


def record_names(record: Any, *, index: int, fields: FieldMap = NO_FIELDS) -> dict[str, str]:
    """How a record is called and counted; one that is none has its place in the input for a name."""
    record = _unwrapped(record) if isinstance(record, dict) else {}
    read, pairs = Fields(record, RECORD_FIELDS, "", fields), record.get("texts")
    of_pair = pairs[0].get("source") if isinstance(pairs, list) and pairs and isinstance(pairs[0], dict) else ""
    name = str(read.take("id", ""))
    return {
        "key": make_key(index, name),
        "sample_id": name,
        "category": str(read.take("category") or ""),
        "source": str(read.take("source") or of_pair or ""),
    }


def _unwrapped(record: dict[str, Any]) -> dict[str, Any]:
    """A row of a WebDataset that was made a table has its JSON member in one column, and its images in others."""
    inner = from_json(record.get("json"))
    return {**{name: record[name] for name in record if name != "json"}, **inner} if isinstance(inner, dict) else record


def parse_record(
    record: Any, *, index: int, location: str, image_root: Path | str, fields: FieldMap = NO_FIELDS
) -> Sample:
    """One record -> Sample. Raises SampleError with the reason.

    Args:
        record: fields as JSON gives them; an image may also be an `ImageSource`, or bytes as tables hold them. A tar's
            record has its other members under MEMBERS.
        index: its place in the input.
        location: the same, for people.
        image_root: where relative paths start: a folder, or a URL.
        fields: what its fields and roles are, where they have none of the known names.
    """
    if not isinstance(record, dict):
        raise SampleError(f"expected a record (a JSON object), got {type(record).__name__}")
    members = record.get(MEMBERS)
    reader = _Reader(image_root, members if isinstance(members, Members) else None, fields)
    messages, images = reader.read({name: value for name, value in record.items() if not isinstance(value, Members)})
    names: dict[str, Any] = record_names(record, index=index, fields=fields)
    unread = tuple(dict.fromkeys(reader.unread))
    return Sample(messages=tuple(messages), images=tuple(images), location=location, unread=unread, **names)


@dataclass(frozen=True)
class _Place:
    """Where an image stands, until it is known which.

    Args:
        entry: the image, where the place itself says it.
        number: which of the record's list it is, counted from 0 or from 1.
        is_tag: in a text.
        is_frame: of a video; those are in no list of images.
    """

    entry: Entry | None = None
    number: int | None = None
    is_tag: bool = False
    is_frame: bool = False


@dataclass
class _Draft:
    """A message whose images are not known yet."""

    role: str
    parts: list[str | _Place]
    target: bool
    reasoning: str


@dataclass
class _Reader:
    """Reads one record. `opened` are all objects met on the way, whose left fields are judged at the end."""

    image_root: Path | str
    members: Members | None
    given: FieldMap
    opened: list[Fields] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    videos: list[list[_Place]] = field(default_factory=list)  # of those that have no place yet, the frames
    answer_tag: str = ""  # of an image, in an assistant's text
    like_a_tag: str = ""  # in another's text

    def read(self, record: dict[str, Any]) -> tuple[list[Message], list[ImageSource]]:
        unwrapped = _unwrapped(record)
        if clash := [
            name for name in record if has_content(record[name]) and unwrapped.get(name, record[name]) != record[name]
        ]:
            raise SampleError(f"the field {clash[0]!r} stands beside the field 'json' and, with another value, in it")
        fields = self._open(unwrapped, RECORD_FIELDS, "")
        for name in ("id", "category", "source"):
            fields.take(name)
        turns = turns_of(fields, self._open)
        listed = self._listed_images(fields)
        self.videos = self._listed_videos(fields)
        count = len(self.videos)
        drafts = [self._draft(turn) for turn in turns]
        if 0 < len(self.videos) < count:
            raise SampleError(f"{count} videos but {count - len(self.videos)} places of videos")
        messages, images = self._with_images(drafts, listed)
        messages = self._up_to_the_last_answer(messages)
        for opened in self.opened:
            self.unread += opened.finish(has_images=bool(images))
        self.unread += self._members_not_read(images)
        return messages, images[: sum(isinstance(part, ImageRef) for message in messages for part in message.parts)]

    def _open(self, values: Mapping[str, Any], names: Mapping[str, Sequence[str]], where: str) -> Fields:
        self.opened.append(Fields(values, names, where, self.given))
        return self.opened[-1]

    # ------------------------------------------------------------------------------------------------- images and videos

    def _listed_images(self, fields: Fields) -> list[Entry]:
        """The images that stand beside the turns. Of several fields the one that has them at hand, or at least as files."""
        found = []
        for family in fields.image_fields():
            entries = [entry for name in family for entry in self._entries(fields.left[name], name)]
            if entries:
                found.append((min(map(_nearness, entries)), family, entries))
        if not found:
            return []
        nearness, family, entries = max(found, key=lambda item: item[0])
        names = list(map(_base_name, entries))
        for other_nearness, other, other_entries in found:
            if other is family or list(map(_base_name, other_entries)) == names:
                for name in other:
                    fields.left.pop(name)
            elif other_nearness == nearness:
                raise SampleError(
                    f"the fields {family[0]!r} and {other[0]!r} hold different images; say which are meant "
                    f"(--field image={family[0]} --field {IGNORE}={other[0]})"
                )
        return entries

    def _entries(self, value: Any, name: str) -> list[Entry]:
        """The images of one field; lists may lie in lists, and be JSON text."""
        value = from_json(value)
        if not has_content(value):
            return []  # also an object of nulls: so some writers of tables mark a row without an image
        if isinstance(value, dict) and all(map(first_image_tag, value)):
            value = list(value.values())  # MiniCPM-V: each image under its tag
        if isinstance(value, list):
            if not all(map(has_content, value)):
                raise SampleError(f"the field {name!r}: one of its {len(value)} images is empty")
            return [entry for item in value for entry in self._entries(item, name)]
        try:
            return [read_entry(value, self.opened)]
        except SampleError as error:
            raise SampleError(f"the field {name!r}: {error}") from None

    def _listed_videos(self, fields: Fields) -> list[list[_Place]]:
        """Videos that are lists of frames; others stay where they are, and are refused with the field's name."""
        videos = []
        for name in fields.called("video"):
            value = from_json(fields.left[name])
            lists = value if isinstance(value, list) and all(isinstance(item, list) for item in value) else [value]
            if all(_are_frames(frames) for frames in lists):
                fields.left.pop(name)
                videos += [self._frames(frames, name) for frames in lists]
        return videos

    def _frames(self, frames: Any, name: str) -> list[_Place]:
        return [_Place(entry, is_frame=True) for entry in self._entries(frames, name)]

    def _with_images(self, drafts: list[_Draft], listed: list[Entry]) -> tuple[list[Message], list[ImageSource]]:
        """Messages with their images, which are in reading order.

        Images that no place asks for stand before the first question, as LLaVA trainers do; some but not all is an error.
        """
        places = [part for draft in drafts for part in draft.parts if isinstance(part, _Place) and not part.is_frame]
        own = self._opened([place.entry for place in places if place.entry is not None])
        before = [frame for frames in self.videos for frame in frames]
        if not listed and not own and self.members is not None and not before:
            listed = list(self.members.images.values())
        images = self._opened(listed)
        if listed and not places:
            before = [_Place()] * len(images) + before
        elif listed:
            images = _in_order_of_places(places, images, own)
        elif len(own) < len(places):
            raise SampleError(f"more image places than the {len(own)} images of the record")
        else:
            images = own
        if before:
            if self.like_a_tag:
                raise SampleError(f"the tag {self.like_a_tag[:80]!r} is not read; write <image> where an image stands")
            first = next((draft for draft in drafts if draft.role == "user"), None)
            if first is None:
                raise SampleError("no user turn to hold the image")
            first.parts[:0] = before
        in_order = [part for draft in drafts for part in draft.parts if isinstance(part, _Place)]
        frames = iter(self._opened([place.entry for place in in_order if place.is_frame and place.entry is not None]))
        others, refs = iter(images), iter(map(ImageRef, range(len(in_order))))
        found = [next(frames if place.is_frame else others) for place in in_order]
        messages = [
            Message(
                role=draft.role,
                parts=tuple(part if isinstance(part, str) else next(refs) for part in draft.parts if part != ""),
                target=draft.target,
                reasoning=draft.reasoning,
            )
            for draft in drafts
        ]
        if found and self.answer_tag:
            raise SampleError(f"the assistant's text holds {self.answer_tag!r}; an image in an answer is not read")
        return messages, found

    def _opened(self, entries: Sequence[Entry]) -> list[ImageSource]:
        return open_entries(entries, self.image_root, self.members)

    def _members_not_read(self, images: list[ImageSource]) -> list[str]:
        """What else stands beside a tar's JSON."""
        unread = []
        for name in self.members.not_read(images) if self.members is not None else ():
            kind = media_name(f"member.{name}")
            if name in self.given.columns(IGNORE):
                continue
            if kind not in ("", "an image"):
                raise SampleError(
                    f"the member {name!r} is {kind}, which is not read (--field {IGNORE}={name} passes over it)"
                )
            unread.append(f"a member {name!r}")
        return unread

    # ------------------------------------------------------------------------------------------------------------- turns

    def _draft(self, turn: Any) -> _Draft:
        if not isinstance(turn, dict):
            raise SampleError(f"expected each turn to be an object, got {type(turn).__name__}")
        fields = self._open(turn, TURN_FIELDS, "messages[].")
        name = fields.take("role")
        role, content = self._role(name), fields.take("content")
        target = _is_learned(fields, role)
        reasoning = [fields.take("reasoning", "")]
        parts: list[str | _Place] = []
        if isinstance(content, str):
            if _are_parts(from_json(content)):
                raise SampleError(
                    f"the content of a turn of {name!r} is the JSON text of a list of parts; give the list"
                )
            parts += self._text(content, role)
        elif isinstance(content, list):
            for part in content:
                parts += self._part(part, role, reasoning)
        else:
            list(fields.finish(has_images=True))  # what stands there instead of a text says more
            raise SampleError(f"a turn of {name!r} has no text: expected a string or a list of parts")
        own = [
            entry
            for family in fields.image_fields()
            for key in family
            for entry in self._entries(fields.left.pop(key), key)
        ]
        if not all(isinstance(text, str) for text in reasoning) or (role != "assistant" and any(reasoning)):
            raise SampleError(f"a turn of {name!r} has reasoning that is no text of an assistant's")
        return _Draft(role, _matched(parts, own), target, "\n".join(filter(None, reasoning)))

    def _role(self, name: Any) -> str:
        if isinstance(name, str):
            if name in self.given.roles:
                return self.given.roles[name]
            if (known := name.strip().lower()) in ROLE_NAMES:
                return ROLE_NAMES[known]
            if known in TOOL_ROLES:
                raise SampleError(f"a turn of role {name!r}: tool calls are not read")
        expected = ", ".join(sorted(ROLE_NAMES))
        raise SampleError(f"unknown role {name!r}; expected one of {expected} (--role NAME=user says what another is)")

    def _text(self, text: str, role: str) -> list[str | _Place]:
        if role == "assistant":  # nothing stands for an image in an answer
            self.answer_tag = self.answer_tag or first_image_tag(text)
            return [text]
        parts: list[str | _Place] = []
        if match := LIKE_A_TAG.search(text):
            self.like_a_tag = self.like_a_tag or match[0]
        for piece in split_tags(text, has_videos=bool(self.videos)):
            if isinstance(piece, Tag) and piece.text == VIDEO_TAG:
                parts += self.videos.pop(0)
            elif isinstance(piece, Tag):
                entry = read_entry(piece.name, self.opened) if piece.name else None
                parts.append(_Place(entry, piece.number, is_tag=True))
            else:
                parts.append(piece)
        return parts

    def _part(self, part: Any, role: str, reasoning: list[Any]) -> list[str | _Place]:
        if isinstance(part, str):
            return self._text(part, role)
        fields = self._open(part if isinstance(part, dict) else {}, PART_FIELDS, "messages[].content[].")
        kind = fields.take("type") or next((name for name in ("text", "image", "video") if fields.called(name)), None)
        if kind in TEXT_PARTS:
            text = fields.take("text")
            if not isinstance(text, str):
                raise SampleError("a text part has no string under 'text'")
            return self._text(text, role)
        if kind in IMAGE_PARTS:
            entries, number = self._entries(fields.take("image"), "image"), fields.take("index")
            if len(entries) > 1 or not (number is None or type(number) is int):
                raise SampleError(f"an image part of {len(entries)} images and index {number!r}: expected one image")
            return [_Place(entries[0]) if entries else _Place(number=number)]
        if kind == "video" and _are_frames(frames := fields.take("video")):
            return [*self._frames(frames, "video")]
        if kind in REASONING_PARTS:
            reasoning.append(fields.take("text", ""))
            return []
        raise SampleError(f"expected parts of type 'text' or 'image', got {kind!r}, which is not read")

    def _up_to_the_last_answer(self, messages: list[Message]) -> list[Message]:
        start = 1 if messages[0].role == "system" else 0
        for number, message in enumerate(messages[start:], start=1):
            expected = ("assistant", "user")[number % 2]
            if message.role != expected:
                raise SampleError(f"turn {number} is of role {message.role!r}, expected {expected!r} (turns alternate)")
            if expected == "assistant" and any(isinstance(part, ImageRef) for part in message.parts):
                raise SampleError(f"turn {number}: an assistant turn holds an image")
            if message.is_target and not message.text.strip():
                raise SampleError(f"turn {number}: empty answer")
            if expected == "user" and not any(isinstance(part, ImageRef) or part.strip() for part in message.parts):
                raise SampleError(f"turn {number}: empty question")
        if not any(message.role == "assistant" for message in messages):
            raise SampleError("no assistant turn")
        answers = [place for place, message in enumerate(messages) if message.is_target]
        if not answers:
            raise SampleError("no answer to learn: every assistant turn is context only")
        if answers[-1] + 1 < len(messages):
            self.unread.append("turns after the last answer")
        return messages[: answers[-1] + 1]


def _are_parts(value: Any) -> bool:
    kinds = (*TEXT_PARTS, *IMAGE_PARTS, *REASONING_PARTS, "video")
    return isinstance(value, list) and any(isinstance(part, dict) and part.get("type") in kinds for part in value)


def _is_learned(fields: Fields, role: str) -> bool:
    """Whether a turn is to be learned; a turn that says nothing of it is, if it is the assistant's."""
    flags = {name: fields.left.pop(name) for name in fields.called("learn")}
    for name, value in flags.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise SampleError(f"{name!r} of a turn is {value!r}; only 0 and 1, or false and true, can be honoured")
        if value and role != "assistant":
            raise SampleError(
                f"{name!r} of a turn is {value!r}, and it is the {role}'s; only an assistant's is learned"
            )
    return role != "assistant" or all(flags.values())


def _matched(parts: list[str | _Place], own: list[Entry]) -> list[str | _Place]:
    """A message's parts with the images that stand beside its text: where its tags are, or else before it."""
    tags = [part for part in parts if isinstance(part, _Place) and part.is_tag and part.entry is None]
    beside = [
        part for part in parts if isinstance(part, _Place) and not part.is_tag and not part.is_frame and part.entry
    ]
    if not tags or not (own or beside):
        return [*map(_Place, own), *parts]
    images = [*own, *(part.entry for part in beside)]
    if len(tags) != len(images):
        raise SampleError(f"a turn of {len(images)} images has {len(tags)} tags in its text")
    left = iter(images)
    return [_Place(next(left), part.number) if part in tags else part for part in parts if part not in beside]


def _in_order_of_places(
    places: Sequence[_Place], images: list[ImageSource], own: list[ImageSource]
) -> list[ImageSource]:
    """The images of a record's list as its places ask for them. Those that say their image themselves must say the same."""
    if len(places) > len(images):
        raise SampleError(f"more image places than the {len(images)} images of the record")
    if len(places) < len(images):
        raise SampleError(f"{len(images)} images but {len(places)} image places")
    if numbers := [place.number for place in places if place.number is not None]:
        first = min(numbers)
        if first > 1 or sorted(numbers) != list(range(first, first + len(places))):
            raise SampleError(f"image places of the numbers {numbers}; expected each of the {len(images)} images once")
        images = [images[number - first] for number in numbers]
    said = iter(own)
    for place, image in zip(places, images, strict=True):
        if place.entry is not None and next(said) != image:
            raise SampleError("the images in the turns are others than those listed beside them; give them once")
    return images


def _are_frames(value: Any) -> bool:
    """Whether a list of images stands for a video."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            media_name(item) == "an image" if isinstance(item, str) else isinstance(item, (bytes, dict))
            for item in value
        )
    )


def _nearness(entry: Entry) -> int:
    """2 for an image at hand, 1 for a file, 0 for an address."""
    return 2 if isinstance(entry, ImageSource) else 0 if re.match(r"https?://", entry) else 1


def _base_name(entry: Entry) -> Any:
    return entry.rpartition("/")[2] if isinstance(entry, str) else entry
