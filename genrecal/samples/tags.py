"""Tags in a text that stand for an image, in every spelling that is sure to mean one; others are refused by name."""

import re
from dataclasses import dataclass

from genrecal.errors import SampleError
from genrecal.samples.fields import media_name

# <image>; <image 1>, <image_1>, <|image_1|>; MiniGPT-4's, Qwen-VL's, Qwen2-VL's, Gemma's, Pixtral's and others' own.
IMAGE_TAG = (
    r"<(?:image|img)>(?P<name>[^<>\n]+)</(?:image|img)>"
    r"|<\|?(?:image|img)[ _#-]?(?P<number>\d{1,3})\|?>"
    r"|(?:<img>)?<imagehere>(?:</img>)?"
    r"|(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?"
    r"|(?:<start_of_image>|<image_soft_token>)(?:<end_of_image>)?"
    r"|<\|?(?:image|image_placeholder|image_token)\|?>|<image ?/>|<img></img>|<img_context>|\[img\](?!\S*\[/img\])"
)
OTHER_TAG = (
    r"<\|?/?(?:image|img|vision|video|audio|speech)(?:[ _#-]?(?:\d{1,3}|placeholder|pad|start|end|here|token|patch|bos|eos))*"
    r"\|?>|\[/?(?:img|image|video|audio)\]"
)
TAG = re.compile(f"(?=[<[])(?:(?:{IMAGE_TAG})|(?P<other>{OTHER_TAG}))", re.IGNORECASE)
VIDEO_TAG = "<video>"
# What may stand for an image, in a record whose images have no other place: <image:1>, {image}, [Image 2], HTML, Markdown.
LIKE_A_TAG = re.compile(
    r"<[|/ ]*(?:(?:begin|start|end|of|soft)[ _-])*(?:image|img|im|picture|pic|photo|media|vision|frame)s?"
    r"(?:[ _#:.=-]*(?:\d+|id|begin|start|end|token|pad|patch|content|placeholder))*[|/ ]*>"
    r"|<img\s[^<>]*>|\{+ ?(?:image|img|picture|photo)s?[ _-]?\d* ?\}+|\[(?:image|img|picture|photo)[ _#:-]?\d+\]"
    r"|!\[[^\]\n]*\]\([^)\n]+\)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Tag:
    """One tag: its text, and the number or the name of its image where it has one."""

    text: str
    number: int | None = None
    name: str | None = None


def split_tags(text: str, *, has_videos: bool = False) -> list[str | Tag]:
    """A text in pieces; the newline that LLaVA data puts beside a tag is the tag's, not the question's.

    Raises SampleError for a tag of an image, a video or a sound that is not read.
    """
    parts: list[str | Tag] = []
    end = 0
    for match in TAG.finditer(text):
        name = match["name"]
        if (match["other"] and not (has_videos and match[0] == VIDEO_TAG)) or (name and not _is_image(name)):
            raise SampleError(f"the tag {match[0][:80]!r} is not read; write <image> where an image stands")
        before = text[end : match.start()]
        parts.append((before.removeprefix("\n") if parts else before).removesuffix("\n"))
        parts.append(Tag(match[0], int(match["number"]) if match["number"] else None, name))
        end = match.end()
    return [*parts, text[end:].removeprefix("\n") if parts else text]


def _is_image(name: str) -> bool:
    return name.startswith("data:image/") or media_name(name) == "an image"


def first_image_tag(text: str) -> str:
    """The first tag of an image in a text, or ""."""
    return next((match[0] for match in TAG.finditer(text) if not match["other"]), "")
