"""What the fields of records are called: names that are read, that are refused, and that say nothing to a model.

A field that carries content is read, or its record is refused with the field's name, or it is counted and printed. So each
object of a record is read through `Fields`, which gives out what is asked for and judges what is left at the end.
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from genrecal.errors import SampleError, UsageError
from genrecal.samples.sample import ROLES, ImageSource

IMAGE_SUFFIXES = frozenset("avif bmp gif ico img j2k jp2 jpe jpeg jpg mpo pgm png pnm ppm tif tiff webp".split())
VIDEO_SUFFIXES = frozenset("avi flv m4v mkv mov mp4 mpeg mpg webm wmv".split())
AUDIO_SUFFIXES = frozenset("aac aiff flac m4a mp3 ogg opus wav wma".split())
MEDIA = {"an image": IMAGE_SUFFIXES, "a video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES}

# What is read, by the name that `--field NAME=FIELD` knows, and what records call it, whatever the case.
RECORD_FIELDS = {
    "messages": ("conversations", "messages", "conversation", "dialog", "dialogue"),
    "texts": ("texts",),
    "system": ("system", "system_prompt", "system_message", "system_instruction", "systeminstruction"),
    "history": ("history",),
    "question": ("question", "query", "prompt", "instruction", "problem"),
    "input": ("input",),
    "answer": ("answer", "answers", "response", "completion", "output", "label", "solution"),
    "reasoning": ("reasoning_content", "thinking", "reasoning"),
    "image": (),  # IMAGE_FIELD
    "video": ("video", "videos"),
    "id": ("id", "sample_id"),
    "category": ("category",),
    "source": ("source", "data_source"),
}
TURN_FIELDS = {
    "role": ("from", "role"),
    "content": ("value", "content"),
    "reasoning": RECORD_FIELDS["reasoning"],
    "learn": ("loss", "train", "training", "trainable", "weight", "loss_weight", "loss_mask", "target"),
    "image": (),
}
PAIR_FIELDS = {"system": ("system",), "user": ("user", "human", "input"), "assistant": ("assistant", "gpt", "output")}
PART_FIELDS = {
    "type": ("type",),
    "text": ("text", "content", "thinking", "reasoning"),
    "image": ("image", "image_url", "path", "url", "source"),
    "video": ("video",),
    "index": ("index",),
}
ENTRY_FIELDS = {
    "data": ("bytes", "data", "base64"),
    "name": ("url", "path", "image", "src"),
    "media_type": ("media_type", "mime_type"),
}
# How encoded images begin, to tell base64 without its data: prefix from a path, and HEIC and the like from nothing.
SIGNATURES = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF....WEBP|BM....\0\0|II\*\0|MM\0\*|....ftypavi[fs]|\0\0\0\x0cjP|\xff\x4f\xff\x51",
    re.DOTALL,
)
EMPTY_JSON = ("[]", "{}", "null")
IGNORE = "ignore"
IGNORED = f"--field {IGNORE}={{name}} passes over it"

# Fields that hold images: image, images, img_path, image_0, image2 ...; and the members of a WebDataset tar: jpg, 0.png ...
IMAGE_FIELD = re.compile(
    r"(?:image|img|picture|pic|photo)s?(?:_?(?:path|file|url|byte|base64|b64)s?)?[_.-]?(?P<number>\d*)"
    rf"|(?:(?P<place>\d+)[_.])?(?:{'|'.join(sorted(IMAGE_SUFFIXES - {'img'}))})(?:[_.]?(?P<last>\d+))?"
)

ROLES_OF = {
    "user": ("user", "human", "prompter", "instruction"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai"),
    "system": ("system", "developer"),
}
ROLE_NAMES = {name: role for role, names in ROLES_OF.items() for name in names}
TOOL_ROLES = frozenset(
    ("tool", "tool_call", "tool_response", "function", "function_call", "function_response", "observation", "ipython")
)

# What is never passed over: a name, and why.
REFUSED = {
    r"videos?(_?(path|file|url|byte)s?)?|" + "|".join(sorted(VIDEO_SUFFIXES)): (
        "is a video, which is not read (a list of its frames is, as images)"
    ),
    r"(audio|sound|speech)s?(_?(path|file|url|byte)s?)?|" + "|".join(sorted(AUDIO_SUFFIXES)): (
        "is audio, which is not read"
    ),
    r"(\w+_)?tools(_\w+)?|functions|(\w+_)?(tool|function)_(calls?|choice|call_id|responses?|results?)": (
        "is about tools, which are not read"
    ),
    r"(chosen|rejected)(_.*)?|kto_tag": "is preference data, which is not read; give the answer to learn alone",
    r"chat_template.*|documents": "changes the prompt, and is not read",
    r"objects": "may be what tags in the text stand for, and is not read",
    r"(loss|sample)_?(weight|mask|scale)s?|loss|weight|mask|train|training|trainable|train_details?|train_on_.*": (
        "says what is learned in a way that is not read; give a turn that is context only 'loss': false"
    ),
}
# Beside a question and an answer, which are nothing without them. Conversations have them in their texts.
REFUSED_BESIDE_QUESTION = {
    r"(\w+_)?(choice|option|candidate|distractor)s?([ _]?(list|[a-j]|\d+))?|op_?[a-f]|[a-f]"
    r"|contexts?|passages?|paragraphs?|articles?|story|premise|tables?|hints?|document": (
        "may be part of the question, and is not read; put it into the question's text, or name it with --field input="
    ),
}
# What tells samples apart, and nothing to a model: neither read nor counted.
METADATA = re.compile(
    r"(.*_)?(id|uid|uuid|idx|index|hash|sha256|md5|url|lang|language|license|split|date|timestamp|version|type)s?"
    r"|(.*_)?(width|height|size)(s|_list)?|dataset|data_source|origin|source|subset|meta|metadata|__\w+__"
)
# What says that a record without an image is about one.
MEDIA_ID = re.compile(
    r"(.*_)?(image|img|picture|photo|frame|video|clip|audio)s?_?(id|name|key|idx|index|hash|sha256|md5)s?"
)


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """What the fields and roles of somebody's records are here. Raises UsageError for a name that is not known.

    Args:
        fields: of a record's field, one of RECORD_FIELDS, or "ignore" for one that is passed over wherever it stands.
            Several fields may hold images, which are then in this order.
        roles: of a turn's role, user, assistant or system.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = (*RECORD_FIELDS, IGNORE)
        for column, name in self.fields.items():
            if name not in known:
                raise UsageError(
                    f"--field {name}={column}: no field {name!r} is read; expected one of {', '.join(known)}"
                )
            if name not in ("image", IGNORE) and list(self.fields.values()).count(name) > 1:
                raise UsageError(f"--field {name}={column}: two fields are named {name!r}")
        for role, name in self.roles.items():
            if name not in ROLES:
                raise UsageError(f"--role {role}={name}: expected user, assistant or system after the =, got {name!r}")

    @classmethod
    def parse(cls, fields: Sequence[str] = (), roles: Sequence[str] = ()) -> "FieldMap":
        """Of `question=q` (what it is here, and what the records call it) and `Human=user`."""
        for option, texts in (("--field question=q", fields), ("--role Human=user", roles)):
            for text in texts:
                if not all(text.partition("=")[::2]):
                    raise UsageError(f"{option.split()[0]} {text!r}: expected two names, as in {option}")
        named = [text.partition("=") for text in fields]
        columns = [column for _, _, column in named]
        for column in columns:
            if columns.count(column) > 1:
                raise UsageError(f"--field: the field {column!r} is named twice")
        return cls(
            fields={column: name for name, _, column in named},
            roles={role: name for role, _, name in (text.partition("=") for text in roles)},
        )

    def columns(self, name: str) -> list[str]:
        """The fields that are called `name` here."""
        return [column for column, known in self.fields.items() if known == name]


