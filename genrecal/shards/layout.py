"""Names of the files of a cache directory, and its `cache.json`."""

import json
from typing import Any

from genrecal.errors import FormatError
from genrecal.samples.images import BACKGROUND
from genrecal.shards.answer_source import AnswerSource
from genrecal.shards.arrow_file import MOST_WIDTH
from genrecal.shards.codecs import codec_named
from genrecal.shards.storage import Store
from genrecal.shards.strict_json import strict_json

FORMAT_VERSION = 1
CACHE_FILE = "cache.json"
TEACHER_FOLDER = "teacher"
TIERS = ("samples", "questions")
MOST_CACHE_FILE_BYTES = 2**23
MOST_SHARDS, MOST_HEAD_ROWS = 10**7, 2**31 - 1
NUMBERS = (
    "hidden_size", "head_rows", "vocab_size", "top_k", "sampled_targets", "samples_per_shard", "num_samples", "num_shards"
)  # fmt: skip


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


def tar_name(tier: str, shard: int) -> str:
    return f"{tier}/{shard_name(shard)}.tar"


def manifest_name(shard: int) -> str:
    return f"manifest/{shard_name(shard)}.parquet"


def answers_name(shard: int) -> str:
    return f"answers/{shard_name(shard)}.jsonl"


def write_cache_json(store: Store, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    store.write(CACHE_FILE, text.encode())


def read_cache_json(store: Store) -> dict[str, Any]:
    """What a cache says of itself. Raises FormatError for no cache, an unknown version or an unknown codec.

    A cache from before there were sampled targets says nothing of them, so it has none; one from before the teacher could
    write answers has given ones.
    """
    path = store.where(CACHE_FILE)
    try:
        content = strict_json(store.read(CACHE_FILE, 0, MOST_CACHE_FILE_BYTES + 1), MOST_CACHE_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        missing = f"it has no {CACHE_FILE}" if store.present("") else "there is nothing at this path"
        raise FormatError(f"{store.url}: not a cache: {missing}; `genrecal cache` writes one") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise FormatError(f"{path}: format version {version!r}; this genrecal reads version {FORMAT_VERSION}")
    for name in ("answer_codec", "question_codec"):
        if content.get(name) != "none":
            codec_named(str(content.get(name, "")), where=f"{path}: {name}")
    defaults = {"sampled_targets": 0, "answers": AnswerSource().to_json(), "template_args": {}, "allowed_tokens": []}
    return defaults | content


def wrong_settings(description: dict[str, Any]) -> dict[str, str]:
    """Settings of cache.json that cannot be right, by name, and what they should be."""
    wrong = {
        name: "a whole number, 0 or more"
        for name in NUMBERS
        if type(description.get(name)) is not int or description[name] < 0
    }
    for name, most in (("num_shards", MOST_SHARDS), ("hidden_size", MOST_WIDTH), ("head_rows", MOST_HEAD_ROWS)):
        if name not in wrong and description[name] > most:
            wrong[name] = f"at most {most}"
    for name in ("hidden_size", "head_rows"):
        if name not in wrong and not description[name]:
            wrong[name] = "1 or more"
    if not wrong.keys() & {"num_samples", "samples_per_shard", "num_shards"}:
        size = description["samples_per_shard"]
        if size == 0:
            wrong["samples_per_shard"] = "1 or more"
        elif description["num_shards"] != -(-description["num_samples"] // size):
            wrong |= dict.fromkeys(("num_samples", "samples_per_shard", "num_shards"), "numbers that fit each other")
    if not wrong.keys() & {"vocab_size", "head_rows"} and description["vocab_size"] > description["head_rows"]:
        wrong["vocab_size"] = "at most head_rows"
    if not wrong.keys() & {"top_k", "head_rows"} and description["top_k"] > description["head_rows"]:
        wrong["top_k"] = "at most head_rows"
    fraction = description.get("question_fraction")
    if not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
        wrong["question_fraction"] = "a share from 0 to 1"
    if type(description.get("question_seed")) is not int:
        wrong["question_seed"] = "a whole number"
    if description.get("image_backend") not in ("pil", "torchvision"):
        wrong["image_backend"] = "pil or torchvision"
    if description.get("image_background", BACKGROUND) != BACKGROUND:
        wrong["image_background"] = BACKGROUND
    teacher = description.get("teacher")
    if not isinstance(teacher, dict) or not all(isinstance(teacher.get(name), str) for name in ("name", "dtype")):
        wrong["teacher"] = "an object with a name and a dtype"
    try:
        AnswerSource.from_json(description.get("answers"))
    except ValueError:
        wrong["answers"] = "an object with a kind of given, greedy or sampled, and that kind's settings"
    if not isinstance(description.get("template_args"), dict):
        wrong["template_args"] = "an object"
    tokens = description.get("allowed_tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        wrong["allowed_tokens"] = "a list of texts"
    totals = description.get("totals", {})
    if not isinstance(totals, dict):
        wrong["totals"] = "an object"
    return wrong