class Fields:
    """The fields of one object of a record. Those that are taken are read; `finish` judges the others.

    Args:
        values: the object; nulls are no fields, as tables have every field in every row.
        names: what is read, as RECORD_FIELDS.
        where: what stands before a field's name in messages, such as "messages[].".
        given: the user's own names for the fields of a record.
    """

    def __init__(self, values: Mapping[str, Any], names: Mapping[str, Sequence[str]], where: str, given: FieldMap):
        ignored = given.columns(IGNORE)
        self.left = {name: value for name, value in values.items() if not _is_null(value) and name not in ignored}
        self.by_lower = {name.lower(): name for name in self.left}
        self.names, self.where, self.given = names, where, given
        self.refused, self.notes = REFUSED, list[str]()  # notes are counted too

    def called(self, name: str) -> list[str]:
        """The fields that may be `name` and are not empty; those alone that the user called so, if any are."""
        return [key for key in self._called(name) if has_content(self.left[key])]

    def take(self, name: str, default: Any = None) -> Any:
        """The first field that is `name`, and not empty if one is not."""
        for key in self.called(name) or self._called(name):
            return self.left.pop(key)
        return default

    def _called(self, name: str) -> list[str]:
        if self.names is RECORD_FIELDS and (given := self.given.columns(name)):
            return [column for column in given if column in self.left]
        return [key for known in self.names[name] if (key := self.by_lower.get(known)) in self.left]

    def image_fields(self) -> list[list[str]]:
        """The fields that hold images: those that differ in their number alone together, in its order."""
        if self.names is RECORD_FIELDS and (given := self.given.columns("image")):
            return [[column for column in given if column in self.left]]
        families: dict[str, list[tuple[int, str]]] = {}
        for key in self.left:
            match = IMAGE_FIELD.fullmatch(key.lower())
            if match and has_content(self.left[key]):
                number = next((int(text) for text in match.groups() if text), -1)
                families.setdefault(re.sub(r"[_.-]?\d+[_.]?", "", key.lower()), []).append((number, key))
        return [[key for _, key in sorted(family)] for family in families.values()]

    def finish(self, *, has_images: bool) -> Iterator[str]:
        """Names of fields that are not read, to be counted. Raises SampleError for content that must not be passed over."""
        yield from self.notes
        for name, value in self.left.items():
            if not has_content(value) or value in EMPTY_JSON:
                continue
            label = repr(f"{self.where}{name}"[:80])
            kind = (
                "kto_tag" if name.lower() == "label" and isinstance(value, bool) else name.lower()
            )  # TRL's and ms-swift's
            for pattern, reason in self.refused.items():
                if re.fullmatch(pattern, kind):
                    raise SampleError(f"the field {label} {reason} ({IGNORED.format(name=name)})")
            if not (self.where or has_images) and MEDIA_ID.fullmatch(name.lower()):
                raise SampleError(
                    f"the field {label} names an image or a video, and the record has none ({IGNORED.format(name=name)})"
                )
            kind, is_data = media_in(value)
            if kind and (is_data or not has_images):
                verb = "holds" if is_data else "names"
                advice = "" if self.where else f"--field image={name} reads it, "
                raise SampleError(
                    f"the field {label} {verb} {kind}, which is not read ({advice}{IGNORED.format(name=name)})"
                )
            if IMAGE_FIELD.fullmatch(name.lower()) or not METADATA.fullmatch(name.lower()):
                yield f"a field {label}"


def _is_null(value: Any) -> bool:
    """Null, or the NaN that pandas writes for it."""
    return value is None or value != value


def has_content(value: Any) -> bool:
    """Whether a value says anything: neither null nor empty, nor a list or an object of such."""
    if isinstance(value, dict):
        return any(map(has_content, value.values()))
    if isinstance(value, list):
        return any(map(has_content, value))
    return not _is_null(value) and value not in ("", b"")


def media_in(value: Any) -> tuple[str, bool]:
    """What of MEDIA, or bytes, a value holds or names, if any; and whether it is the data itself."""
    if isinstance(value, (dict, list)):
        found = [media_in(item) for item in (value.values() if isinstance(value, dict) else value)]
        return next((item for item in sorted(found, key=lambda item: not item[1]) if item[0]), ("", False))
    if isinstance(value, ImageSource):
        return "an image", True
    if isinstance(value, bytes):
        return "bytes", True
    if not isinstance(value, str):
        return "", False
    if match := re.match(r"\s*data:(image|video|audio)/", value):
        return {"image": "an image", "video": "a video", "audio": "audio"}[match[1]], True
    return ("an image", True) if bare_image(value) else (media_name(value), False)


def media_name(text: str) -> str:
    """What of MEDIA a path or an address names, by its suffix; "" for any other text."""
    match = re.fullmatch(r"\S[^\n]{0,1000}?\.(\w{2,5})(?:[?#]\S*)?\s*", text)
    return next((kind for kind, suffixes in MEDIA.items() if match and match[1].lower() in suffixes), "")


def decode_base64(text: str) -> bytes:
    """Base64 with either alphabet, with or without its padding, and white space anywhere."""
    text = re.sub(r"\s+", "", text).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def bare_image(text: str) -> bytes | None:
    """The bytes of base64 that no prefix announces: they must be an image's."""
    try:
        if len(text) > 64 and SIGNATURES.match(decode_base64(text[:64])):
            return decode_base64(text)
    except ValueError:
        pass
    return None
